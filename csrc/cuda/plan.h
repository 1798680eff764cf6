// How a call is cut up for a device: from shapes and the device alone, never from lengths that live on the device.
#pragma once

#include "walk.cuh"

namespace kvzip {

struct DeviceLimits {
  int major;                      // of the compute capability
  int processors;                 // SMs
  int shared_per_processor;       // bytes
  int shared_per_block;           // bytes, opted in
  int shared_reserved_per_block;  // bytes
};

// Rows of a block: a multiple of 8, so that a decoding step wastes little, but not more than the registers can hold.
inline int rows_of_block(int rows, int head_dim, bool is_float32) {
  if (rows <= 8 || is_float32) return 8;
  return rows <= 16 || head_dim > 128 ? 16 : 32;
}

// Stages of the ring and CTAs per SM: two CTAs where both get two stages or more, which is what launch bounds allow.
struct Ring {
  int depth, blocks_per_processor;
};

inline Ring ring_of(const DeviceLimits& device, int stage_bytes, int fixed_bytes, int max_depth) {
  Ring ring{0, 0};
  for (int blocks = 2; blocks >= 1 && ring.depth < 2; --blocks) {
    int bytes = device.shared_per_processor / blocks - device.shared_reserved_per_block;
    if (bytes > device.shared_per_block) bytes = device.shared_per_block;
    ring.depth = (bytes - fixed_bytes) / stage_bytes;
    ring.blocks_per_processor = blocks;
  }
  if (ring.depth > max_depth) ring.depth = max_depth;
  return ring;
}

// Fills in the plan for blocks of `rows` rows on `resident` CTAs that run at once.
inline void cut(AttendParams& p, int rows, int resident) {
  const int64_t rows_per_batch = static_cast<int64_t>(p.groups) * p.q_len;
  p.tail_row_blocks = static_cast<int>((rows_per_batch + rows - 1) / rows);
  p.row_blocks = p.keys == nullptr ? 1 : static_cast<int>((p.batch * rows_per_batch + rows - 1) / rows);
  p.workers = resident > p.row_blocks ? resident / p.row_blocks : 1;
}

// Blocks of partial results, each of a block's rows.
inline int64_t partial_blocks(const AttendParams& p) { return p.row_blocks * context_slots(p) + tail_slots(p); }

}  // namespace kvzip
