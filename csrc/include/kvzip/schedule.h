// The stream-K schedule of ragged attention; no dependencies, host and device.
//
// The keys of each KV head are cut into tiles of kTile. All tiles of all heads, in order, are split evenly over a fixed
// number of workers (CPU threads, or CTAs of a GPU), wherever heads begin and end. Everything follows from the prefix
// sums `cu_tiles`, which are made once, when a context is pruned, with `active(workers, tiles)` for `workers` below:
//   worker w owns tiles [worker_begin(w), worker_begin(w + 1)): counts differ by at most one;
//   a worker's tiles of one head are a segment; it leaves one partial result, in slot `worker + head`. Segments form a
//   monotone staircase in (worker, head), so that slots are unique and workers + heads - 1 of them suffice;
//   the partial results of a head are those of workers owner(first tile) .. owner(last tile), merged in that order,
//   which makes the result independent of which worker finishes first.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KVZIP_HD __host__ __device__ __forceinline__
#else
#define KVZIP_HD inline
#endif

namespace kvzip {

constexpr int kTile = 64;  // keys

KVZIP_HD int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

// How many of `workers` get tiles at all: beyond that, some in the middle would own none, and their slots stay unwritten.
KVZIP_HD int64_t active(int64_t workers, int64_t tiles) { return workers < tiles ? workers : tiles; }

// First tile of worker `w` out of `workers`, for `tiles` tiles in all.
KVZIP_HD int64_t worker_begin(int64_t w, int64_t workers, int64_t tiles) { return w * tiles / workers; }

// The worker that owns tile `t`.
KVZIP_HD int64_t owner(int64_t t, int64_t workers, int64_t tiles) { return ((t + 1) * workers - 1) / tiles; }

// The head that holds tile `t`: the last h with cu_tiles[h] <= t, which is never an empty one.
KVZIP_HD int head_of(int64_t t, const int64_t* cu_tiles, int heads) {
  int low = 0, high = heads;  // cu_tiles[low] <= t < cu_tiles[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_tiles[middle] <= t) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

KVZIP_HD int64_t slots(int64_t workers, int64_t heads) { return workers + heads - 1; }

}  // namespace kvzip
