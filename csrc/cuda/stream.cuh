// What all attention kernels share: packed query rows, the online softmax of a warp, the partial results of a segment,
// and the ring of stages that runs ahead of the arithmetic.
#pragma once

#include "tile.cuh"
#include "walk.cuh"

namespace kvzip {

constexpr float kLn2 = 0.69314718055994530942f;

// exp2(x - maximum), also for a maximum of nothing (-inf), where x is -inf as well.
__device__ __forceinline__ float exp2_below(float x, float maximum) {
  return exp2f(x - (maximum == -INFINITY ? 0.0f : maximum));
}

// The sum, and the maximum, of one row over the lanes that hold its keys.
__device__ __forceinline__ float sum_over_keys(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}
__device__ __forceinline__ float maximum_over_keys(float x) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, distance));
  return x;
}

// The rows of a segment: packed rows [first, first + count) of all batch rows.
struct Segment {
  int head;
  int first, count;
  int64_t row;  // of the partial results
};

// That of a CTA's part of a head of ragged rows.
template <int kRows>
__device__ __forceinline__ Segment ragged_segment(const AttendParams& p, const Ragged& r, int head) {
  const int row_block = blockIdx.x % r.row_blocks, first = row_block * kRows;
  const int left = p.batch * p.groups * p.q_len - first;
  const int64_t slot = static_cast<int64_t>(blockIdx.x / r.row_blocks) + head;
  return {head, first, left < kRows ? left : kRows, ragged_row(r, p.kv_heads, row_block, slot)};
}

// Hands the segment's query to `store(row, chunk, bits)`, 16 bytes at a time; zeros where a row does not exist.
template <class Math, class Store>
__device__ __forceinline__ void load_query(const AttendParams& p, const Segment& segment, Store&& store) {
  constexpr int kItem = sizeof(typename Math::Element), kChunks = Math::kHeadDim * kItem / 16;
  const int rows_per_batch = p.groups * p.q_len;
  for (int index = thread_again(); index < Math::kRows * kChunks; index += Math::kWarps * 32) {
    const int row = index / kChunks, chunk = index % kChunks;
    uint4 bits = {0, 0, 0, 0};
    if (row < segment.count) {
      const int packed = segment.first + row;
      const int64_t b = packed / rows_per_batch, g = packed % rows_per_batch / p.q_len, i = packed % p.q_len;
      const int64_t element =
          b * p.query_strides.batch + (segment.head * p.groups + g) * p.query_strides.head + i * p.query_strides.token;
      bits = *reinterpret_cast<const uint4*>(static_cast<const char*>(p.query) + element * kItem + chunk * 16);
    }
    store(row, chunk, bits);
  }
}

// Turns products of query and key into logits to base 2.
template <int kGroups, int kBlocks>
__device__ __forceinline__ void to_logits(float (&s)[kGroups][kBlocks][4], const Logits& logits) {
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[g][n][e] = f(s[g][n][e]);
      }
    }
  };
  if (logits.outer == 0.0f) {
    each([&](float x) { return x * logits.scale; });
  } else {
    each([&](float x) { return logits.outer * tanhf(x * logits.inner); });
  }
}

// The running softmax of one warp over its keys, and the segment's result over all warps. `Math` has the outputs.
template <class Math>
struct Running {
  static constexpr int kBlocks = Math::kRowBlocksOf8, kRows = Math::kRows;
  static constexpr int kThreads = Math::kWarps * 32;
  static constexpr int kOutputStride = Math::kHeadDim + 4;  // floats; rows begin in different banks
  static constexpr int kSharedBytes = kRows * (kOutputStride * 4 + Math::kWarps * 8);

  float maximum[kBlocks][2], sum[kBlocks][2];  // of this lane's rows; the sum is over this lane's keys only

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) maximum[n][e] = -INFINITY, sum[n][e] = 0.0f;
    }
  }

  // Turns logits into weights and rescales the outputs to the new maxima. The scores of 8 rows and 16 keys lie as
  // Math16 says.
  template <int kGroups>
  __device__ __forceinline__ void weigh(float (&s)[kGroups][kBlocks][4], Math& math) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float largest = fmaxf(s[0][n][e], s[0][n][2 + e]);
