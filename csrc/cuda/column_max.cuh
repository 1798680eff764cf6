// Scoring: the largest share of attention that each key gets from any query row of its head.
//
// A CTA keeps the fragments of its keys in registers and streams the query rows past them, so that nothing of size
// rows x keys is stored. CTAs that share a tile of keys take every `splits`-th tile of rows; a maximum does not depend
// on the order in which they finish.
#pragma once

#include "attend.cuh"

namespace kvzip {

// -inf where the row does not exist, so that it never is the maximum.
__device__ __forceinline__ float share_of(const ColumnMaxParams& p, float logit, float lse) {
  const float capped = p.softcap == 0.0f ? logit * p.scaling : p.softcap * tanhf(logit * (p.scaling / p.softcap));
  return capped - lse;
}

// Floats of one sign are ordered as their bits are; `value` + 0 turns -0, which has no such place, into +0. The NaN of
// max_or_nan is the largest int of all and less than every negative float's unsigned bits, so that it stays.
__device__ __forceinline__ void atomic_max(float* at, float value) {
  value += 0.0f;
  if (!(value < 0.0f)) {
    atomicMax(reinterpret_cast<int*>(at), __float_as_int(value));
  } else {
    atomicMin(reinterpret_cast<unsigned*>(at), __float_as_uint(value));
  }
}

// Grid: (tiles of kTileKeys keys, query heads, p.splits).
template <typename T, int kHeadDim>
struct ColumnMax16 {
  static constexpr int kWarps = 4, kTileRows = 32, kKeyBlocks = 2;
  static constexpr int kTileKeys = kWarps * kKeyBlocks * 16;
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kDepth = 3;
  static constexpr int kStageBytes = kTileRows * kRowBytes;
  // The keys pass through the ring's memory before the first query row does.
  static constexpr int kRingBytes =
      kDepth * kStageBytes > kTileKeys * kRowBytes ? kDepth * kStageBytes : kTileKeys * kRowBytes;
  static constexpr int kSharedBytes = kRingBytes;
  using Layout = TileLayout<kRowBytes>;

  static __device__ __forceinline__ void fetch(const ColumnMaxParams& p, uint32_t to, int head, int tile, int warp,
                                               int lane) {
    const int row = tile * kTileRows + warp * (kTileRows / kWarps);
    const int64_t first = head * p.query_head_stride + row * p.query_token_stride;
    const char* from = static_cast<const char*>(p.query) + first * 2;
    // 8 rows per warp; the permutation of a tile's rows repeats every 8, so that each warp's part is a tile of its own.
    copy_rows<kRowBytes, kTileRows / kWarps>(to + warp * (kTileRows / kWarps) * kRowBytes, from,
                                             p.query_token_stride * 2, {p.q_len - row, 0, 0}, lane);
  }

  static __device__ __forceinline__ void run(const ColumnMaxParams& p, unsigned char* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.y;
    const int first_key = blockIdx.x * kTileKeys + warp * kKeyBlocks * 16;
    const uint32_t ring = shared_address(shared);

    uint32_t keys[kKeyBlocks][kHeadDim / 16][4];
    {
      const uint32_t own = ring + warp * kKeyBlocks * 16 * kRowBytes;
      const char* from = static_cast<const char*>(p.keys) +
                         (head / p.groups * p.key_head_stride + first_key * p.key_token_stride) * 2;
      copy_rows<kRowBytes, kKeyBlocks * 16>(own, from, p.key_token_stride * 2, {p.kv_len - first_key, 0, 0}, lane);
      copy_commit();
      copy_wait<0>();
      __syncwarp();
#pragma unroll
      for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
          load_matrices(keys[m][k], own + Layout::offset(m * 16 + lane % 16, 2 * k + lane / 16));
        }
      }
    }
    __syncthreads();

