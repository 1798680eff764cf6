// launch.h under emulation: with bindings.cpp, ops of torch for the CPU that run the CUDA kernels' source.
// Build: see tests/attention/test_cuda_emulation.py.
#include "launch.h"

#include <algorithm>

#include "run.h"

namespace kvzip {
namespace {

// A device of few, large SMs, so that the CTAs have more than one tile each.
constexpr DeviceLimits kDevice{8, 3, 167936, 166912, 1024};

}  // namespace

Workspace plan_attend(AttendParams& p, int head_dim, const Place&) { return plan(p, head_dim, kDevice); }

void launch_attend(const AttendParams& p, int head_dim, const Place&) {
  emulation::forget_reads();
  emulation::allow_reads(nullptr, SIZE_MAX);  // the driver in main.cpp checks what is read
  run_attend(p, head_dim, {});
}

void launch_column_max(ColumnMaxParams p, DType dtype, int head_dim, const Place&) {
  emulation::forget_reads();
  emulation::allow_reads(nullptr, SIZE_MAX);
  p.splits = std::min(2, (p.q_len + 63) / 64);
  with_column_max(dtype, head_dim, [&](auto type) {
    using Work = typename decltype(type)::type;
    emulation::launch({static_cast<unsigned>((p.kv_len + Work::kTileKeys - 1) / Work::kTileKeys),
                       static_cast<unsigned>(p.kv_heads * p.groups), static_cast<unsigned>(p.splits)},
                      Work::kWarps * 32, Work::kSharedBytes, {}, [&] { column_max_kernel<Work>(p); });
  });
}

}  // namespace kvzip
