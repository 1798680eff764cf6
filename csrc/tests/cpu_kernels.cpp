// Tests of csrc/include/kvzip/schedule.h and of the CPU kernels of every instruction set, without a framework: prints
// what fails and exits with 1. tests/attention/test_sanitizers.py compiles it with sanitizers.
//
// Schedules are checked by their promises over random heads; kernels against a naive softmax in double, with workers
// that run at once or in any order, on memory that ends exactly where the tensors do.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "kvzip/attention.h"

namespace {

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

using kvzip::Attention;
using kvzip::ColumnMax;
using kvzip::DType;
using kvzip::Kernels;

int checks = 0, failures = 0;

#define CHECK(condition, ...)                                     \
  do {                                                            \
    ++checks;                                                     \
    if (!(condition)) {                                           \
      if (++failures <= 40) {                                     \
        std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        std::printf(__VA_ARGS__);                                 \
        std::printf("\n");                                        \
      }                                                           \
    }                                                             \
  } while (0)

using Random = std::mt19937_64;

int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

// -- schedule ---------------------------------------------------------------------------------------------------------

std::vector<int64_t> tiles_before(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> sums = {0};
  for (int64_t length : lengths) sums.push_back(sums.back() + kvzip::tiles_of(length));
  return sums;
}

// Empty heads, tiny ones, one giant among them, or anything.
std::vector<int64_t> random_lengths(Random& random) {
  std::vector<int64_t> lengths(between(random, 1, 40));
  const int64_t kind = between(random, 0, 3), most = kind == 0 ? 3 : kind == 1 ? 200 : 3000;
  for (int64_t& length : lengths) length = between(random, 0, 2) == 0 ? 0 : between(random, 0, most);
  if (kind == 3) lengths[between(random, 0, lengths.size() - 1)] = between(random, 10000, 1000000);
  return lengths;
}

// All that schedule.h says of `heads` with these tiles and so many workers, by walking every tile.
void check_schedule(const std::vector<int64_t>& cu_tiles, int64_t workers) {
  const int64_t heads = cu_tiles.size() - 1, tiles = cu_tiles.back();
  CHECK(kvzip::worker_begin(0, workers, tiles) == 0, "the first tile");
  CHECK(kvzip::worker_begin(workers, workers, tiles) == tiles, "the last tile");
  std::set<int64_t> used;
  std::vector<int64_t> slots_of_head(heads, 0), first_worker(heads, -1), last_worker(heads, -1);
  int64_t last_slot = -1, expected_tile = 0;
  for (int64_t w = 0; w < workers; ++w) {
    const int64_t begin = kvzip::worker_begin(w, workers, tiles), end = kvzip::worker_begin(w + 1, workers, tiles);
    CHECK(begin == expected_tile, "worker %lld begins at %lld", (long long)w, (long long)begin);
    const int64_t count = end - begin;
    CHECK(count == tiles / workers || count == (tiles + workers - 1) / workers, "%lld of %lld tiles for 1 of %lld",
          (long long)count, (long long)tiles, (long long)workers);
    int64_t segment = -1;
    for (int64_t t = begin; t < end; ++t, ++expected_tile) {
      const int64_t found_owner = kvzip::owner(t, workers, tiles);
      CHECK(found_owner == w, "tile %lld of worker %lld belongs to %lld", (long long)t, (long long)w,
            (long long)found_owner);
      const int head = kvzip::head_of(t, cu_tiles.data(), static_cast<int>(heads));
      CHECK(0 <= head && head < heads && cu_tiles[head] <= t && t < cu_tiles[head + 1], "tile %lld in head %d",
            (long long)t, head);
      if (head == segment) continue;
      segment = head;
      const int64_t slot = w + head;
      CHECK(used.insert(slot).second, "slot %lld twice", (long long)slot);
      CHECK(slot > last_slot && slot < kvzip::slots(workers, heads), "slot %lld after %lld", (long long)slot,
            (long long)last_slot);
      last_slot = slot;
      if (first_worker[head] < 0) first_worker[head] = w;
      last_worker[head] = w;
      ++slots_of_head[head];
    }
  }
  CHECK(expected_tile == tiles, "%lld tiles were walked", (long long)expected_tile);
  for (int64_t head = 0; head < heads; ++head) {
    if (cu_tiles[head] == cu_tiles[head + 1]) {
      CHECK(slots_of_head[head] == 0, "an empty head has a segment");
      continue;
    }
    const int64_t first = kvzip::owner(cu_tiles[head], workers, tiles);
    const int64_t last = kvzip::owner(cu_tiles[head + 1] - 1, workers, tiles);
    CHECK(first == first_worker[head] && last == last_worker[head], "head %lld", (long long)head);
    int64_t idle = 0;  // with more workers than tiles, some between them have none
    for (int64_t w = first; w <= last; ++w) {
      idle += kvzip::worker_begin(w, workers, tiles) == kvzip::worker_begin(w + 1, workers, tiles);
    }
    CHECK(idle == 0 || workers > tiles, "%lld idle workers", (long long)idle);
    CHECK(slots_of_head[head] == last - first + 1 - idle, "the workers of head %lld have gaps", (long long)head);
  }
}

void test_schedules() {
  Random random(1);
  for (int round = 0; round < 1500; ++round) {
    const std::vector<int64_t> cu_tiles = tiles_before(random_lengths(random));
    const int64_t workers = between(random, 0, 3) ? between(random, 1, 24) : between(random, 1, 2000);
    if (cu_tiles.back()) check_schedule(cu_tiles, workers);
  }
  check_schedule({0, 0, 0, 1, 1}, 1);
  check_schedule({0, 0, 0, 1, 1}, 7);
  check_schedule({0, 1, 16384, 16384, 16385}, 132);
  for (int64_t length : {0, 1, 63, 64, 65, 127, 128, 129, 1000000}) {
    const int64_t tiles = kvzip::tiles_of(length);
    CHECK(tiles * kvzip::kTile >= length && (tiles - 1) * kvzip::kTile < std::max<int64_t>(length, 1), "%lld keys",
          (long long)length);
  }
}

// Totals beyond 2^31 elements, and tiles beyond 2^31, by arithmetic alone.
void test_large_schedules() {
  Random random(2);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int64_t> lengths(between(random, 1, 128));
    for (int64_t& length : lengths) length = between(random, 0, 1) ? 1000000 : between(random, 0, int64_t{1} << 38);
    const std::vector<int64_t> cu_tiles = tiles_before(lengths);
    const int64_t heads = lengths.size(), tiles = cu_tiles.back(), workers = between(random, 1, 4096);
    if (tiles == 0) continue;
    for (int64_t w : {int64_t{0}, workers / 2, workers - 1, between(random, 0, workers - 1)}) {
      const int64_t begin = kvzip::worker_begin(w, workers, tiles), end = kvzip::worker_begin(w + 1, workers, tiles);
      CHECK(0 <= begin && begin <= end && end <= tiles && end - begin <= tiles / workers + 1, "worker %lld of %lld",
            (long long)w, (long long)workers);
      for (int64_t t : {begin, end - 1}) {
        if (begin == end) continue;
        CHECK(kvzip::owner(t, workers, tiles) == w, "tile %lld of %lld", (long long)t, (long long)tiles);
        const int head = kvzip::head_of(t, cu_tiles.data(), static_cast<int>(heads));
        CHECK(cu_tiles[head] <= t && t < cu_tiles[head + 1], "tile %lld", (long long)t);
      }
    }
  }
  CHECK(kvzip::tiles_of((int64_t{1} << 40) + 1) == (int64_t{1} << 34) + 1, "tiles of a long head");
}

