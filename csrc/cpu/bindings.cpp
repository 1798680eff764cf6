// The CPU kernels as torch operators, through PyTorch's stable ABI. The schemas are defined in kvzip/attention/native.py.

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "kvzip/attention.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A worker should have at least this many multiplications, else starting it costs more than it saves.
constexpr int64_t kLeastWork = 1 << 18;
// Tiles of one worker's share, and so of one running sum: a longer one would lose to rounding. Threads then have several.
constexpr int64_t kMostTiles = 128;

kvzip::DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kvzip::DType::kFloat32;
    case ScalarType::BFloat16:
      return kvzip::DType::kBFloat16;
    case ScalarType::Half:
      return kvzip::DType::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

void check_like(const Tensor& tensor, const char* name, int64_t dim, const Tensor& query) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == query.scalar_type(), name, " must have the dtype of query");
  STD_TORCH_CHECK(tensor.device() == query.device(), name, " must be on the device of query");
  STD_TORCH_CHECK(tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name, "'s last dimension must be contiguous");
}

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  return same;
}

const int64_t* offsets(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be given with its rows");
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && has_shape(*tensor, {count}) && tensor->is_contiguous(),
                  name, " must be ", count, " contiguous int64");
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

// `prefix`: of the two names.
void check_schedule(const char* prefix, const int64_t* cu_seqlens, const int64_t* cu_tiles, int64_t heads,
                    int64_t rows) {
  for (int64_t head = 0; head < heads; ++head) {
    const int64_t length = cu_seqlens[head + 1] - cu_seqlens[head];
    STD_TORCH_CHECK(length >= 0, prefix, "cu_seqlens must not decrease");
    STD_TORCH_CHECK(cu_tiles[head + 1] - cu_tiles[head] == kvzip::tiles_of(length), prefix,
                    "cu_tiles must count the tiles of ", prefix, "cu_seqlens");
  }
  STD_TORCH_CHECK(cu_seqlens[0] == 0 && cu_tiles[0] == 0, prefix, "cu_seqlens and ", prefix,
                  "cu_tiles must begin with 0");
  STD_TORCH_CHECK(cu_seqlens[heads] == rows, prefix, "cu_seqlens must end with the rows of keys and values, ", rows);
}

