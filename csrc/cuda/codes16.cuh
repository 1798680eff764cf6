// One warp's arithmetic on 32 keys and values of 8 or 4 bits, with tensor cores.
//
// As in Math16, S^T = K Q^T and O^T += V^T P^T, with the codes themselves in place of K and V: they become float16,
// which holds them exactly, in registers, and so does everything else here, whatever the query's dtype. Scales and
// zeros go elsewhere. With keys c * scale + zero, the scale of a channel goes into the query, as the sum of two
// float16, and query . zero into every score, by a product of its own. With values c * scale + zero, a token's scale
// goes into its weight, and the rest, the same for all channels, into one number a row.
#pragma once

#include "math16.cuh"
#include "stream.cuh"

namespace kvzip {

constexpr int kCodeKeys = 32;  // keys a warp takes at a time: half a tile

// A stage of the ring: one warp's keys and values, and what they are scaled by. Offsets are in bytes.
template <int kHeadDim, int kBits>
struct CodeStage {
  static constexpr int kRowBytes = kHeadDim * kBits / 8;
  static constexpr int kValues = kCodeKeys * kRowBytes;
  static constexpr int kKeyScales = 2 * kValues;                      // (2, head_dim) float16
  static constexpr int kValueScales = kKeyScales + 2 * 2 * kHeadDim;  // (kCodeKeys, 2) float16
  static constexpr int kBytes = kValueScales + kCodeKeys * 4;
};

// Warps of a CTA: as many as keep a stage of the ring below 40 KiB, and 8 only where registers suffice.
constexpr int code_warps(int stage_bytes, bool allows_eight) {
  const int most = 40960 / stage_bytes;
  return most >= 8 && allows_eight ? 8 : most >= 4 ? 4 : 2;
}

template <int kHeadDimension, int kBlocks, int kBits>
struct Codes16 : Outputs16<kHeadDimension, kBlocks> {
  using Outputs = Outputs16<kHeadDimension, kBlocks>;
  using Element = Float16;  // or BFloat16: of the query, 16 bits
  using Stage = CodeStage<kHeadDimension, kBits>;
  using Layout = TileLayout<Stage::kRowBytes>;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kRowBlocksOf8 = kBlocks;
  static constexpr int kRows = 8 * kBlocks;
  static constexpr int kGroups = kCodeKeys / 16;
  static constexpr int kWarps = code_warps(Stage::kBytes, kBlocks == 1);
  static constexpr int kQueryStride = kHeadDim * 2 + 32;  // so that four rows lie in different banks
  static constexpr int kQueryBytes = kRows * kQueryStride;
  static constexpr int kParts = 8 / kBits;                    // codes of a byte
  static constexpr int kPartBlocks = kHeadDim / 16 / kParts;  // blocks of 16 channels that one part of the bytes has
  static constexpr float kMiddle = 1 << (kBits - 1);
  // Probability times scale times this is about a probability where values are about 1, and within float16 where a
  // token's values span up to 2^17. The outputs are larger by as much.
  static constexpr float kWeightFactor = 1 << (kBits - 2);

  float shift[kBlocks][2];  // of all channels of this lane's rows, from this lane's keys

  static __device__ __forceinline__ void store_query(uint32_t query, int row, int chunk, uint4 bits, DType dtype,
                                                     float factor) {
    const auto scaled = [&](uint32_t two) {
      const uint16_t low = static_cast<uint16_t>(two), high = static_cast<uint16_t>(two >> 16);
      return dtype == DType::kFloat16 ? pack<Float16>(widen(Float16{low}) * factor, widen(Float16{high}) * factor)
                                      : pack<Float16>(widen(BFloat16{low}) * factor, widen(BFloat16{high}) * factor);
    };
    store_shared(query + row * kQueryStride + chunk * 16,
                 {scaled(bits.x), scaled(bits.y), scaled(bits.z), scaled(bits.w)});
  }

  // Four bytes of codes as four bytes of one part of them.
  static __device__ __forceinline__ uint32_t part_of(uint32_t codes, int part) {
    return kBits == 8 ? codes : codes >> (4 * part) & 0x0f0f0f0fu;
  }

  // Bytes i and j of four codes as float16, centred or not: 0x6400 is 1024, its last place 1.
  template <int i, int j, bool kCentered>
  static __device__ __forceinline__ uint32_t halves(uint32_t codes) {
    constexpr uint32_t kBase = 0xe400 + (kCentered ? 1 << (kBits - 1) : 0);  // -1024 or -(1024 + middle)
    return half_add(__byte_perm(codes, 0x64646464u, i | 0x40 | j << 8 | 0x4000), kBase | kBase << 16);
  }

