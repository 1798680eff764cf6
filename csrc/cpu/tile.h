// One tile of up to kTile keys and a few query rows: logits, softmax, weighted sum of values; in one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvzip/attention.h"
#include "simd.h"

namespace kvzip {
namespace KVZIP_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Up to kTile keys and values: base pointers, strides and the rows that are visible.
template <class T>
struct Tile {
  const T* keys;
  const T* values;
  int64_t key_stride, value_stride;
  int count;
  int32_t row[kTile];
  const T* next_keys;  // of the tile that comes after this one, or nullptr

  const T* key(int i) const { return keys + row[i] * key_stride; }
  const T* value(int i) const { return values + row[i] * value_stride; }
};

// Ask for a row that is needed soon. Rows are too short for the processor to see a stream by itself.
template <class T>
inline void fetch(const T* row, int64_t elements) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < elements; i += kLine) __builtin_prefetch(row + i, 0, 2);
}

inline Vec softcapped(Vec x, float softcap) { return tanh_of(x / softcap) * softcap; }

// What quantised keys and values leave to be done beside their codes: with keys c * scale + zero, query . zero is the
// same for all keys of a tile; with values c * scale + zero, each weight is scaled and its share of zero added.
struct Fold {
  float bias[kRows];   // query . zero of each row
  const float* scale;  // of each of the tile's values, kTile of them
  const float* zero;
};

// fold->bias of each row, for `kKeys` keys.
template <int kKeys>
inline Vec row_bias(const Fold* fold) {
  Vec bias = {};
  if (fold != nullptr) {
    for (int i = 0; i < kLanes; ++i) bias[i] = fold->bias[i / kKeys];
  }
  return bias;
}

// Write the logits of kLanes / kKeys rows and the keys from `k` on.
template <int kKeys>
inline void store_logits(Vec sum, float softcap, int k, float (*s)[kTile]) {
  if (softcap > 0) sum = softcapped(sum, softcap);
  float lanes[kLanes];
  store(lanes, sum);
  for (int r = 0; r < kLanes / kKeys; ++r) std::memcpy(&s[r][k], lanes + r * kKeys, kKeys * sizeof(float));
}

// Logits of kSome packed query rows with the tile's keys: s[row][key], kTile columns. The query is already scaled.
// With `first`, these are the first rows to see the tile, and its values are fetched on the way.
template <int kSome, class T>
void logits(const float* query, int64_t head_dim, int64_t v_head_dim, const Tile<T>& tile, bool first, float softcap,
            const Fold* fold, float (*s)[kTile]) {
  constexpr int kKeys = kLanes / kSome;
  const Vec bias = row_bias<kKeys>(fold);
  const int64_t width = padded(head_dim, kLanes), whole = head_dim / kLanes * kLanes;
  for (int k = 0; k < tile.count; k += kKeys) {
    const T* key[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      const int i = std::min(k + j, tile.count - 1);
      key[j] = tile.key(i);
      if (first) fetch(tile.value(i), v_head_dim);
    }
    Vec acc[kSome][kKeys];
    clear(acc);
    for (int64_t d = 0; d < whole; d += kLanes) {
      Vec kv[kKeys];
      KVZIP_UNROLLED(j, kKeys) kv[j] = load(key[j] + d);
      KVZIP_UNROLLED(r, kSome) {
        const Vec q = load(query + r * width + d);
        KVZIP_UNROLLED(j, kKeys) acc[r][j] += q * kv[j];
      }
    }
    if (whole < head_dim) {
      KVZIP_UNROLLED(j, kKeys) {
        const Vec kv = load_part(key[j] + whole, static_cast<int>(head_dim - whole));
        KVZIP_UNROLLED(r, kSome) acc[r][j] += load(query + r * width + whole) * kv;
      }
    }
    store_logits<kKeys>(sums(acc) + bias, softcap, k, s);
  }
}

// Turn a row's logits into weights, in place, and fold them into its running maximum and sum; returns what the old
// output is worth now.
inline float softmax(float* s, int visible, float* maximum_, float* sum_) {
  Vec top = broadcast(-kInfinity);
  for (int k = 0; k < kTile; k += kLanes) {
    const Vec x = select(lane_index() + k < visible, load(s + k), broadcast(-kInfinity));
    store(s + k, x);
    top = maximum(top, x);
  }
  const float before = *maximum_, now = maximum(before, max_of(top));
  const float pivot = now == -kInfinity ? 0.0f : now;
  Vec total = {};
  for (int k = 0; k < kTile; k += kLanes) {
    const Vec p = exp_negative(load(s + k) - pivot);
    store(s + k, p);
    total += p;
  }
  const float keep = before == -kInfinity ? 0.0f : std::exp(before - pivot);
  *maximum_ = now;
  *sum_ = *sum_ * keep + sum_of(total);
  return keep;
}

// What becomes of a group of rows' old outputs: out = keep * out + shift + the tile's part.
struct Update {
  float keep[kRows];
  float shift[kRows] = {};
};

