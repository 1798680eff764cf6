// A tile of quantised keys and values, made ready for `Rows::pass`: scales and zeros folded into queries and weights, so
// that nothing is turned back into floats but the codes, in registers.
#pragma once

#include "kvzip/attention.h"
#include "simd.h"
#include "tile.h"

namespace kvzip {
namespace KVZIP_ISA {

// A byte of 4-bit codes: channel j in its low half, channel j + width / 2 in its high half.
struct Nibbles {
  uint8_t bits;
};

// The channels of kLanes bytes: those in the low halves, those in the high halves. Of the bytes from `n` on, zeros.
struct Pair {
  Vec low, high;
};
inline Pair load_pair(const Nibbles* p, int n) {
  IVec codes;
#if defined(__AVX512F__)
  if (n == kLanes) {
    codes = (IVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {__builtin_convertvector(codes & 15, Vec), __builtin_convertvector(codes >> 4, Vec)};
  }
#elif defined(__AVX2__) && defined(__F16C__)
  if (n == kLanes) {
    codes = (IVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {__builtin_convertvector(codes & 15, Vec), __builtin_convertvector(codes >> 4, Vec)};
  }
#endif
  for (int i = 0; i < kLanes; ++i) codes[i] = i < n ? p[i].bits : 0;
  return {__builtin_convertvector(codes & 15, Vec), __builtin_convertvector(codes >> 4, Vec)};
}

// As for other tiles, reading each byte once for its two channels.
template <int kSome>
void logits(const float* query, int64_t head_dim, int64_t v_head_dim, const Tile<Nibbles>& tile, bool first,
            float softcap, const Fold* fold, float (*s)[kTile]) {
  constexpr int kKeys = kLanes / kSome;
  const int64_t width = padded(head_dim, kLanes), half = head_dim / 2;
  const Vec bias = row_bias<kKeys>(fold);
  for (int k = 0; k < tile.count; k += kKeys) {
    const Nibbles* key[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      const int i = std::min(k + j, tile.count - 1);
      key[j] = tile.key(i);
      if (first) fetch(tile.value(i), v_head_dim / 2);
    }
    Vec acc[kSome][kKeys];
    clear(acc);
    const auto add = [&](int64_t d, int n) __attribute__((always_inline)) {
      Pair codes[kKeys];
      KVZIP_UNROLLED(j, kKeys) codes[j] = load_pair(key[j] + d, n);
      KVZIP_UNROLLED(r, kSome) {
        const float* row = query + r * width + d;
        const Vec low = load(row), high = n == kLanes ? load(row + half) : load_part(row + half, n);
        KVZIP_UNROLLED(j, kKeys) {
          acc[r][j] += low * codes[j].low;
          acc[r][j] += high * codes[j].high;
        }
      }
    };
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) add(d, kLanes);
    if (d < half) add(d, static_cast<int>(half - d));
    store_logits<kKeys>(sums(acc) + bias, softcap, k, s);
  }
}

// The channels of kBlock * kLanes bytes from `d` on, or of the last `n` of them.
template <int kSome, int kBlock>
inline void accumulate_pairs(const float (*s)[kTile], const Update& update, const Tile<Nibbles>& tile, int64_t fetched,
                             int64_t half, int64_t d, int n, float* out, int64_t record) {
  Pair acc[kSome][kBlock];
  KVZIP_UNROLLED(r, kSome) {
    KVZIP_UNROLLED(j, kBlock) acc[r][j] = {Vec{}, Vec{}};
  }
  for (int k = 0; k < tile.count; ++k) {
    if (fetched) fetch(tile.next_keys + k * tile.key_stride, fetched / 2);
    KVZIP_UNROLLED(j, kBlock) {
      const Pair codes = load_pair(tile.value(k) + d + j * kLanes, n);
      KVZIP_UNROLLED(r, kSome) {
        acc[r][j].low += codes.low * s[r][k];
        acc[r][j].high += codes.high * s[r][k];
      }
    }
  }
  KVZIP_UNROLLED(r, kSome) {
    KVZIP_UNROLLED(j, kBlock) {
      float* row = out + r * record + d + j * kLanes;
      const Vec low = load(row), high = n == kLanes ? load(row + half) : load_part(row + half, n);
      store_part(row, low * update.keep[r] + (acc[r][j].low + update.shift[r]), n);
      store_part(row + half, high * update.keep[r] + (acc[r][j].high + update.shift[r]), n);
    }
  }
}

// The bytes from `d` on, in blocks of kBlock vectors, then of half as many, and so on.
template <int kSome, int kBlock>
void accumulate_pairs_from(int64_t d, const float (*s)[kTile], const Update& update, const Tile<Nibbles>& tile,
                           int64_t fetched, int64_t half, float* out, int64_t record) {
  for (; d + kBlock * kLanes <= half; d += kBlock * kLanes) {
    accumulate_pairs<kSome, kBlock>(s, update, tile, d ? 0 : fetched, half, d, kLanes, out, record);
  }
  if constexpr (kBlock > 1) {
    accumulate_pairs_from<kSome, kBlock / 2>(d, s, update, tile, fetched, half, out, record);
  } else if (d < half) {
    const int part = static_cast<int>(half - d);
    accumulate_pairs<kSome, 1>(s, update, tile, d ? 0 : fetched, half, d, part, out, record);
  }
}

template <int kSome>
void accumulate(const float (*s)[kTile], const Update& update, const Tile<Nibbles>& tile, int64_t fetched,
                int64_t v_head_dim, float* out, int64_t record) {
  constexpr int kBlock = kAccumulators / kSome / 2;
  accumulate_pairs_from<kSome, kBlock>(0, s, update, tile, fetched, v_head_dim / 2, out, record);
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
    codes.key_stride = key_bytes;
    codes.value_stride = value_bytes;
    codes.next_keys = more && first + 2 * kTile <= length ? codes.keys + kTile * key_bytes : nullptr;
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

  // The same tile as codes of 4 bits.
  Tile<Nibbles> nibbles() const {
    Tile<Nibbles> tile;
    std::memcpy(&tile, &codes, sizeof tile);
    return tile;
  }

 private:
  Scratch scaled_;
  const float16* key_scales_ = nullptr;
  alignas(64) float value_scale_[kTile];
  alignas(64) float value_zero_[kTile];
};

}  // namespace KVZIP_ISA
}  // namespace kvzip