  static __device__ __forceinline__ void scores(uint32_t stage, uint32_t query, int lane,
                                                float (&s)[kGroups][kBlocks][4]) {
    // Chains of dependent instructions that do not wait for each other.
    float high[kGroups][kBlocks][4] = {}, low[kGroups][kBlocks][4] = {}, zero[kBlocks][4] = {};
#pragma unroll(kWarps == 8 ? 2 : Layout::kChunks)  // 8 warps leave a thread 128 registers
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      // Of 4 consecutive channels, from 4 * (lane % 4) on, of keys lane / 4 + 8 * i. For the instruction these are not
      // neighbours but columns 2 * (lane % 4) + 0..1 and + 8..9; queries, scales and zeros are read in the same order.
      uint32_t codes[4];
      load_matrices(codes, stage + Layout::offset(lane, chunk));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int at = (part * kPartBlocks + chunk) * 32 + lane % 4 * 8;
        const uint2 scales = load_shared_pair(stage + Stage::kKeyScales + at);
        const uint2 zeros = load_shared_pair(stage + Stage::kKeyScales + 2 * kHeadDim + at);
        const uint32_t z[4] = {zeros.x, zeros.x, zeros.y, zeros.y};
        uint32_t a[kGroups][4];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t four = part_of(codes[2 * g + half], part);
            a[g][half] = halves<0, 1, false>(four), a[g][half + 2] = halves<2, 3, false>(four);
          }
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          const uint2 q = load_shared_pair(query + (n * 8 + lane / 4) * kQueryStride + at);
          const uint32_t scaled[2] = {half_multiply(q.x, scales.x), half_multiply(q.y, scales.y)};
          const uint32_t rest[2] = {half_multiply_subtract(q.x, scales.x, scaled[0]),
                                    half_multiply_subtract(q.y, scales.y, scaled[1])};
          mma<Float16>(zero[n], z, q.x, q.y);
#pragma unroll
          for (int g = 0; g < kGroups; ++g) {
            mma<Float16>(high[g][n], a[g], scaled[0], scaled[1]);
            mma<Float16>(low[g][n], a[g], rest[0], rest[1]);
          }
        }
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[g][n][e] = high[g][n][e] + (low[g][n][e] + zero[n][e]);
      }
    }
  }

  // The same of values, in pairs of tokens: bytes 0 and 2, or 1 and 3, of one part. 0x5400 is 64, its last place 1/16.
  template <bool kOdd>
  static __device__ __forceinline__ uint32_t values_of(uint32_t codes, int part) {
    if constexpr (kBits == 8) return halves<kOdd, 2 + kOdd, true>(codes);
    const uint32_t bytes = kOdd ? codes >> 8 : codes;
    return part == 0 ? half_add((bytes & 0x000f000fu) | 0x64006400u, 0xe408e408u)   // - (1024 + 8)
                     : half_add((bytes & 0x00f000f0u) | 0x54005400u, 0xd480d480u);  // - (64 + 8)
  }

  // Adds values times weights p, which are changed.
  __device__ __forceinline__ void accumulate(uint32_t stage, int lane, float (&p)[kGroups][kBlocks][4]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t pair = load_shared_word(stage + Stage::kValueScales + (g * 16 + half * 8 + lane / 4) * 4);
        const float scale = widen(Float16{static_cast<uint16_t>(pair)});
        const float middle = widen(Float16{static_cast<uint16_t>(pair >> 16)}) + kMiddle * scale;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            shift[n][e] += p[g][n][2 * half + e] * middle;
            p[g][n][2 * half + e] *= scale * kWeightFactor;
          }
        }
      }
    }
    // The accumulators' fragment holds P^T by rows of keys; as the right operand it is needed by columns.
    uint32_t b[kGroups][kBlocks][2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        b[g][n][0] = transpose_matrix(pack<Float16>(p[g][n][0], p[g][n][1]));
        b[g][n][1] = transpose_matrix(pack<Float16>(p[g][n][2], p[g][n][3]));
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      uint32_t codes[4];  // of channels 2 * (lane / 4) + 0..1 of keys 8 * i + 2 * (lane % 4) + 0..1
      load_matrices_transposed(codes, stage + Stage::kValues + Layout::offset(lane, chunk));
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const uint32_t a[4] = {values_of<false>(codes[2 * g], part), values_of<true>(codes[2 * g], part),
                                 values_of<false>(codes[2 * g + 1], part), values_of<true>(codes[2 * g + 1], part)};
#pragma unroll
          for (int n = 0; n < kBlocks; ++n) {
            mma<Float16>(this->output[n][part * kPartBlocks + chunk], a, b[g][n][0], b[g][n][1]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void clear() {
    Outputs::clear();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) shift[n][0] = shift[n][1] = 0.0f;
  }

  __device__ __forceinline__ void scale(int n, const float (&factor)[2]) {
    Outputs::scale(n, factor);
    shift[n][0] *= factor[0], shift[n][1] *= factor[1];
  }

  // Makes outputs of what was kept apart; nothing can be accumulated after it.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const float shifts[2] = {sum_over_keys(shift[n][0]), sum_over_keys(shift[n][1])};
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          this->output[n][m][e] = this->output[n][m][e] * (1 / kWeightFactor) + shifts[e % 2];
        }
      }
    }
  }

  // Stores or adds the outputs to (rows, stride) floats.
  __device__ __forceinline__ void put(float* to, int stride, int lane, bool add) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float* at = to + (n * 8 + 2 * (lane % 4) + e % 2) * stride + m * 16 + 2 * (lane / 4) + e / 2;
          *at = add ? *at + this->output[n][m][e] : this->output[n][m][e];
        }
      }
    }
  }
};

}  // namespace kvzip
