// What the attention kernels are told; plain data, no framework.
#pragma once

#include <cstdint>

namespace kvzip {

// Element strides of the dimensions before the last one, which is contiguous.
struct Strides {
  int64_t batch, head, token;
};

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

struct AttendParams {
  const void* query;  // (batch, kv_heads * groups, q_len, head_dim)
  Strides query_strides;
  const void* keys;             // (total_kv, head_dim), heads concatenated; null = no context
  const void* values;           // same rows
  const int64_t* cu_seqlens;    // (kv_heads + 1) first row of each head
  const int64_t* cu_tiles;      // (kv_heads + 1) first tile of each head
  const uint8_t* mask;          // (kv_heads, mask_length) 0 = not attended to; null = all are
  int64_t mask_length;          // tokens
  const void* tail_keys;        // (batch, kv_heads, capacity, head_dim)
  const void* tail_values;
  Strides tail_key_strides, tail_value_strides;
  int64_t capacity, tail_length;  // tokens
  const int64_t* tail_cursor;     // the tail's length, where it changes without the host; null = tail_length
  const int64_t* tail_skip;       // (batch, 2) tail tokens [begin, end) that nothing sees; null = none
  const void* sinks;              // (kv_heads * groups) extra logits; null = none
  DType sinks_dtype;
  float scaling, softcap;  // softcap 0 = none
  int batch, kv_heads, groups, q_len;

  // The plan (plan.h).
  int row_blocks;       // blocks of packed rows over the context; row (b * groups + g) * q_len + i
  int tail_row_blocks;  // blocks of packed rows over one batch row's tail; row g * q_len + i
  int workers;          // of the context's schedule; CTA c is worker c / row_blocks of row block c % row_blocks
  int depth;            // stages of the ring

  float* partial_output;  // (slots in all, rows of a block, head_dim) not yet divided by the sum
  float* partial_stats;   // (slots in all, rows of a block, 2) maximum (base-2 logits) and sum
  void* output;           // (batch, q_len, kv_heads * groups, head_dim)
  float* lse;             // (batch, kv_heads * groups, q_len)
};

struct ColumnMaxParams {
  const void* query;  // (kv_heads * groups, q_len, head_dim)
  const void* keys;   // (kv_heads, kv_len, head_dim)
  int64_t query_head_stride, query_token_stride, key_head_stride, key_token_stride;  // elements
  const float* lse;        // (kv_heads * groups, q_len)
  float scaling, softcap;  // softcap 0 = none
  int kv_heads, groups, q_len, kv_len;
  int splits;     // CTAs that share the query rows of a tile of keys
  float* output;  // (kv_heads * groups, kv_len), -inf at the start
};

}  // namespace kvzip
