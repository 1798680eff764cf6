// Chooses the kernels at run time.

#include <cstring>

#include "kvzip/attention.h"

namespace kvzip {

#if defined(__x86_64__) && !defined(KVZIP_GENERIC_LANES)
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
#endif
namespace generic {
extern const Kernels kKernels;
}

const Kernels* cpu_kernels(const char* isa) {
  const auto wanted = [isa](const Kernels& kernels) { return isa == nullptr || std::strcmp(isa, kernels.isa) == 0; };
#if defined(__x86_64__) && !defined(KVZIP_GENERIC_LANES)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && wanted(avx512::kKernels)) return &avx512::kKernels;
  if (avx2 && wanted(avx2::kKernels)) return &avx2::kKernels;
#endif
  return wanted(generic::kKernels) ? &generic::kKernels : nullptr;
}

}  // namespace kvzip
