// Attention of packed query rows over a shared ragged context and over tails: the partial results.
//
// Each warp streams its own 16 of a step's keys through its own ring of stages and keeps its own running softmax, so
// that nothing but the end of a segment needs the other warps. Steps follow one another across heads and from the
// context into the tails, and the ring runs ahead over all of them.
#pragma once

#include "math32.cuh"
#include "walk.cuh"

namespace kvzip {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// exp2(x - maximum), also for a maximum of nothing (-inf), where x is -inf as well.
__device__ __forceinline__ float exp2_below(float x, float maximum) {
  return exp2f(x - (maximum == -INFINITY ? 0.0f : maximum));
}

template <class Math>
struct SharedMemory {
  static constexpr int kStageBytes = 2 * kWarpKeys * Math::kRowBytes;  // keys, then values, of one warp
  static constexpr int kOutputStride = Math::kHeadDim + 4;             // floats; rows begin in different banks
  static constexpr int kFixedBytes = Math::kQueryBytes + Math::kRows * (kOutputStride * 4 + Math::kWarps * 8);

  static constexpr int bytes(int depth) { return depth * Math::kWarps * kStageBytes + kFixedBytes; }
};

// The rows of a segment: packed rows [first, first + count) of all batch rows.
struct Segment {
  int first, count;
  int64_t block;  // of the partial results
};

template <class Math>
struct Attend {
  using Memory = SharedMemory<Math>;
  using Steps = Walk<kWarpKeys * Math::kWarps>;
  static constexpr int kBlocks = Math::kRowBlocksOf8;
  static constexpr int kThreads = Math::kWarps * 32;

  const AttendParams& p;
  const int warp, lane;
  uint32_t ring, query;  // addresses in shared memory; the ring is this warp's own
  float* outputs;        // (rows, kOutputStride) the sum over the warps
  float* stats;          // (warps, rows, 2)
  Math math;
  float maximum[kBlocks][2], sum[kBlocks][2];  // of this lane's rows; the sum is over this lane's keys only

  __device__ __forceinline__ Attend(const AttendParams& params, unsigned char* shared)
      : p(params), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    unsigned char* after_ring = shared + p.depth * Math::kWarps * Memory::kStageBytes;
    ring = shared_address(shared) + warp * p.depth * Memory::kStageBytes;
    query = shared_address(after_ring);
    outputs = reinterpret_cast<float*>(after_ring + Math::kQueryBytes);
    stats = outputs + Math::kRows * Memory::kOutputStride;
  }

  // Starts the copy of this warp's part of a step.
  __device__ __forceinline__ void fetch(const Steps& walk, int stage) const {
    const int position = walk.position() + warp * kWarpKeys;
    const uint32_t to_keys = ring + stage * Memory::kStageBytes, to_values = to_keys + kWarpKeys * Math::kRowBytes;
    if (!walk.in_tail) {
      const int64_t offset = (walk.first_row + position) * Math::kRowBytes;
      const int rows = walk.length - position;
      const char *keys = static_cast<const char*>(p.keys), *values = static_cast<const char*>(p.values);
      copy_adjacent_rows<Math::kRowBytes, kWarpKeys>(to_keys, keys + offset, rows, lane);
      copy_adjacent_rows<Math::kRowBytes, kWarpKeys>(to_values, values + offset, rows, lane);
      return;
    }
    const int pair = walk.item / p.tail_row_blocks;
    const int64_t b = pair / p.kv_heads, h = pair % p.kv_heads;
    const Rows present{walk.length - position, walk.skip_begin - position, walk.skip_end - position};
    const auto copy = [&](uint32_t to, const void* tensor, const Strides& strides) {
      constexpr int kElement = sizeof(typename Math::Element);
      const int64_t first = b * strides.batch + h * strides.head + position * strides.token;
      copy_rows<Math::kRowBytes, kWarpKeys>(to, static_cast<const char*>(tensor) + first * kElement,
                                            strides.token * kElement, present, lane);
    };
    copy(to_keys, p.tail_keys, p.tail_key_strides);
    copy(to_values, p.tail_values, p.tail_value_strides);
  }

