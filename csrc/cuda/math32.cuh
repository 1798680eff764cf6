// One warp's arithmetic on 16 keys in float32, without tensor cores: what Math16 does, for 8 rows.
#pragma once

#include "math16.cuh"

namespace kvzip {

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// The scores lie as in Math16. The outputs of a lane: dimensions 32 * j + 4 * (l / 4) + 0..3 of rows
// 2 * (l % 4) + 0..1.
template <int kHeadDimension>
struct Math32 {
  using Element = float;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kRowBlocksOf8 = 1;
  static constexpr int kRows = 8;
  static constexpr int kRowBytes = kHeadDim * 4;
  static constexpr int kQueryStride = kRowBytes + 16;  // so that the rows begin in different banks
  static constexpr int kQueryBytes = kRows * kQueryStride;
  static constexpr int kWarps = kRowBytes <= 256 ? 4 : kRowBytes <= 512 ? 2 : 1;
  using Layout = TileLayout<kRowBytes>;

  float output[kHeadDim / 32][4][2];

  static __device__ __forceinline__ int query_offset(int row, int chunk) { return row * kQueryStride + chunk * 16; }

  static __device__ __forceinline__ void scores(uint32_t keys, uint32_t query, int lane, float (&s)[1][4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[0][e] = 0.0f;
#pragma unroll 8
    for (int chunk = 0; chunk < Layout::kChunks; ++chunk) {
      const float4 k0 = load_shared(keys + Layout::offset(lane / 4, chunk));
      const float4 k1 = load_shared(keys + Layout::offset(lane / 4 + 8, chunk));
      const float4 q0 = load_shared(query + query_offset(2 * (lane % 4), chunk));
      const float4 q1 = load_shared(query + query_offset(2 * (lane % 4) + 1, chunk));
      s[0][0] = dot(k0, q0, s[0][0]), s[0][1] = dot(k0, q1, s[0][1]);
      s[0][2] = dot(k1, q0, s[0][2]), s[0][3] = dot(k1, q1, s[0][3]);
    }
  }

  __device__ __forceinline__ void accumulate(uint32_t values, int lane, const float (&p)[1][4]) {
#pragma unroll
    for (int key = 0; key < kWarpKeys; ++key) {
      const int source = key % 8 * 4 + lane % 4;
      const float p0 = __shfl_sync(kFullWarp, p[0][key / 8 * 2], source);
      const float p1 = __shfl_sync(kFullWarp, p[0][key / 8 * 2 + 1], source);
#pragma unroll
      for (int j = 0; j < kHeadDim / 32; ++j) {
        add(j, load_shared(values + Layout::offset(key, j * 8 + lane / 4)), p0, p1);
      }
    }
  }

  __device__ __forceinline__ void clear() {
    each([&](int j, int i, int e) { output[j][i][e] = 0.0f; });
  }

  __device__ __forceinline__ void scale(int, const float (&factor)[2]) {
    each([&](int j, int i, int e) { output[j][i][e] *= factor[e]; });
  }

  __device__ __forceinline__ void finish() {}

  __device__ __forceinline__ void put(float* to, int stride, int lane, bool add) const {
    each([&](int j, int i, int e) {
      float* at = to + (2 * (lane % 4) + e) * stride + j * 32 + 4 * (lane / 4) + i;
      *at = add ? *at + output[j][i][e] : output[j][i][e];
    });
  }

 protected:
  __device__ __forceinline__ void add(int j, float4 v, float p0, float p1) {
    const float element[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      output[j][i][0] = fmaf(element[i], p0, output[j][i][0]);
      output[j][i][1] = fmaf(element[i], p1, output[j][i][1]);
    }
  }

  template <typename F>
  static __device__ __forceinline__ void each(F&& f) {
#pragma unroll
    for (int j = 0; j < kHeadDim / 32; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) f(j, i, e);
      }
    }
  }
};

}  // namespace kvzip
