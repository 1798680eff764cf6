// From a dtype, a head_dim and a number of rows known at run time to the types of the kernels.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "column_max.cuh"
#include "merge.cuh"
#include "plan.h"

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

// The rows of a block for this call; below 32 blocks of rows are as small as they can be.
inline int rows_of(const AttendParams& p, DType dtype, int head_dim) {
  const int64_t rows = static_cast<int64_t>(p.keys == nullptr ? 1 : p.batch) * p.groups * p.q_len;
  return rows_of_block(rows > 32 ? 32 : static_cast<int>(rows), head_dim, dtype == DType::kFloat32);
}

// Calls f with the type of the attention's arithmetic, Type<Math>.
template <class T>
struct Type {
  using type = T;
};

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