  __device__ __forceinline__ Segment segment_of(const Steps& walk) const {
    const int rows_per_batch = p.groups * p.q_len;
    Segment segment;
    int end;
    if (walk.in_tail) {
      const int b = walk.item / (p.tail_row_blocks * p.kv_heads);
      segment.first = b * rows_per_batch + walk.item % p.tail_row_blocks * Math::kRows;
      segment.block = tail_block(p, static_cast<int64_t>(blockIdx.x) + walk.item);
      end = (b + 1) * rows_per_batch;
    } else {
      const int row_block = blockIdx.x % p.row_blocks;
      segment.first = row_block * Math::kRows;
      segment.block = context_block(p, row_block, static_cast<int64_t>(blockIdx.x / p.row_blocks) + walk.item);
      end = p.batch * rows_per_batch;
    }
    segment.count = end - segment.first < Math::kRows ? end - segment.first : Math::kRows;
    return segment;
  }

  // The barriers of the previous segment's flush come after the last use of its queries, which may be overwritten; the
  // barrier here comes after the last use of its results.
  __device__ __forceinline__ void begin_segment(const Steps& walk, const Segment& segment) {
    constexpr int kChunks = Math::kRowBytes / 16;
    const int rows_per_batch = p.groups * p.q_len;
    const int head = walk.in_tail ? walk.item / p.tail_row_blocks % p.kv_heads : walk.item;
    for (int index = threadIdx.x; index < Math::kRows * kChunks; index += kThreads) {
      const int row = index / kChunks, chunk = index % kChunks;
      uint4 bits = {0, 0, 0, 0};
      if (row < segment.count) {
        const int packed = segment.first + row;
        const int64_t b = packed / rows_per_batch, g = packed % rows_per_batch / p.q_len, i = packed % p.q_len;
        const int64_t element = b * p.query_strides.batch + (head * p.groups + g) * p.query_strides.head +
                                i * p.query_strides.token;
        const char* from = static_cast<const char*>(p.query) + element * sizeof(typename Math::Element);
        bits = *reinterpret_cast<const uint4*>(from + chunk * 16);
      }
      store_shared(query + Math::query_offset(row, chunk), bits);
    }
    math.clear();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) maximum[n][e] = -INFINITY, sum[n][e] = 0.0f;
    }
    __syncthreads();
  }

  // Sets the scores of keys that a row does not see to -inf.
  __device__ __forceinline__ void hide(const Steps& walk, const Segment& segment, int position,
                                       float (&s)[kBlocks][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = position + lane / 4 + 8 * half;
      bool present = key < walk.length && !(key >= walk.skip_begin && key < walk.skip_end);
      if (present && !walk.in_tail && p.mask != nullptr) present = p.mask[walk.item * p.mask_length + key] != 0;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = segment.first + n * 8 + 2 * (lane % 4) + e;
          const bool visible = !walk.in_tail || key <= walk.length - p.q_len + row % p.q_len;
          if (!present || !visible) s[n][half * 2 + e] = -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ bool sees_all(const Steps& walk, int position) const {
    const int end = position + kWarpKeys;
    if (!walk.in_tail) return end <= walk.length && p.mask == nullptr;
    return end <= walk.length - p.q_len + 1 && (end <= walk.skip_begin || position >= walk.skip_end);
  }

  __device__ __forceinline__ void consume(const Steps& walk, const Segment& segment, int stage) {
    const int position = walk.position() + warp * kWarpKeys;
    if (position >= walk.length) return;
    const uint32_t keys = ring + stage * Memory::kStageBytes;
    float s[kBlocks][4];
    Math::scores(keys, query, lane, s);
    // Logits to base 2.
    if (p.softcap == 0.0f) {
      const float scale = p.scaling * kLog2e;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= scale;
      }
    } else {
      const float inner = p.scaling / p.softcap, outer = p.softcap * kLog2e;
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] = outer * tanhf(s[n][e] * inner);
      }
    }
    if (!sees_all(walk, position)) hide(walk, segment, position, s);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      float factor[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float largest = fmaxf(s[n][e], s[n][2 + e]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
        }
        largest = fmaxf(largest, maximum[n][e]);
        factor[e] = exp2_below(maximum[n][e], largest);
        maximum[n][e] = largest;
        s[n][e] = exp2_below(s[n][e], largest);
        s[n][2 + e] = exp2_below(s[n][2 + e], largest);
        sum[n][e] = sum[n][e] * factor[e] + s[n][e] + s[n][2 + e];
      }
      // Maxima settle after a few tiles; the multiplications would otherwise rival the tensor cores' time.
      if (__any_sync(kFullWarp, factor[0] != 1.0f || factor[1] != 1.0f)) math.scale(n, factor);
    }
    math.accumulate(keys + kWarpKeys * Math::kRowBytes, lane, s);
  }

  // Adds up the warps' results, in order, and writes them to the segment's slot.
  __device__ __forceinline__ void flush(const Segment& segment) {
    constexpr int kHeadDim = Math::kHeadDim, kRows = Math::kRows;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2) {
          sum[n][e] += __shfl_xor_sync(kFullWarp, sum[n][e], distance);
        }
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
    for (int w = 0; w < Math::kWarps; ++w) {
      if (w == warp) math.put(outputs, Memory::kOutputStride, lane, w > 0);
      __syncthreads();
    }
    for (int index = threadIdx.x; index < segment.count * (kHeadDim / 4); index += kThreads) {
      const int from = index / (kHeadDim / 4), column = index % (kHeadDim / 4) * 4;
      *reinterpret_cast<float4*>(p.partial_output + (segment.block * kRows + from) * kHeadDim + column) =
          *reinterpret_cast<const float4*>(outputs + from * Memory::kOutputStride + column);
    }
    const int row = threadIdx.x;
    if (row < segment.count) {
      float largest = -INFINITY, total = 0.0f;
      for (int w = 0; w < Math::kWarps; ++w) largest = fmaxf(largest, stats[2 * (w * kRows + row)]);
      for (int w = 0; w < Math::kWarps; ++w) {
        const float* at = stats + 2 * (w * kRows + row);
        total += at[1] * exp2_below(at[0], largest);
      }
      float* at = p.partial_stats + (segment.block * kRows + row) * 2;
      at[0] = largest, at[1] = total;
    }
  }

  __device__ __forceinline__ void run() {
    Steps ahead;
    ahead.begin(p, lane);
    Steps now = ahead;
    for (int stage = 0; stage < p.depth - 1; ++stage) {
      if (!ahead.done()) {
        fetch(ahead, stage);
        ahead.next(p);
      }
      copy_commit();
    }
    bool begins = true;
    Segment segment;
    for (int stage = 0; !now.done(); now.next(p)) {
      if (begins) {
        segment = segment_of(now);
        begin_segment(now, segment);
      }
      // One group per step, also where it is empty, so that the number of pending ones tells which stage is complete.
      copy_wait(p.depth - 2);
      __syncwarp();  // the stage is complete for all lanes, and all have finished with the one before, refilled next
      if (!ahead.done()) {
        fetch(ahead, stage == 0 ? p.depth - 1 : stage - 1);
        ahead.next(p);
      }
      copy_commit();
      consume(now, segment, stage);
      begins = now.ends_segment();
      if (begins) flush(segment);
      stage = stage + 1 == p.depth ? 0 : stage + 1;
    }
  }
};

extern __shared__ __align__(128) unsigned char kvzip_shared[];

// Grid: p.row_blocks * p.workers.
template <class Math>
__global__ void __launch_bounds__(Math::kWarps * 32, 2) attend_kernel(const AttendParams p) {
  allow_dependents();
  Attend<Math>(p, kvzip_shared).run();
}

}  // namespace kvzip
