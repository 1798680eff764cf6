// What the launching files share: errors, the device's limits, and launches that may begin early.
#pragma once

#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "launch.h"
#include "plan.h"

namespace kvzip {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets it: it is reported here, not by the next launch
  throw std::runtime_error(std::string("kvzip: ") + what + ": " + cudaGetErrorString(error));
}

constexpr int kMaxDevices = 64;

// Our CUDA runtime is not torch's, and does not learn from it which device is current.
inline void make_current(const Place& place) { check(cudaSetDevice(place.device), "the device cannot be used"); }

inline const DeviceLimits& limits_of(const Place& place) {
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

// Launches a kernel with `p` as its only argument. From sm_90 on it may be put in place while the last CTAs of the one
// before still work; it waits for them itself, where it must.
template <class Params>
void launch_early(void (*kernel)(Params), const Params& p, dim3 grid, int threads, int shared_bytes,
                  const Place& place) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(place.stream);
  config.attrs = &early;
  config.numAttrs = limits_of(place).major >= 9 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, p), "launch");
}

}  // namespace kvzip