    const int tiles = (p.q_len + kTileRows - 1) / kTileRows;
    int ahead = blockIdx.z;
    for (int stage = 0; stage < kDepth - 1; ++stage, ahead += p.splits) {
      if (ahead < tiles) fetch(p, ring + stage * kStageBytes, head, ahead, warp, lane);
      copy_commit();
    }
    float largest[kKeyBlocks][2];
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) largest[m][0] = largest[m][1] = -INFINITY;
    int stage = 0;
    for (int tile = blockIdx.z; tile < tiles; tile += p.splits, ahead += p.splits) {
      copy_wait<kDepth - 2>();
      __syncthreads();
      if (ahead < tiles) fetch(p, ring + (stage + kDepth - 1) % kDepth * kStageBytes, head, ahead, warp, lane);
      copy_commit();
      const uint32_t rows = ring + stage * kStageBytes;
#pragma unroll 1
      for (int n = 0; n < kTileRows; n += 16) {
        float c[kKeyBlocks][2][4] = {};
#pragma unroll
        for (int k = 0; k < kHeadDim / 16; ++k) {
          uint32_t b[4];
          load_matrices(b, rows + Layout::offset(n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
            mma<T>(c[m][0], keys[m][k], b[0], b[1]);
            mma<T>(c[m][1], keys[m][k], b[2], b[3]);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = tile * kTileRows + n + e / 2 * 8 + 2 * (lane % 4) + e % 2;
          const float lse = row < p.q_len ? p.lse[static_cast<int64_t>(head) * p.q_len + row] : INFINITY;
#pragma unroll
          for (int m = 0; m < kKeyBlocks; ++m) {
            largest[m][0] = max_or_nan(largest[m][0], share_of(p, c[m][e / 2][e % 2], lse));
            largest[m][1] = max_or_nan(largest[m][1], share_of(p, c[m][e / 2][2 + e % 2], lse));
          }
        }
      }
      stage = (stage + 1) % kDepth;
    }
#pragma unroll
    for (int m = 0; m < kKeyBlocks; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float value = largest[m][half];
        value = max_or_nan(value, __shfl_xor_sync(kFullWarp, value, 1));
        value = max_or_nan(value, __shfl_xor_sync(kFullWarp, value, 2));
        const int key = first_key + m * 16 + half * 8 + lane / 4;
        if (lane % 4 == 0 && key < p.kv_len) atomic_max(p.output + static_cast<int64_t>(head) * p.kv_len + key, value);
      }
    }
  }
};

// 64 keys x 64 rows, 4 x 4 for each of 256 threads, 16 dimensions at a time. The same grid.
template <int kHeadDim>
struct ColumnMax32 {
  static constexpr int kWarps = 8, kTileKeys = 64, kTileRows = 64, kSlice = 16, kStride = kTileKeys + 4;
  static constexpr int kSharedBytes = 2 * kSlice * kStride * 4;

  // Copies a slice of 64 rows, transposed, with zeros for rows that do not exist.
  static __device__ __forceinline__ void load(float* to, const float* from, int64_t stride, int rows) {
    const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
    float4 v = {0.0f, 0.0f, 0.0f, 0.0f};
    if (row < rows) v = *reinterpret_cast<const float4*>(from + row * stride + column);
    to[(column + 0) * kStride + row] = v.x, to[(column + 1) * kStride + row] = v.y;
    to[(column + 2) * kStride + row] = v.z, to[(column + 3) * kStride + row] = v.w;
  }

  static __device__ __forceinline__ void run(const ColumnMaxParams& p, unsigned char* shared) {
    float* keys = reinterpret_cast<float*>(shared);
    float* rows = keys + kSlice * kStride;
    const int head = blockIdx.y, first_key = blockIdx.x * kTileKeys;
    const int x = threadIdx.x % 16, y = threadIdx.x / 16;  // rows 4 x.., keys 4 y..
    const float* key_base = static_cast<const float*>(p.keys) + head / p.groups * p.key_head_stride +
                            first_key * p.key_token_stride;
    float largest[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    for (int first = blockIdx.z * kTileRows; first < p.q_len; first += p.splits * kTileRows) {
      const float* row_base =
          static_cast<const float*>(p.query) + head * p.query_head_stride + first * p.query_token_stride;
      float c[4][4] = {};
      for (int d = 0; d < kHeadDim; d += kSlice) {
        __syncthreads();
        load(keys, key_base + d, p.key_token_stride, p.kv_len - first_key);
        load(rows, row_base + d, p.query_token_stride, p.q_len - first);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kSlice; ++i) {
          const float4 k = *reinterpret_cast<const float4*>(keys + i * kStride + 4 * y);
          const float4 q = *reinterpret_cast<const float4*>(rows + i * kStride + 4 * x);
          const float kk[4] = {k.x, k.y, k.z, k.w}, qq[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
          for (int m = 0; m < 4; ++m) {
#pragma unroll
            for (int n = 0; n < 4; ++n) c[m][n] = fmaf(kk[m], qq[n], c[m][n]);
          }
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = first + 4 * x + n;
        const float lse = row < p.q_len ? p.lse[static_cast<int64_t>(head) * p.q_len + row] : INFINITY;
#pragma unroll
        for (int m = 0; m < 4; ++m) largest[m] = max_or_nan(largest[m], share_of(p, c[m][n], lse));
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int distance = 1; distance < 16; distance *= 2) {
        largest[m] = max_or_nan(largest[m], __shfl_xor_sync(kFullWarp, largest[m], distance));
      }
      const int key = first_key + 4 * y + m;
      if (x == 0 && key < p.kv_len) {
        atomic_max(p.output + static_cast<int64_t>(head) * p.kv_len + key, largest[m]);
      }
    }
  }
};

template <class Work>
__global__ void __launch_bounds__(Work::kWarps * 32) column_max_kernel(const ColumnMaxParams p) {
  Work::run(p, kvzip_shared);
}

}  // namespace kvzip
