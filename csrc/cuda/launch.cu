// Instantiates and launches the kernels but for those of codes. Build, together with launch_codes.cu and bindings.cpp
// (see there), with nvcc 12.8 or later:
//
//   nvcc -O3 -std=c++17 -shared -Xcompiler -fPIC,-fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000
//     -gencode arch=compute_80,code=[sm_80,compute_80] and the same with 90, 100 and 120
//     -Icsrc/include -Icsrc/cuda -I<torch>/include csrc/cuda/launch.cu csrc/cuda/launch_codes.cu csrc/cuda/bindings.cpp
//     -L<torch>/lib -ltorch_cpu -o _cuda.so
//
// libtorch_cpu, of a torch with or without CUDA, is already in the process that loads the library, and found there by
// its name; nothing of torch's CUDA libraries is needed to link. The CUDA runtime is linked statically.
#include "device.h"
#include "dispatch.cuh"

namespace kvzip {

Workspace plan_attend(AttendParams& p, int head_dim, const Place& place) { return plan(p, head_dim, limits_of(place)); }

void launch_attend(const AttendParams& p, int head_dim, const Place& place) {
  make_current(place);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  with_math(p.dtype, head_dim, p.context.rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    constexpr auto attend = attend_kernel<Math>;
    const int blocks = p.context.row_blocks * p.context.workers;
    allow_shared_memory<attend>(place);
    attend<<<blocks, Math::kWarps * 32, SharedMemory<Math>::bytes(p.context.depth), stream>>>(p);
    check(cudaGetLastError(), "attend");
  });
  if (p.quantized.rows.cu_tiles != nullptr) launch_codes(p, head_dim, place);
  with_merge(p.dtype, head_dim, [&](auto element, auto dim) {
    using T = typename decltype(element)::type;
    constexpr int kHeadDim = decltype(dim)::value;
    const dim3 grid(static_cast<unsigned>(p.batch) * p.q_len * p.kv_heads * p.groups);
    launch_early(merge_kernel<T, kHeadDim>, p, grid, kMergeWarps * 32, merge_shared_bytes(kHeadDim), place);
  });
}

void launch_column_max(ColumnMaxParams p, DType dtype, int head_dim, const Place& place) {
  make_current(place);
  // Enough CTAs to fill the device twice over, where keys and heads alone are too few.
  const int64_t tiles = static_cast<int64_t>((p.kv_len + 127) / 128) * p.kv_heads * p.groups;
  const int64_t wanted = (4 * limits_of(place).processors + tiles - 1) / tiles, most = (p.q_len + 63) / 64;
  p.splits = static_cast<int>(wanted < most ? wanted : most);
  with_column_max(dtype, head_dim, [&](auto type) {
    using Work = typename decltype(type)::type;
    constexpr auto kernel = column_max_kernel<Work>;
    allow_shared_memory<kernel>(place);
    const dim3 grid((p.kv_len + Work::kTileKeys - 1) / Work::kTileKeys, p.kv_heads * p.groups, p.splits);
    kernel<<<grid, Work::kWarps * 32, Work::kSharedBytes, static_cast<cudaStream_t>(place.stream)>>>(p);
    check(cudaGetLastError(), "column_max");
  });
}

}  // namespace kvzip