// -- memory that is exactly as large as it must be --------------------------------------------------------------------

int64_t bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void put(DType dtype, float x, void* to) {
  if (dtype == DType::kFloat32) {
    std::memcpy(to, &x, 4);
  } else if (dtype == DType::kBFloat16) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t high = static_cast<uint16_t>(bits >> 16);
    std::memcpy(to, &high, 2);
  } else {
    const Half half = static_cast<Half>(x);
    std::memcpy(to, &half, 2);
  }
}

double get(DType dtype, const void* from) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, from, 4);
    return x;
  }
  if (dtype == DType::kBFloat16) {
    uint16_t high;
    std::memcpy(&high, from, 2);
    const uint32_t bits = static_cast<uint32_t>(high) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  Half half;
  std::memcpy(&half, from, 2);
  return static_cast<float>(half);
}

// A tensor on the heap without a byte to spare, so that the address sanitizer sees what lies beyond.
class Array {
 public:
  Array(DType dtype, int64_t size) : dtype_(dtype), size_(size), data_(new unsigned char[size * bytes_of(dtype)]) {}

  static Array normal(DType dtype, int64_t size, Random& random) {
    Array array(dtype, size);
    std::normal_distribution<float> distribution;
    for (int64_t i = 0; i < size; ++i) array.set(i, distribution(random));
    return array;
  }
  static Array filled(DType dtype, int64_t size, float x) {
    Array array(dtype, size);
    for (int64_t i = 0; i < size; ++i) array.set(i, x);
    return array;
  }