// Scale a row's weights as the values' codes want it; returns the part of the output that is the same in all channels.
inline float fold_values(float* s, const Fold& fold) {
  Vec shift = {};
  for (int k = 0; k < kTile; k += kLanes) {
    const Vec weight = load(s + k);
    shift += weight * load(fold.zero + k);
    store(s + k, weight * load(fold.scale + k));
  }
  return sum_of(shift);
}

// out[row] = keep[row] * out[row] + shift[row] + sum over keys of s[row][key] * value[key]. A `part` is of one vector.
template <int kSome, int kBlock, class T>
void accumulate_block(const float (*s)[kTile], const Update& update, const Tile<T>& tile, int64_t fetched, int64_t d,
                      int part, float* out, int64_t record) {
  Vec acc[kSome][kBlock];  // of this tile alone: one sum of thousands of keys would lose much to rounding
  clear(acc);
  for (int k = 0; k < tile.count; ++k) {
    const T* value = tile.value(k) + d;
    if (fetched) fetch(tile.next_keys + k * tile.key_stride, fetched);
    KVZIP_UNROLLED(j, kBlock) {
      const Vec v = kBlock == 1 && part ? load_part(value, part) : load(value + j * kLanes);
      KVZIP_UNROLLED(r, kSome) acc[r][j] += v * s[r][k];
    }
  }
  KVZIP_UNROLLED(r, kSome) {
    KVZIP_UNROLLED(j, kBlock) {
      float* at = out + r * record + d + j * kLanes;
      store(at, load(at) * update.keep[r] + (acc[r][j] + update.shift[r]));
    }
  }
}

// The channels from `d` on, in blocks of kBlock vectors, then of half as many, and so on.
template <int kSome, int kBlock, class T>
void accumulate_from(int64_t d, const float (*s)[kTile], const Update& update, const Tile<T>& tile, int64_t fetched,
                     int64_t v_head_dim, float* out, int64_t record) {
  for (; d + kBlock * kLanes <= v_head_dim; d += kBlock * kLanes) {
    accumulate_block<kSome, kBlock>(s, update, tile, d ? 0 : fetched, d, 0, out, record);
  }
  if constexpr (kBlock > 1) {
    accumulate_from<kSome, kBlock / 2>(d, s, update, tile, fetched, v_head_dim, out, record);
  } else if (d < v_head_dim) {
    const int part = static_cast<int>(v_head_dim - d);
    accumulate_block<kSome, 1>(s, update, tile, d ? 0 : fetched, d, part, out, record);
  }
}

// `fetched` elements of each key of the next tile are fetched on the way.
template <int kSome, class T>
void accumulate(const float (*s)[kTile], const Update& update, const Tile<T>& tile, int64_t fetched, int64_t v_head_dim,
                float* out, int64_t record) {
  accumulate_from<kSome, kAccumulators / kSome>(0, s, update, tile, fetched, v_head_dim, out, record);
}

// Running results of a segment's rows, [v_head_dim outputs, maximum, sum] each; kRows more than `rows` are written.
class Rows {
 public:
  Rows(int64_t rows, int64_t v_head_dim, int64_t record)
      : rows_(rows), dim_(v_head_dim), record_(record), buffer_(scratch().zeros(padded(rows, kRows) * record)) {
    for (int64_t r = 0; r < padded(rows, kRows); ++r) at(r)[record - 2] = -kInfinity;
  }

  // Pass the rows from `begin` on, a group of kRows or the last ones, over a tile; row r sees the first visible(r) of
  // its keys. `query` is that of the group; `fold` belongs to quantised tiles.
  template <class T, class Visible>
  void pass(int64_t begin, const float* query, int64_t head_dim, const Tile<T>& tile, bool first, float softcap,
            Visible visible, const Fold* fold = nullptr) {
    if (rows_ - begin > kFewer) {
      pass_some<kRows>(begin, query, head_dim, tile, first, softcap, visible, fold);
    } else {
      pass_some<kFewer>(begin, query, head_dim, tile, first, softcap, visible, fold);
    }
  }

  void copy_to(float* slot) const { std::memcpy(slot, buffer_, rows_ * record_ * sizeof(float)); }

 private:
  template <int kSome, class T, class Visible>
  void pass_some(int64_t begin, const float* query, int64_t head_dim, const Tile<T>& tile, bool first, float softcap,
                 Visible visible, const Fold* fold) {
    alignas(64) float s[kSome][kTile];
    Update update;
    logits<kSome>(query, head_dim, dim_, tile, first, softcap, fold, s);
    for (int r = 0; r < kSome; ++r) {
      float* row = at(begin + r);
      update.keep[r] = softmax(s[r], visible(begin + r), row + record_ - 2, row + record_ - 1);
      if (fold != nullptr) update.shift[r] = fold_values(s[r], *fold);
    }
    accumulate<kSome>(s, update, tile, first && tile.next_keys ? head_dim : 0, dim_, at(begin), record_);
  }

  static Scratch& scratch() {
    static thread_local Scratch scratch;
    return scratch;
  }
  float* at(int64_t r) { return buffer_ + r * record_; }

  int64_t rows_, dim_, record_;
  float* buffer_;
};

}  // namespace KVZIP_ISA
}  // namespace kvzip