#pragma unroll
        for (int g = 1; g < kGroups; ++g) largest = fmaxf(largest, fmaxf(s[g][n][e], s[g][n][2 + e]));
        largest = fmaxf(maximum_over_keys(largest), maximum[n][e]);
        factor[e] = exp2_below(maximum[n][e], largest);
        maximum[n][e] = largest;
        sum[n][e] *= factor[e];
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          s[g][n][e] = exp2_below(s[g][n][e], largest);
          s[g][n][2 + e] = exp2_below(s[g][n][2 + e], largest);
          sum[n][e] += s[g][n][e] + s[g][n][2 + e];
        }
      }
      // Maxima settle after a few tiles; the multiplications would otherwise rival the tensor cores' time.
      if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) math.scale(n, factor);
    }
  }

  // Adds up the warps' results, in order, and writes them to the segment's slot. `outputs` has kSharedBytes.
  __device__ __forceinline__ void flush(const AttendParams& p, const Segment& segment, Math& math, float* outputs) {
    constexpr int kHeadDim = Math::kHeadDim;
    const int thread = thread_again(), warp = thread / 32, lane = thread % 32;
    float* const stats = outputs + kRows * kOutputStride;  // (warps, rows, 2)
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum[n][e] = sum_over_keys(sum[n][e]);
        float* at = stats + 2 * (warp * kRows + n * 8 + 2 * lane + e);
        if (lane < 4) at[0] = maximum[n][e], at[1] = sum[n][e];
      }
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float largest = -INFINITY;
        for (int w = 0; w < Math::kWarps; ++w) {
          largest = fmaxf(largest, stats[2 * (w * kRows + n * 8 + 2 * (lane % 4) + e)]);
        }
        factor[e] = exp2_below(maximum[n][e], largest);
      }
      math.scale(n, factor);
    }
    math.finish();
    for (int w = 0; w < Math::kWarps; ++w) {
      if (w == warp) math.put(outputs, kOutputStride, lane, w > 0);
      __syncthreads();
    }
    for (int index = thread; index < segment.count * (kHeadDim / 4); index += kThreads) {
      const int from = index / (kHeadDim / 4), column = index % (kHeadDim / 4) * 4;
      *reinterpret_cast<float4*>(p.partial_output + (segment.row + from) * kHeadDim + column) =
          *reinterpret_cast<const float4*>(outputs + from * kOutputStride + column);
    }
    const int row = thread;
    if (row < segment.count) {
      float largest = -INFINITY, total = 0.0f;
      for (int w = 0; w < Math::kWarps; ++w) largest = fmaxf(largest, stats[2 * (w * kRows + row)]);
      for (int w = 0; w < Math::kWarps; ++w) {
        const float* at = stats + 2 * (w * kRows + row);
        total += at[1] * exp2_below(at[0], largest);
      }
      float* at = p.partial_stats + (segment.row + row) * 2;
      at[0] = largest, at[1] = total;
    }
  }
};

// Takes `work` through the steps of a walk, whose parameters are `along`, with a ring of `depth` stages.
template <class Work, class Steps, class Along>
__device__ __forceinline__ void stream(Work& work, Steps ahead, const Along& along, int depth) {
  Steps now = ahead;
  for (int stage = 0; stage < depth - 1; ++stage) {
    if (!ahead.done()) {
      work.fetch(ahead, stage);
      ahead.next(along);
    }
    copy_commit();
  }
  bool begins = true;
  for (int stage = 0; !now.done(); now.next(along)) {
    if (begins) work.begin_segment(now);
    // One group per step, also where it is empty, so that the number of pending ones tells which stage is complete.
    copy_wait(depth - 2);
    __syncwarp();  // the stage is complete for all lanes, and all have finished with the one before, refilled next
    if (!ahead.done()) {
      work.fetch(ahead, stage == 0 ? depth - 1 : stage - 1);
      ahead.next(along);
    }
    copy_commit();
    work.consume(now, stage);
    begins = now.ends_segment();
    if (begins) work.flush(now);
    stage = stage + 1 == depth ? 0 : stage + 1;
  }
}

extern __shared__ __align__(128) unsigned char kvzip_shared[];

}  // namespace kvzip
