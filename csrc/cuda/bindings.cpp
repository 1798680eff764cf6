// The ops of kvzip for the CUDA dispatch key, through torch's stable ABI. The schemas are registered in Python; every
// argument is checked here. Build: see launch.cu. The tests build this file a second time, with KVZIP_EMULATED, for the
// CPU and with emulated kernels.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"

// Absent where torch is built without CUDA; the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace {

using namespace kvzip;

#if defined(KVZIP_EMULATED)

struct CurrentPlace {
  explicit CurrentPlace(const Tensor&) {}
  Place place{0, nullptr};
};

#else

using CurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

// The linker finds the function only if torch's CUDA library is in our scope, which depends on how we were loaded; that
// library itself is in the process whenever there are CUDA tensors.
CurrentStream find_current_stream() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
  require(found != nullptr, "this torch is built without CUDA");
  return reinterpret_cast<CurrentStream>(found);
}

// The tensor's device and torch's stream there; the device is current for as long as this lives.
struct CurrentPlace {
  explicit CurrentPlace(const Tensor& tensor) : guard(tensor.get_device_index()) {
    static const CurrentStream current_stream = find_current_stream();
    place.device = tensor.get_device_index();
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream(place.device, &place.stream));
  }
  torch::stable::accelerator::DeviceGuard guard;
  Place place{0, nullptr};
};

#endif

std::tuple<Tensor, Tensor> attend(Tensor query, std::optional<Tensor> keys, std::optional<Tensor> values,
                                  std::optional<Tensor> cu_seqlens, std::optional<Tensor> cu_tiles,
                                  std::optional<Tensor> mask, Tensor tail_keys, Tensor tail_values, int64_t tail_length,
                                  std::optional<Tensor> tail_cursor, std::optional<Tensor> tail_skip, double scaling,
                                  std::optional<double> softcap, std::optional<Tensor> sinks, int64_t bits,
                                  std::optional<Tensor> key_codes, std::optional<Tensor> value_codes,
                                  std::optional<Tensor> key_scales, std::optional<Tensor> value_scales,
                                  std::optional<Tensor> quantized_cu_seqlens, std::optional<Tensor> quantized_cu_tiles,
                                  std::optional<Tensor> quantized_mask) {
  require(query.dim() == 4, "query has shape ", shape_of(query), "; expected (batch, heads, q_len, head_dim)");
  const int head_dim = head_dim_of(query);
  const int64_t batch = query.size(0), query_heads = query.size(1), q_len = query.size(2);
  require(tail_keys.dim() == 4, "tail_keys has shape ", shape_of(tail_keys),
          "; expected (batch, KV heads, capacity, head_dim)");
  const int64_t kv_heads = tail_keys.size(1), capacity = tail_keys.size(2);
  require(batch * query_heads * q_len <= kMaxInt && capacity <= kMaxInt, "query or tail_keys has too many rows");

  AttendParams p{};
  p.dtype = dtype_of("query", query);
  p.batch = static_cast<int>(batch), p.kv_heads = static_cast<int>(kv_heads), p.q_len = static_cast<int>(q_len);
  p.groups = groups_of(query_heads, kv_heads);
  p.scaling = static_cast<float>(scaling), p.softcap = softcap_of(softcap);

  query = aligned(query);
  p.query = query.data_ptr(), p.query_strides = strides_of(query);

  require(keys.has_value() == values.has_value() && keys.has_value() == cu_seqlens.has_value() &&
              keys.has_value() == cu_tiles.has_value(),
          "keys, values, cu_seqlens and cu_tiles must all be given, or none of them");
  require(!mask || keys.has_value(), "mask is given without keys");
  if (keys) {
    require(keys->dim() == 2, "keys has shape ", shape_of(*keys), "; expected (total_kv, head_dim)");
    const int64_t total = keys->size(0);
    require_shape("keys", *keys, {total, head_dim});
    require_shape("values", *values, {total, head_dim});
    require(keys->is_contiguous(), "keys must be contiguous");
    require(values->is_contiguous(), "values must be contiguous");
    require_rows("keys", *keys, query);
    require_rows("values", *values, query);
    p.context = ragged("", total, kv_heads, *cu_seqlens, *cu_tiles, mask, query);
    p.keys = keys->data_ptr(), p.values = values->data_ptr();
  }
  require(bits == 8 || bits == 4 || (bits == 0 && !key_codes && !value_codes), "bits is ", bits,
          "; expected 8, 4, or 0 without codes");
  if (bits != 0) {
    require(key_codes && value_codes && key_scales && value_scales && quantized_cu_seqlens && quantized_cu_tiles,
            "codes, scales, quantized_cu_seqlens and quantized_cu_tiles must all be given with bits ", bits);
    require(key_codes->dim() == 2 && key_scales->dim() == 3, "key_codes and key_scales need 2 and 3 dimensions");
    const int64_t rows = key_codes->size(0), bytes = head_dim * bits / 8;
    Quantized& q = p.quantized;
    q.bits = static_cast<int>(bits);
    q.key_codes = packed("key_codes", *key_codes, query, ScalarType::Byte, "uint8", {rows, bytes});
    q.value_codes = packed("value_codes", *value_codes, query, ScalarType::Byte, "uint8", {rows, bytes});
    q.key_scales =
        packed("key_scales", *key_scales, query, ScalarType::Half, "float16", {key_scales->size(0), 2, head_dim});
    q.value_scales = packed("value_scales", *value_scales, query, ScalarType::Half, "float16", {rows, 2});
    q.rows = ragged("quantized_", rows, kv_heads, *quantized_cu_seqlens, *quantized_cu_tiles, quantized_mask, query);
  }

  require_shape("tail_keys", tail_keys, {batch, kv_heads, capacity, head_dim});
  require_shape("tail_values", tail_values, {batch, kv_heads, capacity, head_dim});
  require_rows("tail_keys", tail_keys, query);
  require_rows("tail_values", tail_values, query);
  p.tail_keys = tail_keys.data_ptr(), p.tail_values = tail_values.data_ptr();
  p.tail_key_strides = strides_of(tail_keys), p.tail_value_strides = strides_of(tail_values);
  p.capacity = capacity, p.tail_length = tail_length;
  if (tail_cursor) {
    require(tail_cursor->numel() == 1, "tail_cursor has shape ", shape_of(*tail_cursor), "; expected one element");
    require_device("tail_cursor", *tail_cursor, query);
    require_dtype("tail_cursor", *tail_cursor, ScalarType::Long, "int64");
    p.tail_cursor = static_cast<const int64_t*>(tail_cursor->data_ptr());
  } else {
    require(q_len <= tail_length && tail_length <= capacity, "tail_length is ", tail_length, "; expected from q_len ",
            q_len, " to the capacity ", capacity);
  }
  if (tail_skip) p.tail_skip = integers("tail_skip", *tail_skip, query, {batch, 2});
  if (sinks) {
    require_device("sinks", *sinks, query);
    require_shape("sinks", *sinks, {query_heads});
    require(sinks->is_contiguous(), "sinks must be contiguous");
    p.sinks = sinks->data_ptr(), p.sinks_dtype = dtype_of("sinks", *sinks);
  }

  Tensor output = torch::stable::new_empty(query, {batch, q_len, query_heads, head_dim});
  Tensor lse = torch::stable::new_empty(query, {batch, query_heads, q_len}, ScalarType::Float);
  if (output.numel() == 0) return {output, lse};
  const CurrentPlace current(query);
  const Workspace need = plan_attend(p, head_dim, current.place);
  const Tensor workspace = torch::stable::new_empty(query, {need.output_floats + need.stats_floats}, ScalarType::Float);
  p.partial_output = static_cast<float*>(workspace.data_ptr());
  p.partial_stats = p.partial_output + need.output_floats;
  p.output = output.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  launch_attend(p, head_dim, current.place);
  return {output, lse};
}

