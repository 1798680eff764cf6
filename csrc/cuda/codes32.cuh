// One warp's arithmetic on 32 keys and values of 8 or 4 bits in float32, without tensor cores: what Codes16 does, for 8
// rows. Keys are turned back into floats; of values, scales go into the weights.
#pragma once

#include "codes16.cuh"
#include "math32.cuh"

namespace kvzip {

// Byte i of four codes as a float: 0x4b000000 is 2^23, whose last place is 1.
template <int i>
__device__ __forceinline__ float widen_code(uint32_t codes) {
  return __uint_as_float(__byte_perm(codes, 0x4b000000u, i | 0x7440)) - 8388608.0f;
}
__device__ __forceinline__ float4 widen_codes(uint32_t codes) {
  return {widen_code<0>(codes), widen_code<1>(codes), widen_code<2>(codes), widen_code<3>(codes)};
}
__device__ __forceinline__ float4 widen_halves(uint2 four) {
  const auto half = [](uint32_t two, int shift) { return widen(Float16{static_cast<uint16_t>(two >> shift)}); };
  return {half(four.x, 0), half(four.x, 16), half(four.y, 0), half(four.y, 16)};
}

// The scores lie as in Math16, the outputs as in Math32.
template <int kHeadDimension, int kBits>
struct Codes32 : Math32<kHeadDimension> {
  using Outputs = Math32<kHeadDimension>;
  using Stage = CodeStage<kHeadDimension, kBits>;
  using Layout = TileLayout<Stage::kRowBytes>;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kGroups = kCodeKeys / 16;
  static constexpr int kWarps = code_warps(Stage::kBytes, false);
  static constexpr int kParts = 8 / kBits;
  static constexpr int kPartFours = kHeadDim / 4 / kParts;  // blocks of 4 channels that one part of the bytes has

  float shift[2];  // of all channels of this lane's rows, from this lane's keys

  static __device__ __forceinline__ void store_query(uint32_t query, int row, int chunk, uint4 bits, DType, float) {
    store_shared(query + Outputs::query_offset(row, chunk), bits);
  }

  // The codes of 4 channels of a row, one in each byte.
  static __device__ __forceinline__ uint32_t load_codes(uint32_t rows, int row, int four) {
    const int at = four % kPartFours;  // word of the row
    const uint32_t codes = load_shared_word(rows + Layout::offset(row, at / 4) + at % 4 * 4);
    return kBits == 8 ? codes : codes >> (4 * (four / kPartFours)) & 0x0f0f0f0fu;
  }

  static __device__ __forceinline__ void scores(uint32_t stage, uint32_t query, int lane, float (&s)[kGroups][1][4]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[g][0][e] = 0.0f;
    }
#pragma unroll 4
    for (int four = 0; four < kHeadDim / 4; ++four) {
      const float4 scale = widen_halves(load_shared_pair(stage + Stage::kKeyScales + four * 8));
      const float4 zero = widen_halves(load_shared_pair(stage + Stage::kKeyScales + 2 * kHeadDim + four * 8));
      const float4 q0 = load_shared(query + Outputs::query_offset(2 * (lane % 4), four));
      const float4 q1 = load_shared(query + Outputs::query_offset(2 * (lane % 4) + 1, four));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 c = widen_codes(load_codes(stage, g * 16 + half * 8 + lane / 4, four));
          const float4 key = {fmaf(c.x, scale.x, zero.x), fmaf(c.y, scale.y, zero.y), fmaf(c.z, scale.z, zero.z),
                              fmaf(c.w, scale.w, zero.w)};
          s[g][0][2 * half] = dot(key, q0, s[g][0][2 * half]);
          s[g][0][2 * half + 1] = dot(key, q1, s[g][0][2 * half + 1]);
        }
      }
    }
  }

  // Adds values times weights p, which are changed.
  __device__ __forceinline__ void accumulate(uint32_t stage, int lane, float (&p)[kGroups][1][4]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = load_shared_word(stage + Stage::kValueScales + (g * 16 + half * 8 + lane / 4) * 4);
        const float scale = widen(Float16{static_cast<uint16_t>(pair)});
        const float zero = widen(Float16{static_cast<uint16_t>(pair >> 16)});
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          shift[e] = fmaf(p[g][0][2 * half + e], zero, shift[e]);
          p[g][0][2 * half + e] *= scale;
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll 4
      for (int row = 0; row < 16; ++row) {
        const int source = row % 8 * 4 + lane % 4;
        const float p0 = __shfl_sync(kFullWarp, row < 8 ? p[g][0][0] : p[g][0][2], source);
        const float p1 = __shfl_sync(kFullWarp, row < 8 ? p[g][0][1] : p[g][0][3], source);
#pragma unroll
        for (int j = 0; j < kHeadDim / 32; ++j) {
          const float4 v = widen_codes(load_codes(stage + Stage::kValues, g * 16 + row, j * 8 + lane / 4));
          Outputs::add(j, v, p0, p1);
        }
      }
    }
  }

  __device__ __forceinline__ void clear() {
    Outputs::clear();
    shift[0] = shift[1] = 0.0f;
  }

  __device__ __forceinline__ void scale(int n, const float (&factor)[2]) {
    Outputs::scale(n, factor);
    shift[0] *= factor[0], shift[1] *= factor[1];
  }

  // Makes outputs of what was kept apart; nothing can be accumulated after it.
  __device__ __forceinline__ void finish() {
    const float shifts[2] = {sum_over_keys(shift[0]), sum_over_keys(shift[1])};
    Outputs::each([&](int j, int i, int e) { this->output[j][i][e] += shifts[e]; });
  }
};

}  // namespace kvzip
