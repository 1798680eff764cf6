// A tile of quantised keys and values, made ready for `Rows::pass`: codes as bytes, scales and zeros folded into queries
// and weights, so that nothing is turned back into floats but the codes, in registers.
#pragma once

#include "kvzip/attention.h"
#include "simd.h"
#include "tile.h"

namespace kvzip {
namespace KVZIP_ISA {

// Split the halves of `rows` rows of `width` channels into bytes.
inline void unpack4(const uint8_t* __restrict from, int64_t rows, int64_t width, uint8_t* __restrict to) {
  const int64_t half = width / 2;
  for (int64_t row = 0; row < rows; ++row, from += half, to += width) {
    for (int64_t j = 0; j < half; ++j) to[j] = from[j] & 15;
    for (int64_t j = 0; j < half; ++j) to[half + j] = from[j] >> 4;
  }
}

class QuantizedTile {
 public:
  Tile<uint8_t> codes;

  // Make tile `t`, of `head`, ready; `more` says whether the tile after it is wanted next. False: no key is visible.
  bool open(const Quantized& q, int head, int64_t t, int64_t head_dim, int64_t v_head_dim, bool more) {
    const int64_t first = (t - q.cu_tiles[head]) * kTile, length = q.cu_seqlens[head + 1] - q.cu_seqlens[head];
    const int64_t row = q.cu_seqlens[head] + first;
    const int count = static_cast<int>(length - first < kTile ? length - first : kTile);
    const int64_t key_bytes = head_dim * q.bits / 8, value_bytes = v_head_dim * q.bits / 8;
    codes.count = 0;
    for (int k = 0; k < count; ++k) {
      if (q.mask == nullptr || q.mask[head * q.mask_stride + first + k]) codes.row[codes.count++] = k;
    }
    if (codes.count == 0) return false;
    codes.keys = q.key_codes + row * key_bytes;
    codes.values = q.value_codes + row * value_bytes;
    codes.key_stride = head_dim;
    codes.value_stride = v_head_dim;
    codes.next_keys = more && first + 2 * kTile <= length ? codes.keys + kTile * key_bytes : nullptr;
    if (q.bits == 4) {
      if (codes.next_keys != nullptr) {
        fetch(codes.next_keys, kTile * key_bytes);
        fetch(codes.values + kTile * value_bytes, kTile * value_bytes);
      }
      auto* bytes = reinterpret_cast<uint8_t*>(unpacked_.get(kTile * (head_dim + v_head_dim) / 4));
      unpack4(codes.keys, count, head_dim, bytes);
      unpack4(codes.values, count, v_head_dim, bytes + kTile * head_dim);
      codes.keys = bytes;
      codes.values = bytes + kTile * head_dim;
      codes.next_keys = nullptr;
    }
    key_scales_ = reinterpret_cast<const float16*>(q.key_scales) + t * 2 * head_dim;
    const auto* pairs = reinterpret_cast<const float16*>(q.value_scales) + row * 2;
    for (int k = 0; k < kTile; ++k) {
      const bool there = k < codes.count;
      value_scale_[k] = there ? to_float(pairs[2 * codes.row[k]]) : 0.0f;
      value_zero_[k] = there ? to_float(pairs[2 * codes.row[k] + 1]) : 0.0f;
    }
    return true;
  }

  // Fold the keys' scales into a group of kRows packed query rows, which are then at query().
  Fold fold(const float* rows, int64_t head_dim) {
    const int64_t width = padded(head_dim, kLanes), whole = head_dim / kLanes * kLanes;
    float* to = scaled_.get(kRows * width);
    Vec bias[kRows] = {};
    for (int64_t d = 0; d < width; d += kLanes) {
      const int part = static_cast<int>(head_dim - d);
      const Vec scale = d < whole ? load(key_scales_ + d) : load_part(key_scales_ + d, part);
      const Vec zero = d < whole ? load(key_scales_ + head_dim + d) : load_part(key_scales_ + head_dim + d, part);
      for (int r = 0; r < kRows; ++r) {
        const Vec q = load(rows + r * width + d);
        store(to + r * width + d, q * scale);
        bias[r] += q * zero;
      }
    }
    Fold fold;
    for (int r = 0; r < kRows; ++r) fold.bias[r] = sum_of(bias[r]);
    fold.scale = value_scale_;
    fold.zero = value_zero_;
    return fold;
  }

  const float* query() { return scaled_.get(0); }

 private:
  Scratch unpacked_, scaled_;
  const float16* key_scales_ = nullptr;
  alignas(64) float value_scale_[kTile];
  alignas(64) float value_zero_[kTile];
};

}  // namespace KVZIP_ISA
}  // namespace kvzip
