// Checks of the ops' arguments, which raise errors that name the argument and what was expected.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

#include "launch.h"

namespace kvzip {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i == 0 ? "" : ", ") << tensor.size(i);
  text << ')';
  return text.str();
}

inline void require_shape(std::string_view name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && tensor.size(i++) == size;
  if (same) return;
  std::ostringstream wanted;
  for (const int64_t size : shape) wanted << (wanted.tellp() > 0 ? ", " : "") << size;
  require(false, name, " has shape ", shape_of(tensor), "; expected (", wanted.str(), ")");
}

inline DType dtype_of(std::string_view name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: require(false, name, " has an unsupported dtype; expected float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline void require_dtype(std::string_view name, const Tensor& tensor, ScalarType dtype, const char* dtype_name) {
  require(tensor.scalar_type() == dtype, name, " must be ", dtype_name);
}

inline void require_device(std::string_view name, const Tensor& tensor, const Tensor& query) {
  require(tensor.device() == query.device(), name, " must be on the query's device");
}

// A tensor of one given kind, contiguous.
inline const void* data_of(std::string_view name, const Tensor& tensor, const Tensor& query, ScalarType dtype,
                           const char* dtype_name, std::initializer_list<int64_t> shape) {
  require_device(name, tensor, query);
  require_dtype(name, tensor, dtype, dtype_name);
  require_shape(name, tensor, shape);
  require(tensor.is_contiguous(), name, " must be contiguous");
  return tensor.data_ptr();
}

inline const int64_t* integers(std::string_view name, const Tensor& tensor, const Tensor& query,
                               std::initializer_list<int64_t> shape) {
  return static_cast<const int64_t*>(data_of(name, tensor, query, ScalarType::Long, "int64", shape));
}

// The schedule and the mask of `total` ragged rows, whose names begin with `prefix`; empty if there are no rows.
inline Ragged ragged(const std::string& prefix, int64_t total, int64_t kv_heads, const Tensor& cu_seqlens,
                     const Tensor& cu_tiles, const std::optional<Tensor>& mask, const Tensor& query) {
  require(total / kTile + kv_heads <= kMaxInt, "there are too many rows for ", prefix, "cu_tiles: ", total);
  Ragged r{};
  r.cu_seqlens = integers(prefix + "cu_seqlens", cu_seqlens, query, {kv_heads + 1});
  r.cu_tiles = integers(prefix + "cu_tiles", cu_tiles, query, {kv_heads + 1});
  if (total == 0) return {};
  if (mask) {
    require(total % kv_heads == 0, prefix, "mask needs heads of equal length");
    r.mask_length = total / kv_heads;
    r.mask = static_cast<const uint8_t*>(
        data_of(prefix + "mask", *mask, query, ScalarType::Bool, "bool", {kv_heads, r.mask_length}));
  }
  return r;
}

// Whether every row can be read 16 bytes at a time.
inline bool is_aligned(const Tensor& tensor) {
  const int64_t item = static_cast<int64_t>(tensor.element_size()), last = tensor.dim() - 1;
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0 || (tensor.size(last) > 1 && tensor.stride(last) != 1)) {
    return false;
  }
  for (int64_t i = 0; i < last; ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) * item % 16 != 0) return false;
  }
  return true;
}

// The tensor, or a copy that can be read so: one that is contiguous may still begin at an odd address.
inline Tensor aligned(const Tensor& tensor) {
  if (is_aligned(tensor)) return tensor;
  const Tensor dense = torch::stable::contiguous(tensor);
  return is_aligned(dense) ? dense : torch::stable::clone(dense);
}

// Keys or values: the query's dtype and device, rows that can be read 16 bytes at a time.
inline void require_rows(std::string_view name, const Tensor& tensor, const Tensor& query) {
  require_device(name, tensor, query);
  require(tensor.scalar_type() == query.scalar_type(), name, " and query must have the same dtype");
  require(tensor.numel() == 0 || is_aligned(tensor), name,
          " must have a contiguous last dimension, and rows that begin at multiples of 16 bytes");
}

// Codes or scales, read 16 bytes at a time.
inline const void* packed(std::string_view name, const Tensor& tensor, const Tensor& query, ScalarType dtype,
                          const char* dtype_name, std::initializer_list<int64_t> shape) {
  const void* data = data_of(name, tensor, query, dtype, dtype_name, shape);
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must begin at a multiple of 16 bytes");
  return data;
}

inline int head_dim_of(const Tensor& query) {
  const int64_t head_dim = query.size(query.dim() - 1);
  require(is_supported(head_dim), "query has head_dim ", head_dim, "; expected one of 64, 96, 128, 256");
  return static_cast<int>(head_dim);
}

// Number of query heads per KV head.
inline int groups_of(int64_t query_heads, int64_t kv_heads) {
  require(kv_heads > 0 && query_heads % kv_heads == 0, "query has ", query_heads,
          " heads, which is not a multiple of the ", kv_heads, " KV heads");
  return static_cast<int>(query_heads / kv_heads);
}

inline float softcap_of(const std::optional<double>& softcap) {
  require(!softcap || (*softcap > 0 && std::isfinite(*softcap)), "softcap must be positive or None");
  return softcap ? static_cast<float>(*softcap) : 0.0f;
}

inline Strides strides_of(const Tensor& tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

}  // namespace kvzip
