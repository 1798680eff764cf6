// Attention of packed query rows over a shared ragged context and over tails: the partial results.
//
// Each warp streams its own 16 of a step's keys through its own ring of stages and keeps its own running softmax, so
// that nothing but the end of a segment needs the other warps. Steps follow one another across heads and from the
// context into the tails, and the ring runs ahead over all of them.
#pragma once

#include "math32.cuh"
#include "stream.cuh"
#include "walk.cuh"

namespace kvzip {

template <class Math>
struct SharedMemory {
  static constexpr int kStageBytes = 2 * kWarpKeys * Math::kRowBytes;  // keys, then values, of one warp
  static constexpr int kFixedBytes = Math::kQueryBytes + Running<Math>::kSharedBytes;

  static constexpr int bytes(int depth) { return depth * Math::kWarps * kStageBytes + kFixedBytes; }
};

template <class Math>
struct Attend {
  using Memory = SharedMemory<Math>;
  using Steps = Walk<kWarpKeys * Math::kWarps>;
  static constexpr int kBlocks = Math::kRowBlocksOf8;

  const AttendParams& p;
  const int warp, lane;
  uint32_t ring, query;  // addresses in shared memory; the ring is this warp's own
  float* outputs;
  Segment segment;
  Math math;
  Running<Math> running;

  __device__ __forceinline__ Attend(const AttendParams& params, unsigned char* shared)
      : p(params), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    unsigned char* after_ring = shared + p.context.depth * Math::kWarps * Memory::kStageBytes;
    ring = shared_address(shared) + warp * p.context.depth * Memory::kStageBytes;
    query = shared_address(after_ring);
    outputs = reinterpret_cast<float*>(after_ring + Math::kQueryBytes);
  }

  // Starts the copy of this warp's part of a step.
  __device__ __forceinline__ void fetch(const Steps& walk, int stage) const {
    const int position = walk.position + warp * kWarpKeys;
    const uint32_t to_keys = ring + stage * Memory::kStageBytes, to_values = to_keys + kWarpKeys * Math::kRowBytes;
    if (!walk.in_tail) {
      const int64_t offset = (walk.first_row + position) * Math::kRowBytes;
      const int rows = walk.length - position;
      const char *keys = static_cast<const char*>(p.keys), *values = static_cast<const char*>(p.values);
      if (p.context.mask == nullptr) {
        copy_adjacent_rows<Math::kRowBytes, kWarpKeys>(to_keys, keys + offset, rows, lane);
        copy_adjacent_rows<Math::kRowBytes, kWarpKeys>(to_values, values + offset, rows, lane);
        return;
      }
      const uint8_t* mask = p.context.mask + walk.item * p.context.mask_length + position;
      const unsigned shown = __ballot_sync(kFullWarp, lane < kWarpKeys && lane < rows && mask[lane] != 0);
      copy_chosen_rows<Math::kRowBytes, kWarpKeys>(to_keys, keys + offset, shown, lane);
      copy_chosen_rows<Math::kRowBytes, kWarpKeys>(to_values, values + offset, shown, lane);
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
    if (!walk.in_tail) return ragged_segment<Math::kRows>(p, p.context, walk.item);
    const int pair = walk.item / p.tail_row_blocks, first = walk.item % p.tail_row_blocks * Math::kRows;
    const int rows_per_batch = p.groups * p.q_len, left = rows_per_batch - first;
    return {pair % p.kv_heads, pair / p.kv_heads * rows_per_batch + first, left < Math::kRows ? left : Math::kRows,
            tail_row(p, static_cast<int64_t>(blockIdx.x) + walk.item)};
  }

  // The barriers of the previous segment's flush come after the last use of its queries, which may be overwritten; the
  // barrier here comes after the last use of its results.
  __device__ __forceinline__ void begin_segment(const Steps& walk) {
    segment = segment_of(walk);
    load_query<Math>(p, segment, [&](int row, int chunk, uint4 bits) {
      store_shared(query + Math::query_offset(row, chunk), bits);
    });
    math.clear();
    running.clear();
    __syncthreads();
  }

  // Sets the scores of keys that a row does not see to -inf.
  __device__ __forceinline__ void hide(const Steps& walk, int position, float (&s)[kBlocks][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = position + lane / 4 + 8 * half;
      bool present = key < walk.length && !(key >= walk.skip_begin && key < walk.skip_end);
      if (present && !walk.in_tail && p.context.mask != nullptr) {
        present = p.context.mask[walk.item * p.context.mask_length + key] != 0;
      }
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
    if (!walk.in_tail) return end <= walk.length && p.context.mask == nullptr;
    return end <= walk.length - p.q_len + 1 && (end <= walk.skip_begin || position >= walk.skip_end);
  }

  __device__ __forceinline__ void consume(const Steps& walk, int stage) {
    const int position = walk.position + warp * kWarpKeys;
    if (position >= walk.length) return;
    const uint32_t keys = ring + stage * Memory::kStageBytes;
    float s[1][kBlocks][4];
    Math::scores(keys, query, lane, s[0]);
    to_logits(s, p.logits);
    if (!sees_all(walk, position)) hide(walk, position, s[0]);
    running.weigh(s, math);
    math.accumulate(keys + kWarpKeys * Math::kRowBytes, lane, s[0]);
  }

  __device__ __forceinline__ void flush(const Steps&) { running.flush(p, segment, math, outputs); }

  __device__ __forceinline__ void run() {
    Steps walk;
    walk.begin(p, lane);
    stream(*this, walk, p, p.context.depth);
  }
};

// Grid: p.context.row_blocks * p.context.workers.
template <class Math>
__global__ void __launch_bounds__(Math::kWarps * 32, 2) attend_kernel(const AttendParams p) {
  allow_dependents();
  Attend<Math>(p, kvzip_shared).run();
}

}  // namespace kvzip
