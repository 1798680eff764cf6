// How rows of keys, values and queries lie in shared memory, and the copy that puts them there.
#pragma once

#include "ptx.cuh"

namespace kvzip {

constexpr unsigned kFullWarp = 0xffffffffu;

// Rows of kRowBytes in 16-byte chunks. The chunks of a row are permuted so that the same chunk of eight consecutive
// rows, which ldmatrix reads at once, lies in eight different groups of banks.
template <int kRowBytes>
struct TileLayout {
  static_assert(kRowBytes % 16 == 0, "rows are made of chunks of 16 bytes");
  static constexpr int kChunks = kRowBytes / 16;
  // Rows begin in 8 / kAlign different groups of banks by turns, kAlign being the largest power of two, up to 8, that
  // divides kChunks; the permutation does the rest, within every kAlign chunks.
  static constexpr int kAlign = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : kChunks % 2 == 0 ? 2 : 1;
  static constexpr int kShift = kAlign == 8 ? 0 : kAlign == 4 ? 1 : kAlign == 2 ? 2 : 3;

  static __device__ __forceinline__ int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row >> kShift & (kAlign - 1)))) * 16;
  }
};

// Rows [begin, end) of a copy are not read: they become zeros, as do rows from `rows` on. Zeros, not what happens to be
// there, because a probability of 0 times NaN is NaN.
struct Rows {
  int rows, skip_begin, skip_end;
};

// One warp starts copying kRows rows, `stride` bytes apart, to `to`.
template <int kRowBytes, int kRows>
__device__ __forceinline__ void copy_rows(uint32_t to, const char* from, int64_t stride, Rows present, int lane) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % 32 == 0, "every lane copies the same number of chunks");
#pragma unroll 8
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int index = i * 32 + lane;
    const int row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < present.rows && !(row >= present.skip_begin && row < present.skip_end);
    copy16_async(to + TileLayout<kRowBytes>::offset(row, chunk), from + row * stride + chunk * 16, valid);
  }
}

// The same for rows that follow one another without gaps, of which the first `rows` are present: the addresses of all
// copies of a lane then are one and constants, which halves the instructions of a step.
template <int kRowBytes, int kRows>
__device__ __forceinline__ void copy_adjacent_rows(uint32_t to, const char* from, int rows, int lane) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows * kChunks % 32 == 0, "every lane copies the same number of chunks");
  from += lane * 16;
#pragma unroll 8
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    copy16_async(to + TileLayout<kRowBytes>::offset(row, chunk), from + i * 512, row < rows);
  }
}

// The same of those rows whose bit is set in `present`.
template <int kRowBytes, int kRows>
__device__ __forceinline__ void copy_chosen_rows(uint32_t to, const char* from, unsigned present, int lane) {
  constexpr int kChunks = kRowBytes / 16;
  static_assert(kRows <= 32 && kRows * kChunks % 32 == 0, "a bit a row; every lane copies the same number of chunks");
  from += lane * 16;
#pragma unroll 8
  for (int i = 0; i < kRows * kChunks / 32; ++i) {
    const int row = (i * 32 + lane) / kChunks, chunk = (i * 32 + lane) % kChunks;
    copy16_async(to + TileLayout<kRowBytes>::offset(row, chunk), from + i * 512, (present >> row & 1) != 0);
  }
}

}  // namespace kvzip
