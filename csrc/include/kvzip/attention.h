// Attention of query rows over a ragged, immutable context and a causal dense tail; plain pointers, no dependencies.
#pragma once

#include <cstdint>

#include "kvzip/schedule.h"

namespace kvzip {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// Quantised keys and values, which follow those of the context in every head; see kvzip/attention/quantized.py.
// x = code * scale + zero. Of 4 bits, a byte's low half is channel j, its high half channel j + head_dim / 2.
struct Quantized {
  int bits;                      // 8 or 4; 0: there are none
  const uint8_t* key_codes;      // (rows, head_dim * bits / 8)
  const uint8_t* value_codes;    // (rows, v_head_dim * bits / 8)
  const uint16_t* key_scales;    // (tiles, 2, head_dim) float16: scale and zero of each channel
  const uint16_t* value_scales;  // (rows, 2) float16: scale and zero of each token
  const int64_t* cu_seqlens;     // (num_kv_heads + 1)
  const int64_t* cu_tiles;       // (num_kv_heads + 1)
  const uint8_t* mask;           // (num_kv_heads, kv_len) or nullptr
  int64_t mask_stride;
};

// Strides are in elements; the last dimension is contiguous everywhere.
struct Attention {
  int64_t batch, num_heads, num_kv_heads, q_len, head_dim, v_head_dim;
  DType dtype;  // of query, keys, values and out

  const void* query;  // (batch, num_heads, q_len, head_dim)
  int64_t query_strides[3];

  // The context, the same for the whole batch: KV heads one after the other. keys == nullptr: there is none.
  const void* keys;           // (total_kv, head_dim)
  const void* values;         // (total_kv, v_head_dim)
  const int64_t* cu_seqlens;  // (num_kv_heads + 1)
  const int64_t* cu_tiles;    // (num_kv_heads + 1), see schedule.h
  const uint8_t* mask;        // (num_kv_heads, kv_len), 0 = not attended to; nullptr = all are
  int64_t mask_stride;

  Quantized quantized;

  // The tail, per batch row. Query i sees key j where j <= tail_length - q_len + i and j is not in [skip[0], skip[1]).
  const void* tail_keys;    // (batch, num_kv_heads, tail_length, head_dim)
  const void* tail_values;  // (batch, num_kv_heads, tail_length, v_head_dim)
  int64_t tail_key_strides[3], tail_value_strides[3];
  int64_t tail_length;
  const int64_t* tail_skip;  // (batch, 2) or nullptr

  float scaling;
  float softcap;       // 0 = none
  const float* sinks;  // (num_heads) or nullptr: one more logit in the softmax, without a value

  void* out;   // (batch, q_len, num_heads, v_head_dim) contiguous
  float* lse;  // (batch, num_heads, q_len), without the sinks; -inf where nothing is visible

  int64_t groups() const { return num_heads / num_kv_heads; }
  int64_t head_rows() const { return groups() * q_len; }  // rows of one KV head in one batch row
  int64_t context_tiles() const { return keys == nullptr ? 0 : cu_tiles[num_kv_heads]; }
  int64_t quantized_tiles() const { return quantized.bits == 0 ? 0 : quantized.cu_tiles[num_kv_heads]; }
  int64_t tail_tiles() const { return batch * num_kv_heads * tiles_of(tail_length); }
};

// The largest logit minus lse that each key gets, over the rows of each query head: what a KVzip score is the exp of.
struct ColumnMax {
  int64_t num_heads, num_kv_heads, q_len, kv_len, head_dim;
  DType dtype;        // of query and keys
  const void* query;  // (num_heads, q_len, head_dim)
  int64_t query_strides[2];
  const void* keys;  // (num_kv_heads, kv_len, head_dim)
  int64_t key_strides[2];
  const float* lse;  // (num_heads, q_len) contiguous
  float scaling;
  float softcap;
  float* out;  // (num_heads, kv_len) contiguous
};

// The kernels of one instruction set.
struct Kernels {
  const char* isa;
  // Floats of memory that the partial results of `workers` take.
  int64_t (*workspace)(const Attention&, int64_t workers);
  // Step 1, for every worker, in any order or at once: partial results into `workspace`.
  void (*attend)(const Attention&, int64_t worker, int64_t workers, float* workspace);
  // Step 2, for items [begin, end) of batch * num_kv_heads: merge the partial results into out and lse.
  void (*merge)(const Attention&, int64_t workers, const float* workspace, int64_t begin, int64_t end);
  // For items [begin, end) of num_kv_heads * tiles_of(kv_len).
  void (*column_max)(const ColumnMax&, int64_t begin, int64_t end);
};

// The best kernels for this processor, or those called `isa` ("avx512", "avx2", "generic"); nullptr: it has none such.
const Kernels* cpu_kernels(const char* isa = nullptr);

}  // namespace kvzip
