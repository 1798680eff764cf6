// launch.h under emulation: with bindings.cpp, ops of torch for the CPU that run the CUDA kernels' source.
// Build: see tests/attention/test_cuda_emulation.py.
#include "launch.h"

#include <algorithm>

#include "dispatch.cuh"

namespace kvzip {
namespace {

// A device of few, large SMs, so that the CTAs have more than one tile each.
constexpr DeviceLimits kDevice{8, 3, 167936, 166912, 1024};

}  // namespace

Workspace plan_attend(AttendParams& p, DType dtype, int head_dim, const Place&) {
  const int rows = rows_of(p, dtype, head_dim);
  with_math(dtype, head_dim, rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    using Memory = SharedMemory<Math>;
    const Ring ring = ring_of(kDevice, Math::kWarps * Memory::kStageBytes, Memory::kFixedBytes, kMaxDepth);
    p.depth = ring.depth;
    cut(p, rows, kDevice.processors * ring.blocks_per_processor);
  });
  const int64_t partial_rows = partial_blocks(p) * rows;
  return {partial_rows * head_dim, partial_rows * 2};
}

void launch_attend(const AttendParams& p, DType dtype, int head_dim, const Place&) {
  emulation::forget_reads();
  emulation::allow_reads(nullptr, SIZE_MAX);  // the driver in main.cpp checks what is read
  with_math(dtype, head_dim, rows_of(p, dtype, head_dim), [&](auto type) {
    using Math = typename decltype(type)::type;
    emulation::launch({static_cast<unsigned>(p.row_blocks * p.workers)}, Math::kWarps * 32,
                      SharedMemory<Math>::bytes(p.depth), {}, [&] { attend_kernel<Math>(p); });
    emulation::launch({static_cast<unsigned>(p.batch * p.q_len * p.kv_heads * p.groups)}, kMergeWarps * 32,
                      merge_shared_bytes(Math::kHeadDim), {},
                      [&] { merge_kernel<typename Math::Element, Math::kHeadDim, Math::kRows>(p); });
  });
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