  void set(int64_t i, float x) { put(dtype_, x, data_.get() + i * bytes_of(dtype_)); }
  double at(int64_t i) const { return get(dtype_, data_.get() + i * bytes_of(dtype_)); }
  void* data() { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  DType dtype_;
  int64_t size_;
  std::unique_ptr<unsigned char[]> data_;
};

// -- attention --------------------------------------------------------------------------------------------------------

struct Shape {
  std::vector<int64_t> lengths;  // of the context's heads; total 0 = there is no context
  int64_t batch = 1, groups = 1, q_len = 1, head_dim = 64, v_head_dim = 64, past = 0, spare = 0;
  DType dtype = DType::kFloat32;
  bool masked = false, skipped = false, sinks = false;
  float softcap = 0.0f;
  int64_t workers = 1;
};

std::string name_of(const Shape& s, const char* isa) {
  char text[240];
  std::snprintf(text, sizeof text, "%s: %zu heads x %lld, batch %lld, q_len %lld, dims %lld/%lld, past %lld, dtype %d, "
                "masked %d, skipped %d, workers %lld",
                isa, s.lengths.size(), (long long)s.groups, (long long)s.batch, (long long)s.q_len,
                (long long)s.head_dim, (long long)s.v_head_dim, (long long)s.past, static_cast<int>(s.dtype), s.masked,
                s.skipped, (long long)s.workers);
  return text;
}

struct Problem {
  Shape shape;
  std::vector<int64_t> cu_seqlens{0}, cu_tiles, skip;
  std::vector<uint8_t> mask;
  std::vector<float> sinks, lse;
  Array query, keys, values, tail_keys, tail_values, out;
  Attention a = {};

  Problem(const Shape& s, Random& random)
      : shape(s),
        cu_tiles(tiles_before(s.lengths)),
        query(Array::normal(s.dtype, s.batch * rows(s) * s.head_dim, random)),
        keys(Array::normal(s.dtype, total(s) * s.head_dim, random)),
        values(Array::normal(s.dtype, total(s) * s.v_head_dim, random)),
        tail_keys(Array::filled(s.dtype, tail_rows(s) * s.head_dim, NAN)),
        tail_values(Array::filled(s.dtype, tail_rows(s) * s.v_head_dim, NAN)),
        out(Array::filled(s.dtype, s.batch * rows(s) * s.v_head_dim, NAN)) {
    const int64_t heads = s.lengths.size(), length = s.past + s.q_len, capacity = length + s.spare;
    for (int64_t one : s.lengths) cu_seqlens.push_back(cu_seqlens.back() + one);
    // What is in use of the tail; the rest stays NaN.
    std::normal_distribution<float> normal;
    for (int64_t item = 0; item < s.batch * heads; ++item) {
      for (int64_t j = 0; j < length; ++j) {
        for (int64_t d = 0; d < s.head_dim; ++d) tail_keys.set((item * capacity + j) * s.head_dim + d, normal(random));
        for (int64_t d = 0; d < s.v_head_dim; ++d) {
          tail_values.set((item * capacity + j) * s.v_head_dim + d, normal(random));
        }
      }
    }
    if (s.masked) {
      for (int64_t i = 0; i < total(s); ++i) mask.push_back(between(random, 0, 2) == 0);
    }
    for (int64_t b = 0; s.skipped && b < s.batch; ++b) {
      const int64_t begin = between(random, 0, length - 1);
      skip.insert(skip.end(), {begin, between(random, begin, length - 1)});
    }
    for (int64_t h = 0; s.sinks && h < heads * s.groups; ++h) sinks.push_back(normal(random));
    lse.assign(s.batch * heads * s.groups * s.q_len, NAN);

    a.batch = s.batch, a.num_heads = heads * s.groups, a.num_kv_heads = heads, a.q_len = s.q_len;
    a.head_dim = s.head_dim, a.v_head_dim = s.v_head_dim, a.dtype = s.dtype;
    a.query = query.data();
    // (batch, q_len, num_heads, head_dim) in memory, as a model's projection leaves it.
    a.query_strides[0] = rows(s) * s.head_dim;
    a.query_strides[1] = s.head_dim;
    a.query_strides[2] = a.num_heads * s.head_dim;
    if (total(s)) {
      a.keys = keys.data(), a.values = values.data();
      a.cu_seqlens = cu_seqlens.data(), a.cu_tiles = cu_tiles.data();
      if (s.masked) a.mask = mask.data(), a.mask_stride = s.lengths[0];
    }
    a.tail_keys = tail_keys.data(), a.tail_values = tail_values.data(), a.tail_length = length;
    const int64_t strides[3] = {heads * capacity, capacity, 1};
    for (int i = 0; i < 3; ++i) {
      a.tail_key_strides[i] = strides[i] * s.head_dim;
      a.tail_value_strides[i] = strides[i] * s.v_head_dim;
    }
    a.tail_skip = s.skipped ? skip.data() : nullptr;
    a.scaling = 1.0f / std::sqrt(static_cast<float>(s.head_dim));
    a.softcap = s.softcap;
    a.sinks = s.sinks ? sinks.data() : nullptr;
    a.out = out.data(), a.lse = lse.data();
  }

