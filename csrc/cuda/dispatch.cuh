// From what is known at run time to the types of the kernels, and the plan that follows from them.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "column_max.cuh"
#include "launch.h"
#include "merge.cuh"
#include "plan.h"
#include "quantized.cuh"

namespace kvzip {

// Calls f with a std::integral_constant of head_dim.
template <class F>
void with_head_dim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64: return f(std::integral_constant<int, 64>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 256: return f(std::integral_constant<int, 256>());
    default: throw std::runtime_error("kvzip: head_dim is not supported");
  }
}

// Hands a type to a function.
template <class T>
struct Type {
  using type = T;
};

// Calls f with Type<Math>, the arithmetic of the attention to context and tails for blocks of `rows` rows.
template <class F>
void with_math(DType dtype, int head_dim, int rows, F&& f) {
  with_head_dim(head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    const auto with_element = [&](auto element) {
      using T = typename decltype(element)::type;
      if (rows == 8) return f(Type<Math16<T, kHeadDim, 1>>());
      if (rows == 16) return f(Type<Math16<T, kHeadDim, 2>>());
      if constexpr (kHeadDim <= 128) return f(Type<Math16<T, kHeadDim, 4>>());
    };
    switch (dtype) {
      case DType::kBFloat16: return with_element(Type<BFloat16>());
      case DType::kFloat16: return with_element(Type<Float16>());
      default: return f(Type<Math32<kHeadDim>>());
    }
  });
}

// Calls f with Type<Codes>, that of the attention to quantised rows.
template <class F>
void with_codes(DType dtype, int bits, int head_dim, int rows, F&& f) {
  with_head_dim(head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    const auto with_bits = [&](auto chosen) {
      constexpr int kBits = decltype(chosen)::value;
      if (dtype == DType::kFloat32) return f(Type<Codes32<kHeadDim, kBits>>());
      if (rows == 8) return f(Type<Codes16<kHeadDim, 1, kBits>>());
      if constexpr (kHeadDim <= 128) return f(Type<Codes16<kHeadDim, 2, kBits>>());
    };
    if (bits == 8) return with_bits(std::integral_constant<int, 8>());
    return with_bits(std::integral_constant<int, 4>());
  });
}

// Calls f with Type<T> of the output's dtype and head_dim.
template <class F>
void with_merge(DType dtype, int head_dim, F&& f) {
  with_head_dim(head_dim, [&](auto dim) {
    switch (dtype) {
      case DType::kBFloat16: return f(Type<BFloat16>(), dim);
      case DType::kFloat16: return f(Type<Float16>(), dim);
      default: return f(Type<float>(), dim);
    }
  });
}

// Completes `p` with the plan for a device.
inline Workspace plan(AttendParams& p, int head_dim, const DeviceLimits& limits) {
  const auto cut_for = [&](Ragged& r, int rows, int stage_bytes, int fixed_bytes) {
    const Ring ring = ring_of(limits, stage_bytes, fixed_bytes, kMaxDepth);
    if (ring.depth < 2) throw std::runtime_error("kvzip: the device has too little shared memory");
    r.depth = ring.depth;
    cut(p, r, rows, limits.processors * ring.blocks_per_processor);
  };
  const int rows = rows_of_context(p, head_dim);
  with_math(p.dtype, head_dim, rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    using Memory = SharedMemory<Math>;
    cut_for(p.context, rows, Math::kWarps * Memory::kStageBytes, Memory::kFixedBytes);
  });
  if (p.quantized.rows.cu_tiles != nullptr) {
    const int code_rows = rows_of_quantized(p, head_dim);
    with_codes(p.dtype, p.quantized.bits, head_dim, code_rows, [&](auto type) {
      using Codes = typename decltype(type)::type;
      using Memory = CodeMemory<Codes>;
      cut_for(p.quantized.rows, code_rows, Codes::kWarps * Memory::kStageBytes, Memory::kFixedBytes);
    });
  }
  const int64_t partial_rows = place_results(p);
  return {partial_rows * head_dim, partial_rows * 2};
}

// Calls f with the type of the scoring's arithmetic.
template <class F>
void with_column_max(DType dtype, int head_dim, F&& f) {
  with_head_dim(head_dim, [&](auto dim) {
    constexpr int kHeadDim = decltype(dim)::value;
    switch (dtype) {
      case DType::kBFloat16: return f(Type<ColumnMax16<BFloat16, kHeadDim>>());
      case DType::kFloat16: return f(Type<ColumnMax16<Float16, kHeadDim>>());
      default: return f(Type<ColumnMax32<kHeadDim>>());
    }
  });
}

}  // namespace kvzip
