// What the attention kernels are told; plain data, no framework.
#pragma once

#include <cstdint>

namespace kvzip {

// Element strides of the dimensions before the last one, which is contiguous.
struct Strides {
  int64_t batch, head, token;
};

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// What turns the product of query and key into a logit to base 2: times `scale`, or, with a softcap, `outer` *
// tanh(times `inner`).
struct Logits {
  float scale, inner, outer;  // outer 0 = no softcap
};

// Ragged rows that the whole batch shares, KV heads one after the other, and the plan for them (plan.h).
struct Ragged {
  const int64_t* cu_seqlens;  // (kv_heads + 1) first row of each head; null = there are no rows
  const int64_t* cu_tiles;    // (kv_heads + 1) first tile of each head
  const uint8_t* mask;        // (kv_heads, mask_length) 0 = not attended to; null = all are
  int64_t mask_length;        // tokens

  int rows;           // of a block of packed query rows; row (b * groups + g) * q_len + i
  int row_blocks;     // such blocks
  int workers;        // of the schedule; CTA c is worker c / row_blocks of row block c % row_blocks
  int depth;          // stages of the ring
  int64_t first_row;  // of the partial results
};

// Rows that follow those of the context in every head, as codes: x = code * scale + zero. Of 4 bits, a byte's low half
// is channel j, its high half channel j + head_dim / 2.
struct Quantized {
  Ragged rows;
  int bits;                  // 8 or 4
  const void* key_codes;     // (rows, head_dim * bits / 8)
  const void* value_codes;   // the same
  const void* key_scales;    // (tiles, 2, head_dim) float16: scale and zero of each channel
  const void* value_scales;  // (rows, 2) float16: scale and zero of each token
  float query_factor;        // a power of two, see query_factor_of
  Logits logits;             // for a query times query_factor
};

struct AttendParams {
  const void* query;  // (batch, kv_heads * groups, q_len, head_dim)
  DType dtype;        // of query, keys, values and output
  Strides query_strides;
  Ragged context;
  const void* keys;    // (total_kv, head_dim), the rows of the context
  const void* values;  // the same
  Quantized quantized;
  const void* tail_keys;  // (batch, kv_heads, capacity, head_dim)
  const void* tail_values;
  Strides tail_key_strides, tail_value_strides;
  int64_t capacity, tail_length;  // tokens
  const int64_t* tail_cursor;     // the tail's length, where it changes without the host; null = tail_length
  const int64_t* tail_skip;       // (batch, 2) tail tokens [begin, end) that nothing sees; null = none
  int tail_row_blocks;            // blocks of packed rows over one batch row's tail; row g * q_len + i
  const void* sinks;              // (kv_heads * groups) extra logits; null = none
  DType sinks_dtype;
  float scaling, softcap;  // softcap 0 = none
  Logits logits;           // part of the plan
  int batch, kv_heads, groups, q_len;

  float* partial_output;  // (rows in all, head_dim) not yet divided by the sum
  float* partial_stats;   // (rows in all, 2) maximum (base-2 logits) and sum
  void* output;           // (batch, q_len, kv_heads * groups, head_dim)
  float* lse;             // (batch, kv_heads * groups, q_len)
};

struct ColumnMaxParams {
  const void* query;  // (kv_heads * groups, q_len, head_dim)
  const void* keys;   // (kv_heads, kv_len, head_dim)
  int64_t query_head_stride, query_token_stride, key_head_stride, key_token_stride;  // elements
  const float* lse;                                                                  // (kv_heads * groups, q_len)
  float scaling, softcap;                                                            // softcap 0 = none
  int kv_heads, groups, q_len, kv_len;
  int splits;     // CTAs that share the query rows of a tile of keys
  float* output;  // (kv_heads * groups, kv_len), -inf at the start
};

}  // namespace kvzip