  static int64_t rows(const Shape& s) { return static_cast<int64_t>(s.lengths.size()) * s.groups * s.q_len; }
  static int64_t tail_rows(const Shape& s) {
    return s.batch * static_cast<int64_t>(s.lengths.size()) * (s.past + s.q_len + s.spare);
  }
  static int64_t total(const Shape& s) {
    int64_t sum = 0;
    for (int64_t one : s.lengths) sum += one;
    return sum;
  }

  double logit(int64_t b, int64_t h, int64_t i, const Array& from, int64_t row) const {
    double sum = 0;
    for (int64_t d = 0; d < a.head_dim; ++d) {
      sum += query.at(b * a.query_strides[0] + h * a.query_strides[1] + i * a.query_strides[2] + d) *
             from.at(row * a.head_dim + d);
    }
    sum *= a.scaling;
    return a.softcap > 0 ? a.softcap * std::tanh(sum / a.softcap) : sum;
  }

  // One row of softmax(q k) v in double: output into `to`, returns the log-sum-exp without the sink.
  double exact(int64_t b, int64_t h, int64_t i, std::vector<double>* to) const {
    const int64_t k = h / a.groups(), capacity = a.tail_length + shape.spare;
    std::vector<std::pair<double, std::pair<const Array*, int64_t>>> seen;
    for (int64_t j = 0; j < shape.lengths[k]; ++j) {
      if (shape.masked && !mask[k * a.mask_stride + j]) continue;
      seen.push_back({logit(b, h, i, keys, cu_seqlens[k] + j), {&values, cu_seqlens[k] + j}});
    }
    for (int64_t j = 0; j <= a.tail_length - a.q_len + i; ++j) {
      if (shape.skipped && skip[2 * b] <= j && j < skip[2 * b + 1]) continue;
      const int64_t row = (b * a.num_kv_heads + k) * capacity + j;
      seen.push_back({logit(b, h, i, tail_keys, row), {&tail_values, row}});
    }
    to->assign(a.v_head_dim, 0.0);
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (const auto& one : seen) top = std::max(top, one.first);
    if (seen.empty()) return top;
    for (const auto& one : seen) sum += std::exp(one.first - top);
    const double lse = top + std::log(sum);
    const double share = shape.sinks ? 1.0 / (1.0 + std::exp(sinks[h] - lse)) : 1.0;
    for (const auto& [x, place] : seen) {
      const double weight = std::exp(x - lse) * share;
      for (int64_t d = 0; d < a.v_head_dim; ++d) (*to)[d] += weight * place.first->at(place.second * a.v_head_dim + d);
    }
    return lse;
  }
};

enum class Order { kForward, kShuffled, kThreads };

void run(const Kernels& kernels, Problem& p, Order order, Random& random) {
  const int64_t workers = p.shape.workers, items = p.a.batch * p.a.num_kv_heads;
  // Not one float more than asked for, and NaN where nobody has written.
  const int64_t floats = kernels.workspace(p.a, workers);
  std::unique_ptr<float[]> space(new float[floats]);
  std::fill_n(space.get(), floats, NAN);
  std::vector<int64_t> turns(workers);
  for (int64_t w = 0; w < workers; ++w) turns[w] = w;
  if (order == Order::kThreads) {
    std::vector<std::thread> threads;
    for (int64_t w : turns) threads.emplace_back([&, w] { kernels.attend(p.a, w, workers, space.get()); });
    for (std::thread& thread : threads) thread.join();
    threads.clear();
    for (int64_t item = 0; item < items; ++item) {
      threads.emplace_back([&, item] { kernels.merge(p.a, workers, space.get(), item, item + 1); });
    }
    for (std::thread& thread : threads) thread.join();
    return;
  }
  if (order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
  for (int64_t w : turns) kernels.attend(p.a, w, workers, space.get());
  kernels.merge(p.a, workers, space.get(), 0, items);
}

void check_attention(const Kernels& kernels, const Shape& shape, uint64_t seed) {
  Random random(seed);
  Problem p(shape, random);
  const std::string name = name_of(shape, kernels.isa);
  run(kernels, p, Order::kForward, random);
  std::vector<double> first, row;
  for (int64_t i = 0; i < p.out.size(); ++i) first.push_back(p.out.at(i));
  const std::vector<float> first_lse = p.lse;
  const double unit = shape.dtype == DType::kFloat32 ? 2e-6 : shape.dtype == DType::kBFloat16 ? 5e-3 : 7e-4;
  double worst = 0, worst_lse = 0;
  for (int64_t b = 0; b < p.a.batch; ++b) {
    for (int64_t h = 0; h < p.a.num_heads; ++h) {
      for (int64_t i = 0; i < p.a.q_len; ++i) {
        const double lse = p.exact(b, h, i, &row), found = p.lse[(b * p.a.num_heads + h) * p.a.q_len + i];
        if (std::isinf(lse)) {
          CHECK(found == lse, "%s: nothing is seen, lse %g", name.c_str(), found);
        } else {
          const double error = std::abs(found - lse) / (1 + std::abs(lse));
          worst_lse = error <= worst_lse ? worst_lse : error;  // NaN counts
        }
        for (int64_t d = 0; d < p.a.v_head_dim; ++d) {
          const double got = p.out.at(((b * p.a.q_len + i) * p.a.num_heads + h) * p.a.v_head_dim + d);
          const double error = std::abs(got - row[d]) / (1 + std::abs(row[d]));
          worst = error <= worst ? worst : error;
        }
      }
    }
  }
  CHECK(worst <= unit, "%s: error %g", name.c_str(), worst);
  CHECK(worst_lse <= 2e-6, "%s: error of lse %g", name.c_str(), worst_lse);
  for (Order order : {Order::kShuffled, Order::kThreads}) {
    std::fill(p.lse.begin(), p.lse.end(), NAN);
    run(kernels, p, order, random);
    bool same = std::memcmp(first_lse.data(), p.lse.data(), p.lse.size() * sizeof(float)) == 0;
    for (int64_t i = 0; i < p.out.size(); ++i) same = same && p.out.at(i) == first[i];
    CHECK(same, "%s: another result in another order", name.c_str());
  }
}

void test_attention(const Kernels& kernels) {
  const std::vector<std::vector<int64_t>> contexts = {
      {0, 0}, {1, 1}, {64, 64}, {97, 97}, {0, 300, 1}, {65, 0, 0, 130}, {3, 0, 700, 1, 0}, {128}};
  Random random(3);
  for (int round = 0; round < 90; ++round) {
    Shape s;
    s.lengths = contexts[between(random, 0, contexts.size() - 1)];
    s.batch = between(random, 1, 3);
    s.groups = between(random, 1, 7);
    s.q_len = between(random, 0, 1) ? 1 : between(random, 2, 9);
    s.head_dim = between(random, 1, 17) * 8;
    s.v_head_dim = between(random, 0, 2) ? s.head_dim : between(random, 1, 17) * 8;
    s.past = between(random, 0, 1) ? 0 : between(random, 1, 140);
    s.spare = between(random, 0, 3);
    s.dtype = static_cast<DType>(round % 3);
    s.masked = s.lengths.front() == s.lengths.back() && s.lengths.size() <= 2 && between(random, 0, 1);
    s.skipped = between(random, 0, 2) == 0;
    s.sinks = between(random, 0, 3) == 0;
    s.softcap = between(random, 0, 3) == 0 ? 3.0f : 0.0f;
    s.workers = between(random, 1, 9);
    check_attention(kernels, s, 100 + round);
  }
  // More rows than pass over a tile together, and more workers than tiles.
  Shape many;
  many.lengths = {70, 0, 140};
  many.groups = 16, many.q_len = 9, many.batch = 2, many.head_dim = many.v_head_dim = 16, many.workers = 33;
  check_attention(kernels, many, 99);
}

// -- column maxima ----------------------------------------------------------------------------------------------------

void check_column_max(const Kernels& kernels, DType dtype, int64_t kv_heads, int64_t groups, int64_t q_len,
                      int64_t kv_len, int64_t head_dim, float softcap, uint64_t seed) {
  Random random(seed);
  const int64_t heads = kv_heads * groups;
  Array query = Array::normal(dtype, heads * q_len * head_dim, random);
  Array keys = Array::normal(dtype, kv_heads * kv_len * head_dim, random);
  Array lse = Array::normal(DType::kFloat32, heads * q_len, random);
  std::unique_ptr<float[]> out(new float[heads * kv_len]);
  std::fill_n(out.get(), heads * kv_len, NAN);
  ColumnMax c = {};
  c.num_heads = heads, c.num_kv_heads = kv_heads, c.q_len = q_len, c.kv_len = kv_len, c.head_dim = head_dim;
  c.dtype = dtype, c.query = query.data(), c.keys = keys.data(), c.lse = static_cast<const float*>(lse.data());
  c.query_strides[0] = head_dim, c.query_strides[1] = heads * head_dim;  // (q_len, num_heads, head_dim) in memory
  c.key_strides[0] = kv_len * head_dim, c.key_strides[1] = head_dim;
  c.scaling = 0.21f, c.softcap = softcap, c.out = out.get();
  const int64_t items = kv_heads * kvzip::tiles_of(kv_len);
  std::vector<std::thread> threads;
  for (int64_t item = 0; item < items; ++item) {
    threads.emplace_back([&, item] { kernels.column_max(c, item, item + 1); });
  }
  for (std::thread& thread : threads) thread.join();
  double worst = 0;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t j = 0; j < kv_len; ++j) {
      double top = -std::numeric_limits<double>::infinity();
      for (int64_t i = 0; i < q_len; ++i) {
        double x = 0;
        for (int64_t d = 0; d < head_dim; ++d) {
          x += query.at(h * head_dim + i * heads * head_dim + d) * keys.at((h / groups * kv_len + j) * head_dim + d);
        }
        x *= c.scaling;
        if (softcap > 0) x = softcap * std::tanh(x / softcap);
        top = std::max(top, x - lse.at(h * q_len + i));
      }
      const double error = std::abs(out[h * kv_len + j] - top) / (1 + std::abs(top));
      worst = error <= worst ? worst : error;
    }
  }
  CHECK(worst <= 5e-6, "%s: column_max of %lld x %lld, dim %lld, dtype %d: error %g", kernels.isa, (long long)q_len,
        (long long)kv_len, (long long)head_dim, static_cast<int>(dtype), worst);
}

