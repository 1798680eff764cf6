// How a call is cut up for a device: from shapes and the device alone, never from lengths that live on the device.
#pragma once

#include <cmath>

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
inline int rows_of_block(int64_t rows, int head_dim, bool is_float32) {
  if (rows <= 8 || is_float32) return 8;
  return rows <= 16 || head_dim > 128 ? 16 : 32;
}

// The same for codes, which need more registers.
inline int rows_of_code_block(int64_t rows, int head_dim, bool is_float32) {
  return rows <= 8 || head_dim > 128 || is_float32 ? 8 : 16;
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

// Rows that want a key of the context, and a key of a tail.
inline int64_t rows_per_batch(const AttendParams& p) { return static_cast<int64_t>(p.groups) * p.q_len; }
inline int64_t rows_in_all(const AttendParams& p) { return p.batch * rows_per_batch(p); }

// Rows of a block of attend_kernel and of attend_codes_kernel.
inline int rows_of_context(const AttendParams& p, int head_dim) {
  const int64_t rows = p.context.cu_tiles == nullptr ? rows_per_batch(p) : rows_in_all(p);
  return rows_of_block(rows, head_dim, p.dtype == DType::kFloat32);
}
inline int rows_of_quantized(const AttendParams& p, int head_dim) {
  return rows_of_code_block(rows_in_all(p), head_dim, p.dtype == DType::kFloat32);
}

// Fills in the plan for blocks of `rows` rows on `resident` CTAs that run at once.
inline void cut(const AttendParams& p, Ragged& r, int rows, int resident) {
  r.rows = rows;
  r.row_blocks = r.cu_tiles == nullptr ? 1 : static_cast<int>((rows_in_all(p) + rows - 1) / rows);
  r.workers = resident > r.row_blocks ? resident / r.row_blocks : 1;
}

inline Logits logits_of(float scaling, float softcap) {
  constexpr float kLog2e = 1.44269504088896340736f;
  if (softcap == 0.0f) return {scaling * kLog2e, 0.0f, 0.0f};
  return {0.0f, scaling / softcap, softcap * kLog2e};
}

// What queries are multiplied by before they become float16 and are multiplied by a scale of keys. A code times that is
// then, but for a factor below 2, 2^(bits - 4) times a channel's part in a logit: float16 can hold the product with the
// scale, and its error, wherever logits make sense.
inline float query_factor_of(const AttendParams& p) {
  if (p.dtype == DType::kFloat32 || p.scaling == 0.0f) return 1.0f;
  return std::ldexp(1.0f, std::ilogb(p.scaling) + p.quantized.bits - 4);
}

// The rest of the plan, once what is ragged is cut; returns the rows of partial results.
inline int64_t place_results(AttendParams& p) {
  Ragged &context = p.context, &quantized = p.quantized.rows;
  p.tail_row_blocks = static_cast<int>((rows_per_batch(p) + context.rows - 1) / context.rows);
  context.first_row = 0;
  quantized.first_row = tail_row(p, tail_slots(p));
  p.quantized.query_factor = query_factor_of(p);
  p.logits = logits_of(p.scaling, p.softcap);
  p.quantized.logits = logits_of(p.scaling / p.quantized.query_factor, p.softcap);
  return ragged_row(quantized, p.kv_heads, quantized.row_blocks, 0);
}

}  // namespace kvzip
