// Merges the partial results of each query row into its output.
#pragma once

#include "attend.cuh"

namespace kvzip {

constexpr int kMergeWarps = 8;

__device__ __forceinline__ float load_sink(const AttendParams& p, int head) {
  switch (p.sinks_dtype) {
    case DType::kBFloat16: return widen(static_cast<const BFloat16*>(p.sinks)[head]);
    case DType::kFloat16: return widen(static_cast<const Float16*>(p.sinks)[head]);
    default: return static_cast<const float*>(p.sinks)[head];
  }
}

template <typename T>
__device__ __forceinline__ void store_output(T* to, float4 v) {
  *reinterpret_cast<uint2*>(to) = {pack<T>(v.x, v.y), pack<T>(v.z, v.w)};
}
template <>
__device__ __forceinline__ void store_output<float>(float* to, float4 v) {
  *reinterpret_cast<float4*>(to) = v;
}

// The blocks of partial results that one query row has: a run of the context's slots, then a run of the tails'.
struct Partials {
  int64_t context_first, tail_first;  // blocks
  int context_count, tail_count;
  int context_row, tail_row;  // within a block

  __device__ __forceinline__ int count() const { return context_count + tail_count; }
  __device__ __forceinline__ int64_t row(int index, int rows) const {
    return index < context_count ? (context_first + index) * rows + context_row
                                 : (tail_first + index - context_count) * rows + tail_row;
  }
};

__device__ __forceinline__ Partials partials_of(const AttendParams& p, int b, int query_head, int i, int rows) {
  const int head = query_head / p.groups, g = query_head % p.groups;
  Partials partials{0, 0, 0, 0, 0, 0};
  if (p.keys != nullptr && p.cu_tiles[head] < p.cu_tiles[head + 1]) {
    const int64_t tiles = p.cu_tiles[p.kv_heads];
    const int64_t workers = active(p.workers, tiles);
    const int64_t first = owner(p.cu_tiles[head], workers, tiles);
    const int64_t last = owner(p.cu_tiles[head + 1] - 1, workers, tiles);
    const int packed = (b * p.groups + g) * p.q_len + i;
    partials.context_row = packed % rows;
    partials.context_first = context_block(p, packed / rows, first + head);
    partials.context_count = static_cast<int>(last - first) + 1;
  }
  const int64_t per_item = tiles_of(tail_length(p));
  if (per_item > 0) {
    const int packed = g * p.q_len + i;
    const int64_t item = (static_cast<int64_t>(b) * p.kv_heads + head) * p.tail_row_blocks + packed / rows;
    const int64_t tiles = per_item * tail_items(p);
    const int64_t workers = active(static_cast<int64_t>(p.workers) * p.row_blocks, tiles);
    const int64_t first = owner(item * per_item, workers, tiles);
    const int64_t last = owner((item + 1) * per_item - 1, workers, tiles);
    partials.tail_row = packed % rows;
    partials.tail_first = tail_block(p, first + item);
    partials.tail_count = static_cast<int>(last - first) + 1;
  }
  return partials;
}

// Grid: (batch * q_len * query heads), in the output's order. Block: kMergeWarps warps. Each warp takes every
// kMergeWarps-th partial result in slot order, then the warps are added in order: always the same sum.
template <typename T, int kHeadDim, int kRows>
__global__ void __launch_bounds__(kMergeWarps * 32) merge_kernel(const AttendParams p) {
  constexpr int kVectors = (kHeadDim / 4 + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_prerequisites();
  const int query_heads = p.kv_heads * p.groups;
  const int query_head = blockIdx.x % query_heads, token = blockIdx.x / query_heads;
  const int b = token / p.q_len, i = token % p.q_len;
  const Partials partials = partials_of(p, b, query_head, i, kRows);

  float maximum = -INFINITY, sum = 0.0f;
  float output[kVectors][4] = {};
#pragma unroll(4 / kVectors)
  for (int index = warp; index < partials.count(); index += kMergeWarps) {
    const int64_t row = partials.row(index, kRows);
    const float2 stats = reinterpret_cast<const float2*>(p.partial_stats)[row];
    const float largest = fmaxf(maximum, stats.x);
    const float old_factor = exp2_below(maximum, largest), factor = exp2_below(stats.x, largest);
    maximum = largest;
    sum = sum * old_factor + stats.y * factor;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = (v * 32 + lane) * 4;
      if (column >= kHeadDim) continue;
      const float4 part = *reinterpret_cast<const float4*>(p.partial_output + row * kHeadDim + column);
      output[v][0] = output[v][0] * old_factor + part.x * factor;
      output[v][1] = output[v][1] * old_factor + part.y * factor;
      output[v][2] = output[v][2] * old_factor + part.z * factor;
      output[v][3] = output[v][3] * old_factor + part.w * factor;
    }
  }

  float* outputs = reinterpret_cast<float*>(kvzip_shared);  // (warps, head_dim)
  float* stats = outputs + kMergeWarps * kHeadDim;          // (warps, 2)
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int column = (v * 32 + lane) * 4;
    if (column >= kHeadDim) continue;
    *reinterpret_cast<float4*>(outputs + warp * kHeadDim + column) = {output[v][0], output[v][1], output[v][2],
                                                                       output[v][3]};
  }
  if (lane == 0) stats[2 * warp] = maximum, stats[2 * warp + 1] = sum;
  __syncthreads();

  if (threadIdx.x >= kHeadDim / 4) return;
  float largest = -INFINITY, total = 0.0f;
  for (int w = 0; w < kMergeWarps; ++w) largest = fmaxf(largest, stats[2 * w]);
  float4 result = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int w = 0; w < kMergeWarps; ++w) {
    const float factor = exp2_below(stats[2 * w], largest);
    const float4 part = *reinterpret_cast<const float4*>(outputs + w * kHeadDim + threadIdx.x * 4);
    total += stats[2 * w + 1] * factor;
    result.x += part.x * factor, result.y += part.y * factor;
    result.z += part.z * factor, result.w += part.w * factor;
  }
  const bool seen = !(total == 0.0f);  // NaN counts as seen: it must not become a 0
  const float lse = seen ? (largest + log2f(total)) * kLn2 : -INFINITY;
  float share = seen ? 1.0f / total : 0.0f;
  if (seen && p.sinks != nullptr) share /= 1.0f + expf(load_sink(p, query_head) - lse);
  result.x *= share, result.y *= share, result.z *= share, result.w *= share;
  store_output(static_cast<T*>(p.output) + static_cast<int64_t>(blockIdx.x) * kHeadDim + threadIdx.x * 4, result);
  if (threadIdx.x == 0) {
    p.lse[(static_cast<int64_t>(b) * query_heads + query_head) * p.q_len + i] = lse;
  }
}

constexpr int merge_shared_bytes(int head_dim) { return kMergeWarps * (head_dim + 2) * 4; }

}  // namespace kvzip
