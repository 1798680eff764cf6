// The way of one CTA through its share of the context, then of the tails: schedule.h, one step at a time.
#pragma once

#include "kvzip/schedule.h"
#include "params.h"
#include "ptx.cuh"

namespace kvzip {

// All CTAs share the tails' tiles; the items are (batch row, KV head, block of rows), every one equally long.
KVZIP_HD int tail_items(const AttendParams& p) { return p.batch * p.kv_heads * p.tail_row_blocks; }
KVZIP_HD int64_t context_slots(const AttendParams& p) { return p.keys == nullptr ? 0 : slots(p.workers, p.kv_heads); }
KVZIP_HD int64_t tail_slots(const AttendParams& p) { return slots(p.workers * p.row_blocks, tail_items(p)); }

// Where the partial results of a slot begin, in blocks of rows; the tails' slots follow the context's.
KVZIP_HD int64_t context_block(const AttendParams& p, int row_block, int64_t slot) {
  return row_block * context_slots(p) + slot;
}
KVZIP_HD int64_t tail_block(const AttendParams& p, int64_t slot) { return p.row_blocks * context_slots(p) + slot; }

__device__ __forceinline__ int tail_length(const AttendParams& p) {
  const int64_t length = p.tail_cursor == nullptr ? p.tail_length : *p.tail_cursor;
  return static_cast<int>(length < 0 ? 0 : length < p.capacity ? length : p.capacity);
}

// The same for all threads of a CTA. The keys of a step are kStepKeys keys of one item.
template <int kStepKeys>
struct Walk {
  static constexpr int kSteps = kTile / kStepKeys;

  bool in_tail;
  int step;                    // within the tile
  int tile, last_tile;         // of this CTA's share of context or tails; last_tile is one past it
  int item;                    // head of the context, or item of the tails
  int item_tile, item_end;     // tiles of the item, one past the last
  int length;                  // keys of the item
  int skip_begin, skip_end;    // keys of the item that nothing sees
  int64_t first_row;           // of the item in the context
  int tail_keys;               // keys in use of every tail

  __device__ __forceinline__ void begin(const AttendParams& p, int lane) {
    // All reads are under way before the first result is needed: until they are back, nothing can be copied.
    const bool has_context = p.keys != nullptr;
    const int nearby = lane < p.kv_heads ? lane : p.kv_heads;
    const int64_t tiles = has_context ? p.cu_tiles[p.kv_heads] : 0;
    const int64_t head_tile = has_context ? p.cu_tiles[nearby] : 0;
    const int64_t head_row = has_context ? p.cu_seqlens[nearby] : 0;
    tail_keys = tail_length(p);
    step = 0;
    in_tail = false;
    if (has_context) {
      const int64_t worker = blockIdx.x / p.row_blocks;
      if (take(worker, p.workers, tiles)) {
        enter_head(p, find_head(p, lane, head_tile, head_row));
        return;
      }
    }
    enter_tails(p);
  }

  __device__ __forceinline__ bool done() const { return in_tail && tile == last_tile; }

  __device__ __forceinline__ int position() const { return (tile - item_tile) * kTile + step * kStepKeys; }

  // Whether this is the last step of this CTA's part of the item.
  __device__ __forceinline__ bool ends_segment() const {
    return step == kSteps - 1 && (tile + 1 == item_end || tile + 1 == last_tile);
  }

  __device__ __forceinline__ void next(const AttendParams& p) {
    if (++step < kSteps) return;
    step = 0;
    ++tile;
    if (tile == last_tile) {
      if (!in_tail) enter_tails(p);
    } else if (tile == item_end) {
      if (in_tail) {
        enter_item(p, item + 1);
      } else {
        int head = item + 1;
        while (p.cu_tiles[head + 1] == tile) ++head;  // empty heads have no tile
        enter_head(p, head);
      }
    }
  }

 private:
  // head_of(tile), by one read of all lanes in place of a search, whose reads would follow one another. The first row
  // of a head is not needed here (it is never negative), but soon, and then in the cache.
  __device__ __forceinline__ int find_head(const AttendParams& p, int lane, int64_t head_tile, int64_t head_row) const {
    int begun = __popc(__ballot_sync(0xffffffffu, lane < p.kv_heads && head_tile <= tile && head_row >= 0));
    for (int head = 32; head < p.kv_heads; head += 32) {
      const bool begins = head + lane < p.kv_heads && p.cu_tiles[head + lane] <= tile;
      begun += __popc(__ballot_sync(0xffffffffu, begins));
    }
    return begun - 1;
  }

  // Sets this worker's share of `tiles`; returns whether there is any.
  __device__ __forceinline__ bool take(int64_t worker, int64_t workers, int64_t tiles) {
    workers = active(workers, tiles);
    const bool takes_part = worker < workers;
    tile = takes_part ? static_cast<int>(worker_begin(worker, workers, tiles)) : 0;
    last_tile = takes_part ? static_cast<int>(worker_begin(worker + 1, workers, tiles)) : 0;
    return takes_part;
  }

  __device__ __forceinline__ void enter_head(const AttendParams& p, int head) {
    item = head;
    item_tile = static_cast<int>(p.cu_tiles[head]);
    item_end = static_cast<int>(p.cu_tiles[head + 1]);
    first_row = p.cu_seqlens[head];
    length = static_cast<int>(p.cu_seqlens[head + 1] - first_row);
    skip_begin = skip_end = 0;
  }

  __device__ __forceinline__ void enter_tails(const AttendParams& p) {
    in_tail = true;
    const int64_t per_item = tiles_of(tail_keys);
    const int64_t tiles = per_item * tail_items(p);
    if (take(blockIdx.x, gridDim.x, tiles)) enter_item(p, tile / static_cast<int>(per_item));
  }

  __device__ __forceinline__ void enter_item(const AttendParams& p, int tail_item) {
    item = tail_item;
    const int per_item = static_cast<int>(tiles_of(tail_keys));
    item_tile = item * per_item;
    item_end = item_tile + per_item;
    first_row = 0;
    length = tail_keys;
    skip_begin = skip_end = 0;
    if (p.tail_skip != nullptr) {
      const int64_t* skip = p.tail_skip + 2 * (item / (p.kv_heads * p.tail_row_blocks));
      skip_begin = static_cast<int>(skip[0]);
      skip_end = static_cast<int>(skip[1]);
    }
  }
};

}  // namespace kvzip
