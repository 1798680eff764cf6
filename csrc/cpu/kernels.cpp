// The CPU kernels, compiled once for each instruction set.
//
// Rows: query head h = k * G + g and token i of batch row b are row (b * G + g) * q_len + i of KV head k, so that every
// key and value is read once for all rows that want it. A tile of up to 64 keys is a list of row offsets: masked keys
// are left out of it and cost nothing.

#include <algorithm>
#include <cmath>

#include "kvzip/attention.h"
#include "quantized.h"
#include "tile.h"

namespace kvzip {
namespace KVZIP_ISA {
namespace {

constexpr int64_t kMostRows = 256;  // rows that pass over a tile together; their outputs stay in the L2 cache

// Where the parts of a workspace lie. A partial result is head_rows * (batch or 1) rows of
// [v_head_dim unnormalised outputs, maximum, sum].
struct Layout {
  int64_t context_workers, quantized_workers, tail_workers;  // the ones that have a share of the tiles
  int64_t context_rows, tail_rows, record, context_slots, quantized_slots;

  explicit Layout(const Attention& a, int64_t workers)
      : context_workers(active(workers, a.context_tiles())),
        quantized_workers(active(workers, a.quantized_tiles())),
        tail_workers(active(workers, a.tail_tiles())),
        context_rows(a.batch * a.head_rows()),
        tail_rows(a.head_rows()),
        record(padded(a.v_head_dim, kLanes) + kLanes),
        context_slots(a.context_tiles() ? slots(context_workers, a.num_kv_heads) : 0),
        quantized_slots(a.quantized_tiles() ? slots(quantized_workers, a.num_kv_heads) : 0) {}

