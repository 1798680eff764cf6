// Instantiates and launches the kernels. Build, together with bindings.cpp (see there), with nvcc 12.8 or later:
//
//   nvcc -O3 -std=c++17 -shared -Xcompiler -fPIC,-fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000
//     -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90
//     -gencode arch=compute_100,code=sm_100 -gencode arch=compute_120,code=[sm_120,compute_120]
//     -Icsrc/include -Icsrc/cuda -I<torch>/include csrc/cuda/launch.cu csrc/cuda/bindings.cpp
//     -L<torch>/lib -ltorch_cpu -o _cuda.so
//
// libtorch_cpu, of a torch with or without CUDA, is already in the process that loads the library, and found there by
// its name; nothing of torch's CUDA libraries is needed to link. The CUDA runtime is linked statically.
#include "launch.h"

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "dispatch.cuh"

namespace kvzip {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("kvzip: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int kMaxDevices = 64;

// Our CUDA runtime is not torch's, and does not learn from it which device is current.
void make_current(const Place& place) { check(cudaSetDevice(place.device), "the device cannot be used"); }

const DeviceLimits& limits_of(const Place& place) {
  static DeviceLimits known[kMaxDevices];
  static std::once_flag once[kMaxDevices];
  const int device = place.device;
  if (device < 0 || device >= kMaxDevices) throw std::runtime_error("kvzip: more CUDA devices than expected");
  std::call_once(once[device], [device] {
    DeviceLimits& d = known[device];
    const auto get = [device](int* value, cudaDeviceAttr attribute) {
      check(cudaDeviceGetAttribute(value, attribute, device), "device attributes");
    };
    get(&d.major, cudaDevAttrComputeCapabilityMajor);
    get(&d.processors, cudaDevAttrMultiProcessorCount);
    get(&d.shared_per_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    get(&d.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    get(&d.shared_reserved_per_block, cudaDevAttrReservedSharedMemoryPerBlock);
  });
  return known[device];
}

// Allows `kernel` the shared memory of the device, once per device and kernel.
template <auto kKernel>
void allow_shared_memory(const Place& place) {
  static std::atomic<bool> done[kMaxDevices];
  const int bytes = limits_of(place).shared_per_block, device = place.device;
  if (done[device].load(std::memory_order_acquire)) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory");
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "shared memory");
  done[device].store(true, std::memory_order_release);
}

}  // namespace

Workspace plan_attend(AttendParams& p, DType dtype, int head_dim, const Place& place) {
  const DeviceLimits& limits = limits_of(place);
  const int rows = rows_of(p, dtype, head_dim);
  with_math(dtype, head_dim, rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    using Memory = SharedMemory<Math>;
    const int stage_bytes = Math::kWarps * Memory::kStageBytes;
    const Ring ring = ring_of(limits, stage_bytes, Memory::kFixedBytes, kMaxDepth);
    if (ring.depth < 2) throw std::runtime_error("kvzip: the device has too little shared memory");
    p.depth = ring.depth;
    cut(p, rows, limits.processors * ring.blocks_per_processor);
  });
  const int64_t partial_rows = partial_blocks(p) * rows;
  return {partial_rows * head_dim, partial_rows * 2};
}

void launch_attend(const AttendParams& p, DType dtype, int head_dim, const Place& place) {
  make_current(place);
  const auto stream = static_cast<cudaStream_t>(place.stream);
  const int rows = rows_of(p, dtype, head_dim);
  with_math(dtype, head_dim, rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    constexpr auto attend = attend_kernel<Math>;
    constexpr auto merge = merge_kernel<typename Math::Element, Math::kHeadDim, Math::kRows>;
    allow_shared_memory<attend>(place);
    attend<<<p.row_blocks * p.workers, Math::kWarps * 32, SharedMemory<Math>::bytes(p.depth), stream>>>(p);
    check(cudaGetLastError(), "attend");

    // From sm_90 on the merge may be put in place while the last CTAs still work; it waits for them itself.
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(p.batch) * p.q_len * p.kv_heads * p.groups);
    config.blockDim = dim3(kMergeWarps * 32);
    config.dynamicSmemBytes = merge_shared_bytes(Math::kHeadDim);
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = limits_of(place).major >= 9 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, merge, p), "merge");
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
