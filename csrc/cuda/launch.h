// Launches of the kernels, without a framework.
#pragma once

#include <cstdint>

#include "kvzip/schedule.h"
#include "params.h"

namespace kvzip {

// Memory for partial results.
struct Workspace {
  int64_t output_floats, stats_floats;
};

// Completes `p` with the plan for the current device and returns what its partial results need, in floats. head_dim
// must be supported (is_supported). Throws std::runtime_error with what CUDA says, or if the device is too small.
Workspace plan_attend(AttendParams& p, DType dtype, int head_dim);

// Both on `stream` (a cudaStream_t) of the current device, without synchronising. Throw std::runtime_error.
void launch_attend(const AttendParams& p, DType dtype, int head_dim, void* stream);
void launch_column_max(ColumnMaxParams p, DType dtype, int head_dim, void* stream);

inline bool is_supported(int64_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

}  // namespace kvzip
