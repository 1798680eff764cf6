// The kernels of one attention, one after the other; launch_attend without CUDA.
#pragma once

#include "dispatch.cuh"

namespace kvzip {

inline void run_attend(const AttendParams& p, int head_dim, const emulation::Options& options) {
  const auto blocks = [](const Ragged& r) { return dim3{static_cast<unsigned>(r.row_blocks * r.workers)}; };
  with_math(p.dtype, head_dim, p.context.rows, [&](auto type) {
    using Math = typename decltype(type)::type;
    emulation::launch(blocks(p.context), Math::kWarps * 32, SharedMemory<Math>::bytes(p.context.depth), options,
                      [&] { attend_kernel<Math>(p); });
  });
  const Ragged& r = p.quantized.rows;
  if (r.cu_tiles != nullptr) {
    with_codes(p.dtype, p.quantized.bits, head_dim, r.rows, [&](auto type) {
      using Codes = typename decltype(type)::type;
      emulation::launch(blocks(r), Codes::kWarps * 32, CodeMemory<Codes>::bytes(r.depth), options,
                        [&] { attend_codes_kernel<Codes>(p); });
    });
  }
  with_merge(p.dtype, head_dim, [&](auto element, auto dim) {
    using T = typename decltype(element)::type;
    constexpr int kHeadDim = decltype(dim)::value;
    const dim3 rows{static_cast<unsigned>(p.batch * p.q_len * p.kv_heads * p.groups)};
    emulation::launch(rows, kMergeWarps * 32, merge_shared_bytes(kHeadDim), options,
                      [&] { merge_kernel<T, kHeadDim>(p); });
  });
}

}  // namespace kvzip
