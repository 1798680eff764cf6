// Attention of packed query rows over quantised rows of a context: the partial results, as attend.cuh's.
//
// A step is half a tile a warp, so that the scales of a tile's channels, which are folded into the query anew each
// time, cost less than the codes. Nothing but codes and scales is read.
#pragma once

#include "codes32.cuh"

namespace kvzip {

template <class Codes>
struct CodeMemory {
  static constexpr int kStageBytes = Codes::Stage::kBytes;  // of one warp
  static constexpr int kFixedBytes = Codes::kQueryBytes + Running<Codes>::kSharedBytes;

  static constexpr int bytes(int depth) { return depth * Codes::kWarps * kStageBytes + kFixedBytes; }
};

template <class Codes>
struct AttendCodes {
  using Memory = CodeMemory<Codes>;
  using Stage = typename Codes::Stage;
  using Steps = RaggedWalk<kCodeKeys * Codes::kWarps>;
  static constexpr int kGroups = Codes::kGroups, kBlocks = Codes::kRowBlocksOf8;

  const AttendParams& p;
  const int warp, lane;
  uint32_t ring, query;  // addresses in shared memory; the ring is this warp's own
  Codes codes;
  Running<Codes> running;

  __device__ __forceinline__ explicit AttendCodes(const AttendParams& params)
      : p(params), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    ring = shared_address(kvzip_shared) + warp * p.quantized.rows.depth * Memory::kStageBytes;
    query = shared_address(after_ring());
  }

  __device__ __forceinline__ unsigned char* after_ring() const {
    return kvzip_shared + p.quantized.rows.depth * Codes::kWarps * Memory::kStageBytes;
  }

  // Where this warp's part of a step begins and ends, in keys of the head; there may be none.
  __device__ __forceinline__ int first_key(const Steps& walk) const { return walk.position + warp * kCodeKeys; }
  __device__ __forceinline__ int last_key(const Steps& walk) const {
    return walk.end < walk.length ? walk.end : walk.length;
  }

  // Starts the copy of this warp's part of a step.
  __device__ __forceinline__ void fetch(const Steps& walk, int stage) const {
    const int position = first_key(walk), rows = last_key(walk) - position;
    if (rows <= 0) return;
    const Quantized& q = p.quantized;
    const uint32_t to = ring + stage * Memory::kStageBytes;
    const int64_t row = walk.first_row + position;
    const auto* keys = static_cast<const char*>(q.key_codes) + row * Stage::kRowBytes;
    const auto* values = static_cast<const char*>(q.value_codes) + row * Stage::kRowBytes;
    copy_adjacent_rows<Stage::kRowBytes, kCodeKeys>(to, keys, rows, lane);
    copy_adjacent_rows<Stage::kRowBytes, kCodeKeys>(to + Stage::kValues, values, rows, lane);
    constexpr int kScaleBytes = Stage::kValueScales - Stage::kKeyScales;
    const int64_t tile = walk.item_tile + position / kTile;
    const auto* scales = static_cast<const char*>(q.key_scales) + tile * kScaleBytes;
#pragma unroll
    for (int at = 0; at < kScaleBytes; at += 512) {
      const int own = at + lane * 16;
      if (own < kScaleBytes) copy16_async(to + Stage::kKeyScales + own, scales + own, true);
    }
    const auto* pairs = static_cast<const char*>(q.value_scales) + row * 4;
    bool shown = lane < rows;
    if (shown && q.rows.mask != nullptr) shown = q.rows.mask[walk.item * q.rows.mask_length + position + lane] != 0;
    copy4_async(to + Stage::kValueScales + lane * 4, pairs + lane * 4, shown);
  }

  __device__ __forceinline__ Segment segment_of(const Steps& walk) const {
    return ragged_segment<Codes::kRows>(p, p.quantized.rows, walk.item);
  }

  // The barriers are those of Attend::begin_segment.
  __device__ __forceinline__ void begin_segment(const Steps& walk) {
    load_query<Codes>(p, segment_of(walk), [&](int row, int chunk, uint4 bits) {
      Codes::store_query(query, row, chunk, bits, p.dtype, p.quantized.query_factor);
    });
    codes.clear();
    running.clear();
    __syncthreads();
  }

  // Sets the scores of keys that nothing sees to -inf.
  __device__ __forceinline__ void hide(const Steps& walk, int position, float (&s)[kGroups][kBlocks][4]) const {
    const Ragged& r = p.quantized.rows;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = position + g * 16 + half * 8 + lane / 4;
        bool present = key < walk.length;
        if (present && r.mask != nullptr) present = r.mask[walk.item * r.mask_length + key] != 0;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          if (!present) s[g][n][2 * half] = s[g][n][2 * half + 1] = -INFINITY;
        }
      }
    }
  }

  __device__ __forceinline__ void consume(const Steps& walk, int stage) {
    const int position = first_key(walk);
    if (position >= last_key(walk)) return;
    const uint32_t at = ring + stage * Memory::kStageBytes;
    float s[kGroups][kBlocks][4];
    Codes::scores(at, query, lane, s);
    to_logits(s, p.quantized.logits);
    if (position + kCodeKeys > walk.length || p.quantized.rows.mask != nullptr) hide(walk, position, s);
    running.weigh(s, codes);
    codes.accumulate(at, lane, s);
  }

  __device__ __forceinline__ void flush(const Steps& walk) {
    running.flush(p, segment_of(walk), codes, reinterpret_cast<float*>(after_ring() + Codes::kQueryBytes));
  }

  __device__ __forceinline__ void run() {
    Steps walk;
    walk.begin(p.quantized.rows, p.kv_heads, lane);
    stream(*this, walk, p.quantized.rows, p.quantized.rows.depth);
  }
};

// Grid: p.quantized.rows.row_blocks * p.quantized.rows.workers.
template <class Codes>
__global__ void __launch_bounds__(Codes::kWarps * 32, 2) attend_codes_kernel(const AttendParams p) {
  allow_dependents();
  AttendCodes<Codes>(p).run();
  wait_for_prerequisites();  // so that who waits for this grid has waited for attend_kernel's, too
}

}  // namespace kvzip