void test_column_max(const Kernels& kernels) {
  uint64_t seed = 500;
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (int64_t kv_len : {1, 63, 64, 65, 200}) {
      for (int64_t q_len : {1, 5, 33}) {
        check_column_max(kernels, dtype, 2, 3, q_len, kv_len, q_len == 5 ? 20 : 64, kv_len == 65 ? 2.0f : 0.0f, ++seed);
      }
    }
  }
}

}  // namespace

int main() {
  test_schedules();
  test_large_schedules();
  std::string names;
  for (const char* isa : {"avx512", "avx2", "generic"}) {
    const Kernels* kernels = kvzip::cpu_kernels(isa);
    if (kernels == nullptr) continue;
    CHECK(std::strcmp(kernels->isa, isa) == 0, "asked for %s, got %s", isa, kernels->isa);
    names += std::string(" ") + isa;
    test_attention(*kernels);
    test_column_max(*kernels);
  }
  CHECK(kvzip::cpu_kernels("generic") != nullptr, "every processor has the generic kernels");
  CHECK(kvzip::cpu_kernels("no such") == nullptr, "an unknown instruction set");
  CHECK(kvzip::cpu_kernels() != nullptr, "there is a best one");
  std::printf("%d of %d checks failed; instruction sets:%s\n", failures, checks, names.c_str());
  return failures == 0 ? 0 : 1;
}
