// The pass behind KVzip's scores, compiled once for each instruction set: a matrix product whose entries are reduced
// to column maxima while they are in registers.

#include <algorithm>
#include <limits>

#include "kvzip/attention.h"
#include "simd.h"

namespace kvzip {
namespace KVZIP_ISA {
namespace {

constexpr int kBlock = 4;                // vectors of keys that are held in registers
constexpr int kWidth = kBlock * kLanes;  // keys
constexpr int kTogether = kLanes / 4;    // queries whose products are in registers at a time

// `count` keys as floats, transposed: (head_dim, kWidth).
template <class T>
void transpose_keys(const T* keys, int64_t stride, int count, int64_t head_dim, float* to) {
  for (int k = 0; k < count; ++k) {
    for (int64_t d = 0; d < head_dim; ++d) to[d * kWidth + k] = to_float(keys[k * stride + d]);
  }
}

template <class T>
void block_max(const ColumnMax& c, int64_t kv_head, int64_t first, int count) {
  static thread_local Scratch key_scratch, row_scratch;
  float* keys = key_scratch.zeros(c.head_dim * kWidth);
  float* rows = row_scratch.zeros(kTogether * c.head_dim);
  const T* from = static_cast<const T*>(c.keys) + kv_head * c.key_strides[0] + first * c.key_strides[1];
  transpose_keys(from, c.key_strides[1], count, c.head_dim, keys);
  const int64_t groups = c.num_heads / c.num_kv_heads;
  for (int64_t head = kv_head * groups; head < (kv_head + 1) * groups; ++head) {
    Vec top[kBlock];
    for (Vec& vector : top) vector = broadcast(-std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < c.q_len; i += kTogether) {
      const int64_t present = std::min<int64_t>(kTogether, c.q_len - i);
      for (int64_t r = 0; r < present; ++r) {
        const T* query = static_cast<const T*>(c.query) + head * c.query_strides[0] + (i + r) * c.query_strides[1];
        float* row = rows + r * c.head_dim;
        int64_t d = 0;
        for (; d + kLanes <= c.head_dim; d += kLanes) store(row + d, load(query + d) * c.scaling);
        for (; d < c.head_dim; ++d) row[d] = to_float(query[d]) * c.scaling;
      }
      Vec acc[kTogether][kBlock];
      clear(acc);
      for (int64_t d = 0; d < c.head_dim; ++d) {
        Vec key[kBlock];
        KVZIP_UNROLLED(j, kBlock) key[j] = load(keys + d * kWidth + j * kLanes);
        KVZIP_UNROLLED(r, kTogether) {
          const float q = rows[r * c.head_dim + d];
          KVZIP_UNROLLED(j, kBlock) acc[r][j] += key[j] * q;
        }
      }
      for (int64_t r = 0; r < present; ++r) {
        const float lse = c.lse[head * c.q_len + i + r];
        KVZIP_UNROLLED(j, kBlock) {
          const Vec x = c.softcap > 0 ? tanh_of(acc[r][j] / c.softcap) * c.softcap : acc[r][j];
          top[j] = maximum(x - lse, top[j]);
        }
      }
    }
    float lanes[kWidth];
    KVZIP_UNROLLED(j, kBlock) store(lanes + j * kLanes, top[j]);
    std::memcpy(c.out + head * c.kv_len + first, lanes, count * sizeof(float));
  }
}

}  // namespace

void column_max(const ColumnMax& c, int64_t begin, int64_t end) {
  const int64_t per_head = tiles_of(c.kv_len);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t start = item % per_head * kTile, stop = std::min(start + kTile, c.kv_len);
    for (int64_t first = start; first < stop; first += kWidth) {
      const int count = static_cast<int>(std::min<int64_t>(kWidth, stop - first));
      switch (c.dtype) {
        case DType::kFloat32:
          block_max<float>(c, item / per_head, first, count);
          break;
        case DType::kBFloat16:
          block_max<bfloat16>(c, item / per_head, first, count);
          break;
        case DType::kFloat16:
          block_max<float16>(c, item / per_head, first, count);
          break;
      }
    }
  }
}

}  // namespace KVZIP_ISA
}  // namespace kvzip
