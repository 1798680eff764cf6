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

// Partial results of one query row, `stride` rows apart.
struct Run {
  int64_t row;
  int stride, count;

  __device__ __forceinline__ int64_t at(int index) const { return row + static_cast<int64_t>(index) * stride; }
};

// Those of a head of ragged rows; `packed` is the query row.
__device__ __forceinline__ Run ragged_run(const Ragged& r, int kv_heads, int head, int packed) {
  if (r.cu_tiles == nullptr || r.cu_tiles[head] == r.cu_tiles[head + 1]) return {0, 0, 0};
  const int64_t tiles = r.cu_tiles[kv_heads], workers = active(r.workers, tiles);
  const int64_t first = owner(r.cu_tiles[head], workers, tiles), last = owner(r.cu_tiles[head + 1] - 1, workers, tiles);
  return {ragged_row(r, kv_heads, packed / r.rows, first + head) + packed % r.rows, r.rows,
          static_cast<int>(last - first) + 1};
}

__device__ __forceinline__ Run tail_run(const AttendParams& p, int pair, int packed) {
  const int64_t per_item = tiles_of(tail_length(p));
  if (per_item == 0) return {0, 0, 0};
  const int rows = p.context.rows;
  const int64_t item = static_cast<int64_t>(pair) * p.tail_row_blocks + packed / rows, tiles = per_item * tail_items(p);
  const int64_t workers = active(static_cast<int64_t>(p.context.workers) * p.context.row_blocks, tiles);
  const int64_t first = owner(item * per_item, workers, tiles);
  const int64_t last = owner((item + 1) * per_item - 1, workers, tiles);
  return {tail_row(p, first + item) + packed % rows, rows, static_cast<int>(last - first) + 1};
}

// All partial results of one query row, in the order in which they are added.
struct Partials {
  Run runs[3];  // of the context, the quantised rows, the tail

  __device__ __forceinline__ Partials(const AttendParams& p, int b, int query_head, int i) {
    const int head = query_head / p.groups, g = query_head % p.groups;
    const int packed = (b * p.groups + g) * p.q_len + i;
    runs[0] = ragged_run(p.context, p.kv_heads, head, packed);
    runs[1] = ragged_run(p.quantized.rows, p.kv_heads, head, packed);
    runs[2] = tail_run(p, b * p.kv_heads + head, g * p.q_len + i);
  }

  __device__ __forceinline__ int count() const { return runs[0].count + runs[1].count + runs[2].count; }

  __device__ __forceinline__ int64_t row(int index) const {
    if (index < runs[0].count) return runs[0].at(index);
    index -= runs[0].count;
    return index < runs[1].count ? runs[1].at(index) : runs[2].at(index - runs[1].count);
  }
};

// Grid: (batch * q_len * query heads), in the output's order. Block: kMergeWarps warps. Each warp takes every
// kMergeWarps-th partial result in slot order, then the warps are added in order: always the same sum.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kMergeWarps * 32) merge_kernel(const AttendParams p) {
  constexpr int kVectors = (kHeadDim / 4 + 31) / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  wait_for_prerequisites();
  const int query_heads = p.kv_heads * p.groups;
  const int query_head = blockIdx.x % query_heads, token = blockIdx.x / query_heads;
  const int b = token / p.q_len, i = token % p.q_len;
  const Partials partials(p, b, query_head, i);

  float maximum = -INFINITY, sum = 0.0f;
  float output[kVectors][4] = {};
#pragma unroll(4 / kVectors)
  for (int index = warp; index < partials.count(); index += kMergeWarps) {
    const int64_t row = partials.row(index);
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