// Codes or scales of quantised rows.
const void* packed(const std::optional<Tensor>& tensor, const char* name, ScalarType type,
                   std::initializer_list<int64_t> shape, const Tensor& query) {
  STD_TORCH_CHECK(tensor.has_value(), name, " must be given with bits");
  std::string wanted;
  for (const int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(tensor->scalar_type() == type && tensor->is_contiguous() && has_shape(*tensor, shape) &&
                      tensor->device() == query.device(),
                  name, " must be contiguous ", type == ScalarType::Byte ? "uint8" : "float16", " of shape (", wanted,
                  "), on the device of query");
  return tensor->const_data_ptr();
}

const uint8_t* rows_mask(const std::optional<Tensor>& mask, const char* name, int64_t heads,
                         const int64_t* cu_seqlens, int64_t* stride) {
  if (!mask) return nullptr;
  bool fits = mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->is_contiguous() &&
              mask->size(0) == heads;
  for (int64_t head = 0; fits && head < heads; ++head) {
    fits = cu_seqlens[head + 1] - cu_seqlens[head] == mask->size(1);
  }
  STD_TORCH_CHECK(fits, name, " must be contiguous bool (num_kv_heads, kv_len), which needs equal lengths");
  *stride = mask->size(1);
  return static_cast<const uint8_t*>(mask->const_data_ptr());
}

float softcap_of(const std::optional<double>& softcap) {
  STD_TORCH_CHECK(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "softcap must be positive or None, got ",
                  softcap.value_or(0.0));
  return static_cast<float>(softcap.value_or(0.0));
}

template <class Function>
void parallel(int64_t items, const Function& function) {
  if (items == 1) {
    function(0, 1);
  } else {
    torch::stable::parallel_for(0, items, 1, function);
  }
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const std::optional<Tensor>& keys,
                                  const std::optional<Tensor>& values, const std::optional<Tensor>& cu_seqlens,
                                  const std::optional<Tensor>& cu_tiles, const std::optional<Tensor>& mask,
                                  const Tensor& tail_keys, const Tensor& tail_values, int64_t tail_length,
                                  const std::optional<Tensor>& tail_cursor, const std::optional<Tensor>& tail_skip,
                                  double scaling, std::optional<double> softcap, const std::optional<Tensor>& sinks,
                                  int64_t bits, const std::optional<Tensor>& key_codes,
                                  const std::optional<Tensor>& value_codes, const std::optional<Tensor>& key_scales,
                                  const std::optional<Tensor>& value_scales,
                                  const std::optional<Tensor>& quantized_cu_seqlens,
                                  const std::optional<Tensor>& quantized_cu_tiles,
                                  const std::optional<Tensor>& quantized_mask) {
  kvzip::Attention a = {};
  STD_TORCH_CHECK(query.dim() == 4, "query must have 4 dimensions, got ", query.dim());
  check_like(query, "query", 4, query);
  check_like(tail_keys, "tail_keys", 4, query);
  check_like(tail_values, "tail_values", 4, query);
  a.batch = query.size(0);
  a.num_heads = query.size(1);
  a.q_len = query.size(2);
  a.head_dim = query.size(3);
  a.num_kv_heads = tail_keys.size(1);
  a.v_head_dim = tail_values.size(3);
  a.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(a.batch > 0, "query has a batch of 0");
  STD_TORCH_CHECK(a.num_kv_heads > 0 && a.num_heads % a.num_kv_heads == 0, "query has ", a.num_heads,
                  " heads, which is no multiple of the ", a.num_kv_heads, " of tail_keys");
  if (tail_cursor) {
    STD_TORCH_CHECK(tail_cursor->scalar_type() == ScalarType::Long && tail_cursor->numel() == 1,
                    "tail_cursor must be one int64");
  }
  a.tail_length = tail_cursor ? *static_cast<const int64_t*>(tail_cursor->const_data_ptr()) : tail_length;
  STD_TORCH_CHECK(a.q_len >= 1 && a.q_len <= a.tail_length && a.tail_length <= tail_keys.size(2),
                  "tail_length must be from q_len ", a.q_len, " to the capacity ", tail_keys.size(2), ", got ",
                  a.tail_length);
  STD_TORCH_CHECK(tail_keys.size(0) == a.batch && tail_keys.size(3) == a.head_dim,
                  "tail_keys must have query's batch and head_dim");
  STD_TORCH_CHECK(tail_values.size(0) == a.batch && tail_values.size(1) == a.num_kv_heads &&
                      tail_values.size(2) >= a.tail_length,
                  "tail_values must have tail_keys' batch, heads and capacity");
  for (int i = 0; i < 3; ++i) {
    a.query_strides[i] = query.stride(i);
    a.tail_key_strides[i] = tail_keys.stride(i);
    a.tail_value_strides[i] = tail_values.stride(i);
  }
  a.query = query.const_data_ptr();
  a.tail_keys = tail_keys.const_data_ptr();
  a.tail_values = tail_values.const_data_ptr();
  STD_TORCH_CHECK(keys.has_value() == values.has_value(), "keys and values must be given together");
  if (keys) {
    check_like(*keys, "keys", 2, query);
    check_like(*values, "values", 2, query);
    STD_TORCH_CHECK(keys->is_contiguous() && values->is_contiguous(), "keys and values must be contiguous");
    STD_TORCH_CHECK(keys->size(1) == a.head_dim, "keys must have head_dim ", a.head_dim, ", got ", keys->size(1));
    STD_TORCH_CHECK(values->size(1) == a.v_head_dim, "values must have head_dim ", a.v_head_dim);
    a.keys = keys->const_data_ptr();
    a.values = values->const_data_ptr();
    STD_TORCH_CHECK(keys->size(0) == values->size(0), "keys and values must have as many rows");
    a.cu_seqlens = offsets(cu_seqlens, "cu_seqlens", a.num_kv_heads + 1);
    a.cu_tiles = offsets(cu_tiles, "cu_tiles", a.num_kv_heads + 1);
    check_schedule("", a.cu_seqlens, a.cu_tiles, a.num_kv_heads, keys->size(0));
    a.mask = rows_mask(mask, "mask", a.num_kv_heads, a.cu_seqlens, &a.mask_stride);
  }
  STD_TORCH_CHECK(bits == 8 || bits == 4 || (bits == 0 && !key_codes && !value_codes),
                  "bits must be 8 or 4, or 0 without codes, got ", bits);
  if (bits != 0) {
    STD_TORCH_CHECK(bits == 8 || (a.head_dim % 2 == 0 && a.v_head_dim % 2 == 0), "4 bits need an even head_dim");
    kvzip::Quantized& q = a.quantized;
    q.bits = static_cast<int>(bits);
    q.cu_seqlens = offsets(quantized_cu_seqlens, "quantized_cu_seqlens", a.num_kv_heads + 1);
    q.cu_tiles = offsets(quantized_cu_tiles, "quantized_cu_tiles", a.num_kv_heads + 1);
    const int64_t rows = q.cu_seqlens[a.num_kv_heads], tiles = q.cu_tiles[a.num_kv_heads];
    check_schedule("quantized_", q.cu_seqlens, q.cu_tiles, a.num_kv_heads, rows);
    const auto part = [&](const std::optional<Tensor>& tensor, const char* name, ScalarType type,
                          std::initializer_list<int64_t> shape) { return packed(tensor, name, type, shape, query); };
    const auto codes = [&](const std::optional<Tensor>& tensor, const char* name, int64_t head_dim) {
      return static_cast<const uint8_t*>(part(tensor, name, ScalarType::Byte, {rows, head_dim * bits / 8}));
    };
    q.key_codes = codes(key_codes, "key_codes", a.head_dim);
    q.value_codes = codes(value_codes, "value_codes", a.v_head_dim);
    q.key_scales =
        static_cast<const uint16_t*>(part(key_scales, "key_scales", ScalarType::Half, {tiles, 2, a.head_dim}));
    q.value_scales = static_cast<const uint16_t*>(part(value_scales, "value_scales", ScalarType::Half, {rows, 2}));
    q.mask = rows_mask(quantized_mask, "quantized_mask", a.num_kv_heads, q.cu_seqlens, &q.mask_stride);
  }
  if (tail_skip) {
    STD_TORCH_CHECK(tail_skip->scalar_type() == ScalarType::Long && tail_skip->dim() == 2 &&
                        tail_skip->is_contiguous() && tail_skip->size(0) == a.batch && tail_skip->size(1) == 2,
                    "tail_skip must be contiguous int64 (batch, 2)");
    a.tail_skip = static_cast<const int64_t*>(tail_skip->const_data_ptr());
  }
  if (sinks) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->dim() == 1 && sinks->is_contiguous() &&
                        sinks->size(0) == a.num_heads,
                    "sinks must be contiguous float32 (num_heads)");
    a.sinks = static_cast<const float*>(sinks->const_data_ptr());
  }
  a.scaling = static_cast<float>(scaling);
  a.softcap = softcap_of(softcap);

  Tensor out = torch::stable::new_empty(query, {a.batch, a.q_len, a.num_heads, a.v_head_dim});
  Tensor lse = torch::stable::new_empty(query, {a.batch, a.num_heads, a.q_len}, ScalarType::Float);
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());

  const kvzip::Kernels& kernels = *kvzip::cpu_kernels();
  const int64_t tiles = (a.context_tiles() + a.quantized_tiles()) * a.batch + a.tail_tiles();
  const int64_t work = tiles * kvzip::kTile * a.head_rows() * (a.head_dim + a.v_head_dim);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t busy = std::clamp<int64_t>(work / kLeastWork, 1, threads);
  const int64_t workers = busy * (1 + std::max(a.context_tiles(), a.quantized_tiles()) / (busy * kMostTiles));
  Tensor workspace = torch::stable::new_empty(query, {kernels.workspace(a, workers)}, ScalarType::Float);
  float* space = static_cast<float*>(workspace.mutable_data_ptr());
  parallel(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) kernels.attend(a, worker, workers, space);
  });
  const int64_t items = a.batch * a.num_kv_heads;
  const bool together = workers == 1 || items * a.head_rows() * a.v_head_dim < (1 << 16);
  if (together) {
    kernels.merge(a, workers, space, 0, items);
  } else {
    parallel(items, [&](int64_t begin, int64_t end) { kernels.merge(a, workers, space, begin, end); });
  }
  return {out, lse};
}

