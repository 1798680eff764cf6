// One warp's arithmetic on 16 keys, with tensor cores.
//
// Scores and outputs are computed transposed: S^T = K Q^T and O^T += V^T P^T, with keys (then dimensions of a value)
// as the 16 rows of an m16n8k16 instruction and packed query rows as its 8 columns. Up to 8 rows, the usual case of a
// decoding step, then waste nothing, and a lane's columns are the same in scores and outputs, so that rescaling by the
// running maximum needs no exchange between lanes.
#pragma once

#include "tile.cuh"

namespace kvzip {

constexpr int kWarpKeys = 16;  // keys a warp takes at a time

// The outputs of a warp: lane l holds, of 8 rows (columns n) and 16 channels m, at index e, row 2 * (l % 4) + e % 2 of
// the channel that is row l / 4 + 8 * (e / 2) of the instruction.
template <int kHeadDim, int kBlocks>
struct Outputs16 {
  float output[kBlocks][kHeadDim / 16][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) output[n][m][e] = 0.0f;
      }
    }
  }

  // Multiplies the outputs of this lane's two rows of block n.
  __device__ __forceinline__ void scale(int n, const float (&factor)[2]) {
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) output[n][m][e] *= factor[e % 2];
    }
  }
};

// Lane l holds, of the scores of 8 rows (columns n) and 16 keys, at index e:
//   key l / 4 + 8 * (e / 2), row 2 * (l % 4) + e % 2
template <typename T, int kHeadDimension, int kBlocks>
struct Math16 : Outputs16<kHeadDimension, kBlocks> {
  using Element = T;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kRowBlocksOf8 = kBlocks;
  static constexpr int kRows = 8 * kBlocks;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kQueryBytes = kRows * kRowBytes;
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : 2;  // a stage of the ring stays at or below 32 KiB
  using Layout = TileLayout<kRowBytes>;

  static __device__ __forceinline__ int query_offset(int row, int chunk) { return Layout::offset(row, chunk); }

  static __device__ __forceinline__ void scores(uint32_t keys, uint32_t query, int lane, float (&s)[kBlocks][4]) {
    // Two chains of dependent instructions where there would be only one.
    constexpr int kChains = kBlocks == 1 ? 2 : 1;
    float chain[kChains][kBlocks][4] = {};
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; k += 2) {
      uint32_t a[2][4], b[2][kBlocks][2];
      load_matrices(a[0], keys + Layout::offset(lane % 16, 2 * k + lane / 16));
      load_matrices(a[1], keys + Layout::offset(lane % 16, 2 * k + 2 + lane / 16));
      if constexpr (kBlocks == 1) {
        uint32_t r[4];
        load_matrices(r, query + Layout::offset(lane % 8, 2 * k + lane / 8));
        b[0][0][0] = r[0], b[0][0][1] = r[1], b[1][0][0] = r[2], b[1][0][1] = r[3];
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int n = 0; n < kBlocks; n += 2) {
            uint32_t r[4];
            const int row = n * 8 + lane / 16 * 8 + lane % 8;
            load_matrices(r, query + Layout::offset(row, 2 * (k + half) + lane / 8 % 2));
            b[half][n][0] = r[0], b[half][n][1] = r[1], b[half][n + 1][0] = r[2], b[half][n + 1][1] = r[3];
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) mma<T>(chain[half % kChains][n], a[half], b[half][n][0], b[half][n][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] = chain[0][n][e] + (kChains == 2 ? chain[kChains - 1][n][e] : 0.0f);
    }
  }

  __device__ __forceinline__ void accumulate(uint32_t values, int lane, const float (&p)[kBlocks][4]) {
    // The accumulators' fragment holds P^T by rows of keys; as the right operand it is needed by columns.
    uint32_t b[kBlocks][2];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      b[n][0] = transpose_matrix(pack<T>(p[n][0], p[n][1]));
      b[n][1] = transpose_matrix(pack<T>(p[n][2], p[n][3]));
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      uint32_t a[4];
      load_matrices_transposed(a, values + Layout::offset(lane % 8 + lane / 16 * 8, 2 * m + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) mma<T>(this->output[n][m], a, b[n][0], b[n][1]);
    }
  }

  __device__ __forceinline__ void finish() {}

  // Stores or adds the outputs to (rows, stride) floats.
  __device__ __forceinline__ void put(float* to, int stride, int lane, bool add) const {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float* at = to + (n * 8 + 2 * (lane % 4) + e % 2) * stride + m * 16 + lane / 4 + 8 * (e / 2);
          *at = add ? *at + this->output[n][m][e] : this->output[n][m][e];
        }
      }
    }
  }
};

}  // namespace kvzip
