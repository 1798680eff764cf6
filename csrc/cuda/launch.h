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

// A CUDA device and one of its streams (a cudaStream_t).
struct Place {
  int device;
  void* stream;
};

// Completes `p` with the plan for the device and returns what its partial results need, in floats. head_dim must be
// supported (is_supported). Throws std::runtime_error with what CUDA says, or if the device is too small.
Workspace plan_attend(AttendParams& p, int head_dim, const Place& place);

// Both return without waiting, and leave the device current. Throw std::runtime_error with what CUDA says.
void launch_attend(const AttendParams& p, int head_dim, const Place& place);
void launch_column_max(ColumnMaxParams p, DType dtype, int head_dim, const Place& place);

// The part of launch_attend that attends to quantised rows.
void launch_codes(const AttendParams& p, int head_dim, const Place& place);

inline bool is_supported(int64_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

}  // namespace kvzip