Tensor column_max(Tensor query, Tensor keys, Tensor lse, double scaling, std::optional<double> softcap) {
  require(query.dim() == 3, "query has shape ", shape_of(query), "; expected (heads, q_len, head_dim)");
  require(keys.dim() == 3, "keys has shape ", shape_of(keys), "; expected (KV heads, kv_len, head_dim)");
  const DType dtype = dtype_of("query", query);
  const int head_dim = head_dim_of(query);
  const int64_t query_heads = query.size(0), q_len = query.size(1), kv_heads = keys.size(0), kv_len = keys.size(1);
  require(query_heads <= 65535 && q_len <= kMaxInt && kv_len <= kMaxInt, "query or keys has too many rows");
  query = aligned(query);
  require_shape("keys", keys, {kv_heads, kv_len, head_dim});
  require_rows("keys", keys, query);
  require_device("lse", lse, query);
  require_dtype("lse", lse, ScalarType::Float, "float32");
  require_shape("lse", lse, {query_heads, q_len});
  if (!lse.is_contiguous()) lse = torch::stable::contiguous(lse);

  ColumnMaxParams p{};
  p.kv_heads = static_cast<int>(kv_heads), p.groups = groups_of(query_heads, kv_heads);
  p.q_len = static_cast<int>(q_len), p.kv_len = static_cast<int>(kv_len);
  p.scaling = static_cast<float>(scaling), p.softcap = softcap_of(softcap);
  p.query = query.data_ptr(), p.keys = keys.data_ptr(), p.lse = static_cast<const float*>(lse.data_ptr());
  p.query_head_stride = query.stride(0), p.query_token_stride = query.stride(1);
  p.key_head_stride = keys.stride(0), p.key_token_stride = keys.stride(1);
  Tensor output = torch::stable::new_empty(query, {query_heads, kv_len}, ScalarType::Float);
  torch::stable::fill_(output, -std::numeric_limits<double>::infinity());
  if (output.numel() == 0 || q_len == 0) return output;
  const CurrentPlace current(query);
  p.output = static_cast<float*>(output.data_ptr());
  launch_column_max(p, dtype, head_dim, current.place);
  return output;
}

}  // namespace

#if defined(KVZIP_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(kvzip_emulated, CPU, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(kvzip, CUDA, library) {
#endif
  library.impl("attend", TORCH_BOX(&attend));
  library.impl("column_max", TORCH_BOX(&column_max));
}
