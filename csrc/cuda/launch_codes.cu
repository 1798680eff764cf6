// Instantiates and launches the kernels of codes; a file of its own, so that the two can be compiled side by side.
#include "device.h"
#include "dispatch.cuh"

namespace kvzip {

void launch_codes(const AttendParams& p, int head_dim, const Place& place) {
  const Ragged& r = p.quantized.rows;
  with_codes(p.dtype, p.quantized.bits, head_dim, r.rows, [&](auto type) {
    using Codes = typename decltype(type)::type;
    constexpr auto kernel = attend_codes_kernel<Codes>;
    allow_shared_memory<kernel>(place);
    const dim3 grid(static_cast<unsigned>(r.row_blocks) * r.workers);
    launch_early(kernel, p, grid, Codes::kWarps * 32, CodeMemory<Codes>::bytes(r.depth), place);
  });
}

}  // namespace kvzip