  float* context(float* base, int64_t slot) const { return base + slot * context_rows * record; }
  float* quantized(float* base, int64_t slot) const { return context(base, context_slots + slot); }
  float* tail(float* base, int64_t slot) const {
    return context(base, context_slots + quantized_slots) + slot * tail_rows * record;
  }
  int64_t floats(const Attention& a) const {
    const int64_t tail_slots = slots(tail_workers, a.batch * a.num_kv_heads);
    return ((context_slots + quantized_slots) * context_rows + tail_slots * tail_rows) * record;
  }
};

// The query rows of one KV head as scaled floats, padded with zeros to whole vectors and whole groups of kRows.
template <class T>
const float* pack_query(const Attention& a, int64_t kv_head, int64_t b_begin, int64_t b_end) {
  static thread_local Scratch scratch;
  const int64_t width = padded(a.head_dim, kLanes), rows = (b_end - b_begin) * a.head_rows();
  float* packed = scratch.zeros(padded(rows, kRows) * width);
  float* to = packed;
  for (int64_t b = b_begin; b < b_end; ++b) {
    for (int64_t g = 0; g < a.groups(); ++g) {
      const T* head = static_cast<const T*>(a.query) + b * a.query_strides[0] +
                      (kv_head * a.groups() + g) * a.query_strides[1];
      for (int64_t i = 0; i < a.q_len; ++i, to += width) {
        for (int64_t d = 0; d < a.head_dim; ++d) to[d] = to_float(head[i * a.query_strides[2] + d]) * a.scaling;
      }
    }
  }
  return packed;
}

template <class T>
void attend_context(const Attention& a, int64_t worker, const Layout& layout, float* workspace) {
  const int64_t width = padded(a.head_dim, kLanes);
  const int64_t tiles = a.context_tiles(), workers = layout.context_workers;
  const int64_t end = worker_begin(worker + 1, workers, tiles);
  for (int64_t t = worker_begin(worker, workers, tiles); t < end;) {
    const int head = head_of(t, a.cu_tiles, static_cast<int>(a.num_kv_heads));
    const int64_t stop = std::min(end, a.cu_tiles[head + 1]);
    const int64_t start = a.cu_seqlens[head], length = a.cu_seqlens[head + 1] - start;
    const float* query = pack_query<T>(a, head, 0, a.batch);
    Rows rows(layout.context_rows, a.v_head_dim, layout.record);
    for (int64_t block = 0; block < layout.context_rows; block += kMostRows) {
      const int64_t block_end = std::min(layout.context_rows, block + kMostRows);
      for (int64_t at = t; at < stop; ++at) {
        const int64_t first = (at - a.cu_tiles[head]) * kTile;
        const int count = static_cast<int>(std::min<int64_t>(kTile, length - first));
        Tile<T> tile;
        tile.keys = static_cast<const T*>(a.keys) + (start + first) * a.head_dim;
        tile.values = static_cast<const T*>(a.values) + (start + first) * a.v_head_dim;
        tile.key_stride = a.head_dim;
        tile.value_stride = a.v_head_dim;
        tile.count = 0;
        for (int k = 0; k < count; ++k) {
          if (a.mask == nullptr || a.mask[head * a.mask_stride + first + k]) tile.row[tile.count++] = k;
        }
        if (tile.count == 0) continue;
        const bool full_next = at + 1 < stop && first + 2 * kTile <= length;
        tile.next_keys = full_next ? tile.keys + kTile * a.head_dim : nullptr;
        const auto all = [&](int64_t) { return tile.count; };
        for (int64_t r = block; r < block_end; r += kRows) {
          rows.pass(r, query + r * width, a.head_dim, tile, r == block, a.softcap, all);
        }
      }
    }
    rows.copy_to(layout.context(workspace, worker + head));
    t = stop;
  }
}

template <class T>
void attend_quantized(const Attention& a, int64_t worker, const Layout& layout, float* workspace) {
  const Quantized& quantized = a.quantized;
  const int64_t tiles = a.quantized_tiles(), workers = layout.quantized_workers;
  const int64_t width = padded(a.head_dim, kLanes), end = worker_begin(worker + 1, workers, tiles);
  static thread_local QuantizedTile tile;
  for (int64_t t = worker_begin(worker, workers, tiles); t < end;) {
    const int head = head_of(t, quantized.cu_tiles, static_cast<int>(a.num_kv_heads));
    const int64_t stop = std::min(end, quantized.cu_tiles[head + 1]);
    const float* query = pack_query<T>(a, head, 0, a.batch);
    Rows rows(layout.context_rows, a.v_head_dim, layout.record);
    for (int64_t block = 0; block < layout.context_rows; block += kMostRows) {
      const int64_t block_end = std::min(layout.context_rows, block + kMostRows);
      for (int64_t at = t; at < stop; ++at) {
        if (!tile.open(quantized, head, at, a.head_dim, a.v_head_dim, at + 1 < stop)) continue;
        const auto all = [&](int64_t) { return tile.codes.count; };
        for (int64_t r = block; r < block_end; r += kRows) {
          const Fold fold = tile.fold(query + r * width, a.head_dim);
          if (quantized.bits == 4) {
            rows.pass(r, tile.query(), a.head_dim, tile.nibbles(), r == block, a.softcap, all, &fold);
          } else {
            rows.pass(r, tile.query(), a.head_dim, tile.codes, r == block, a.softcap, all, &fold);
          }
        }
      }
    }
    rows.copy_to(layout.quantized(workspace, worker + head));
    t = stop;
  }
}

template <class T>
void attend_tail(const Attention& a, int64_t worker, const Layout& layout, float* workspace) {
  const int64_t workers = layout.tail_workers, width = padded(a.head_dim, kLanes);
  const int64_t per_item = tiles_of(a.tail_length), tiles = a.tail_tiles(), past = a.tail_length - a.q_len;
  const int64_t end = worker_begin(worker + 1, workers, tiles);
  for (int64_t t = worker_begin(worker, workers, tiles); t < end;) {
    const int64_t item = t / per_item, b = item / a.num_kv_heads, head = item % a.num_kv_heads;
    const int64_t stop = std::min(end, (item + 1) * per_item);
    const float* query = pack_query<T>(a, head, b, b + 1);
    Rows rows(layout.tail_rows, a.v_head_dim, layout.record);
    const T* keys = static_cast<const T*>(a.tail_keys) + b * a.tail_key_strides[0] + head * a.tail_key_strides[1];
    const T* values =
        static_cast<const T*>(a.tail_values) + b * a.tail_value_strides[0] + head * a.tail_value_strides[1];
    for (; t < stop; ++t) {
      const int64_t first = (t - item * per_item) * kTile;
      const int count = static_cast<int>(std::min<int64_t>(kTile, a.tail_length - first));
      Tile<T> tile;
      tile.keys = keys + first * a.tail_key_strides[2];
      tile.values = values + first * a.tail_value_strides[2];
      tile.key_stride = a.tail_key_strides[2];
      tile.value_stride = a.tail_value_strides[2];
      tile.count = 0;
      tile.next_keys = nullptr;
      for (int k = 0; k < count; ++k) {
        const int64_t j = first + k;
        const bool skipped = a.tail_skip != nullptr && a.tail_skip[2 * b] <= j && j < a.tail_skip[2 * b + 1];
        if (!skipped) tile.row[tile.count++] = k;
      }
      if (tile.count == 0) continue;
      const auto causal = [&](int64_t r) {
        const int64_t limit = past + r % a.q_len - first;  // the last of the tile's keys that this row may see
        if (limit >= kTile - 1) return tile.count;
        int visible = 0;
        while (visible < tile.count && tile.row[visible] <= limit) ++visible;
        return visible;
      };
      for (int64_t r = 0; r < layout.tail_rows; r += kRows) {
        bool any = false;
        for (int i = 0; i < kRows; ++i) any = any || causal(r + i) > 0;
        if (!any) continue;
        rows.pass(r, query + r * width, a.head_dim, tile, false, a.softcap, causal);
      }
    }
    rows.copy_to(layout.tail(workspace, worker + item));
  }
}

template <class T>
void attend_typed(const Attention& a, int64_t worker, int64_t workers, float* workspace) {
  const Layout layout(a, workers);
  if (worker < layout.context_workers) attend_context<T>(a, worker, layout, workspace);
  if (worker < layout.quantized_workers) attend_quantized<T>(a, worker, layout, workspace);
  if (worker < layout.tail_workers) attend_tail<T>(a, worker, layout, workspace);
}

// Merge the records at `first`, `stride` floats apart, `count` of them, into `sum` of the same form.
void merge_records(const float* first, int64_t stride, int64_t count, int64_t record, float* sum) {
  for (int64_t c = 0; c < count; ++c) {
    const float* from = first + c * stride;
    const float theirs = from[record - 2], ours = sum[record - 2];
    if (theirs == -kInfinity) continue;
    const float top = maximum(ours, theirs);
    const float scale_ours = ours == -kInfinity ? 0.0f : std::exp(ours - top), scale_theirs = std::exp(theirs - top);
    for (int64_t d = 0; d < record - kLanes; d += kLanes) {
      store(sum + d, load(sum + d) * scale_ours + load(from + d) * scale_theirs);
    }
    sum[record - 2] = top;
    sum[record - 1] = sum[record - 1] * scale_ours + from[record - 1] * scale_theirs;
  }
}

template <class T>
void merge_typed(const Attention& a, int64_t workers, const float* workspace, int64_t begin, int64_t end) {
  const Layout layout(a, workers);
  float* base = const_cast<float*>(workspace);
  const int64_t context_tiles = a.context_tiles(), quantized_tiles = a.quantized_tiles();
  const int64_t tail_tiles = a.tail_tiles(), per_item = tiles_of(a.tail_length);
  static thread_local Scratch scratch;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.num_kv_heads, head = item % a.num_kv_heads;
    for (int64_t r = 0; r < a.head_rows(); ++r) {
      float* sum = scratch.zeros(layout.record);
      sum[layout.record - 2] = -kInfinity;
      if (context_tiles && a.cu_tiles[head] < a.cu_tiles[head + 1]) {
        const int64_t first = owner(a.cu_tiles[head], layout.context_workers, context_tiles);
        const int64_t last = owner(a.cu_tiles[head + 1] - 1, layout.context_workers, context_tiles);
        const float* record = layout.context(base, first + head) + (b * layout.tail_rows + r) * layout.record;
        merge_records(record, layout.context_rows * layout.record, last - first + 1, layout.record, sum);
      }
      if (quantized_tiles && a.quantized.cu_tiles[head] < a.quantized.cu_tiles[head + 1]) {
        const int64_t first = owner(a.quantized.cu_tiles[head], layout.quantized_workers, quantized_tiles);
        const int64_t last = owner(a.quantized.cu_tiles[head + 1] - 1, layout.quantized_workers, quantized_tiles);
        const float* record = layout.quantized(base, first + head) + (b * layout.tail_rows + r) * layout.record;
        merge_records(record, layout.context_rows * layout.record, last - first + 1, layout.record, sum);
      }
      const int64_t first = owner(item * per_item, layout.tail_workers, tail_tiles);
      const int64_t last = owner((item + 1) * per_item - 1, layout.tail_workers, tail_tiles);
      const float* record = layout.tail(base, first + item) + r * layout.record;
      merge_records(record, layout.tail_rows * layout.record, last - first + 1, layout.record, sum);

      const int64_t query_head = head * a.groups() + r / a.q_len, i = r % a.q_len;
      const float top = sum[layout.record - 2], total = sum[layout.record - 1];
      const float lse = top == -kInfinity ? top : top + std::log(total);
      a.lse[(b * a.num_heads + query_head) * a.q_len + i] = lse;
      float scale = top == -kInfinity ? 0.0f : 1.0f / total;
      if (a.sinks != nullptr) scale /= 1.0f + std::exp(a.sinks[query_head] - lse);
      T* out = static_cast<T*>(a.out) + ((b * a.q_len + i) * a.num_heads + query_head) * a.v_head_dim;
      for (int64_t d = 0; d < a.v_head_dim; ++d) from_float(sum[d] * scale, out + d);
    }
  }
}

template <class Function>
void by_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(float{});
    case DType::kBFloat16:
      return function(bfloat16{});
    case DType::kFloat16:
      return function(float16{});
  }
}

int64_t workspace(const Attention& a, int64_t workers) { return Layout(a, workers).floats(a); }

void attend(const Attention& a, int64_t worker, int64_t workers, float* space) {
  by_type(a.dtype, [&](auto x) { attend_typed<decltype(x)>(a, worker, workers, space); });
}

void merge(const Attention& a, int64_t workers, const float* space, int64_t begin, int64_t end) {
  by_type(a.dtype, [&](auto x) { merge_typed<decltype(x)>(a, workers, space, begin, end); });
}

}  // namespace

void column_max(const ColumnMax& c, int64_t begin, int64_t end);

extern const Kernels kKernels;

#define KVZIP_TEXT_(x) #x
#define KVZIP_TEXT(x) KVZIP_TEXT_(x)
const Kernels kKernels = {KVZIP_TEXT(KVZIP_ISA), workspace, attend, merge, column_max};

}  // namespace KVZIP_ISA
}  // namespace kvzip