Tensor column_max(const Tensor& query, const Tensor& keys, const Tensor& lse, double scaling,
                  std::optional<double> softcap) {
  kvzip::ColumnMax c = {};
  check_like(query, "query", 3, query);
  check_like(keys, "keys", 3, query);
  c.num_heads = query.size(0);
  c.q_len = query.size(1);
  c.head_dim = query.size(2);
  c.num_kv_heads = keys.size(0);
  c.kv_len = keys.size(1);
  c.dtype = dtype_of(query, "query");
  STD_TORCH_CHECK(c.num_kv_heads > 0 && c.num_heads % c.num_kv_heads == 0, "query has ", c.num_heads,
                  " heads, which is no multiple of the ", c.num_kv_heads, " of keys");
  STD_TORCH_CHECK(keys.size(2) == c.head_dim, "keys must have head_dim ", c.head_dim, ", got ", keys.size(2));
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.is_contiguous() &&
                      lse.size(0) == c.num_heads && lse.size(1) == c.q_len,
                  "lse must be contiguous float32 (num_heads, q_len)");
  c.query = query.const_data_ptr();
  c.keys = keys.const_data_ptr();
  for (int i = 0; i < 2; ++i) {
    c.query_strides[i] = query.stride(i);
    c.key_strides[i] = keys.stride(i);
  }
  c.lse = static_cast<const float*>(lse.const_data_ptr());
  c.scaling = static_cast<float>(scaling);
  c.softcap = softcap_of(softcap);
  Tensor out = torch::stable::new_empty(query, {c.num_heads, c.kv_len}, ScalarType::Float);
  c.out = static_cast<float*>(out.mutable_data_ptr());
  const kvzip::Kernels& kernels = *kvzip::cpu_kernels();
  const int64_t items = c.num_kv_heads * kvzip::tiles_of(c.kv_len);
  if (items) parallel(items, [&](int64_t begin, int64_t end) { kernels.column_max(c, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kvzip, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend));
  m.impl("column_max", TORCH_BOX(&column_max));
}
