// The way of one CTA through its share of ragged rows, then of the tails: schedule.h, one step at a time.
#pragma once

#include "kvzip/schedule.h"
#include "params.h"
#include "ptx.cuh"

namespace kvzip {

// Where the partial results of a slot begin, in rows.
KVZIP_HD int64_t ragged_slots(const Ragged& r, int kv_heads) {
  return r.cu_tiles == nullptr ? 0 : slots(r.workers, kv_heads);
}
KVZIP_HD int64_t ragged_row(const Ragged& r, int kv_heads, int row_block, int64_t slot) {
  return r.first_row + (row_block * ragged_slots(r, kv_heads) + slot) * r.rows;
}

// All CTAs share the tails' tiles; the items are (batch row, KV head, block of rows), every one equally long. The
// tails' slots follow the context's.
KVZIP_HD int tail_items(const AttendParams& p) { return p.batch * p.kv_heads * p.tail_row_blocks; }
KVZIP_HD int64_t tail_slots(const AttendParams& p) {
  return slots(p.context.workers * p.context.row_blocks, tail_items(p));
}
KVZIP_HD int64_t tail_row(const AttendParams& p, int64_t slot) {
  return ragged_row(p.context, p.kv_heads, p.context.row_blocks, 0) + slot * p.context.rows;
}

__device__ __forceinline__ int tail_length(const AttendParams& p) {
  const int64_t length = p.tail_cursor == nullptr ? p.tail_length : *p.tail_cursor;
  return static_cast<int>(length < 0 ? 0 : length < p.capacity ? length : p.capacity);
}

// A CTA's share of ragged rows; the same for all its threads. A step is kStepKeys keys of one head, or what is left of
// the CTA's part of that head.
template <int kStepKeys>
struct RaggedWalk {
  int item;             // head
  int position, end;    // keys of the head: where the step begins, and where the CTA's part of the head ends
  int length;           // keys of the head
  int tile, last_tile;  // the first one after this part of the head; the first one after the share
  int item_tile;        // first tile of the head
  int64_t first_row;    // of the head

  __device__ __forceinline__ void begin(const Ragged& r, int kv_heads, int lane) {
    // All reads are under way before the first result is needed: until they are back, nothing can be copied.
    const int nearby = lane < kv_heads ? lane : kv_heads;
    const int64_t tiles = r.cu_tiles[kv_heads], head_tile = r.cu_tiles[nearby], head_row = r.cu_seqlens[nearby];
    if (take(blockIdx.x / r.row_blocks, r.workers, tiles)) {
      enter_head(r, find_head(r, kv_heads, lane, head_tile, head_row));
    }
  }

  __device__ __forceinline__ bool done() const { return position >= end && tile == last_tile; }

  // Whether this is the last step of this CTA's part of the head.
  __device__ __forceinline__ bool ends_segment() const { return position + kStepKeys >= end; }

  __device__ __forceinline__ void next(const Ragged& r) {
    position += kStepKeys;
    if (position < end || tile == last_tile) return;
    int head = item + 1;
    while (r.cu_tiles[head + 1] == tile) ++head;  // empty heads have no tile
    enter_head(r, head);
  }

 protected:
  // Sets this worker's share of `tiles`; returns whether there is any.
  __device__ __forceinline__ bool take(int64_t worker, int64_t workers, int64_t tiles) {
    workers = active(workers, tiles);
    const bool takes_part = worker < workers;
    tile = takes_part ? static_cast<int>(worker_begin(worker, workers, tiles)) : 0;
    last_tile = takes_part ? static_cast<int>(worker_begin(worker + 1, workers, tiles)) : 0;
    position = end = 0;
    return takes_part;
  }

  // Goes on at `tile` in an item of tiles [first, last).
  __device__ __forceinline__ void enter(int next_item, int first, int last) {
    item = next_item;
    item_tile = first;
    position = (tile - first) * kTile;
    tile = last < last_tile ? last : last_tile;
    end = (tile - first) * kTile;
  }

 private:
  // head_of(tile), by one read of all lanes in place of a search, whose reads would follow one another. The first row
  // of a head is not needed here (it is never negative), but soon, and then in the cache.
  __device__ __forceinline__ int find_head(const Ragged& r, int kv_heads, int lane, int64_t head_tile,
                                           int64_t head_row) const {
    int begun = __popc(__ballot_sync(0xffffffffu, lane < kv_heads && head_tile <= tile && head_row >= 0));
    for (int head = 32; head < kv_heads; head += 32) {
      const bool begins = head + lane < kv_heads && r.cu_tiles[head + lane] <= tile;
      begun += __popc(__ballot_sync(0xffffffffu, begins));
    }
    return begun - 1;
  }

  __device__ __forceinline__ void enter_head(const Ragged& r, int head) {
    enter(head, static_cast<int>(r.cu_tiles[head]), static_cast<int>(r.cu_tiles[head + 1]));
    first_row = r.cu_seqlens[head];
    length = static_cast<int>(r.cu_seqlens[head + 1] - first_row);
  }
};

// The same, with the tails after the context.
template <int kStepKeys>
struct Walk : RaggedWalk<kStepKeys> {
  bool in_tail;
  int skip_begin, skip_end;  // keys of the item that nothing sees
  int tail_keys;             // keys in use of every tail

  __device__ __forceinline__ void begin(const AttendParams& p, int lane) {
    tail_keys = tail_length(p);
    in_tail = false;
    skip_begin = skip_end = 0;
    this->tile = this->last_tile = this->position = this->end = 0;
    if (p.context.cu_tiles != nullptr) RaggedWalk<kStepKeys>::begin(p.context, p.kv_heads, lane);
    if (RaggedWalk<kStepKeys>::done()) enter_tails(p);
  }

  __device__ __forceinline__ bool done() const { return in_tail && RaggedWalk<kStepKeys>::done(); }

  __device__ __forceinline__ void next(const AttendParams& p) {
    if (!in_tail) {
      RaggedWalk<kStepKeys>::next(p.context);
      if (RaggedWalk<kStepKeys>::done()) enter_tails(p);
      return;
    }
    this->position += kStepKeys;
    if (this->position >= this->end && this->tile < this->last_tile) enter_item(p, this->item + 1);
  }

 private:
  __device__ __forceinline__ void enter_tails(const AttendParams& p) {
    in_tail = true;
    const int64_t per_item = tiles_of(tail_keys);
    const int64_t tiles = per_item * tail_items(p);
    if (this->take(blockIdx.x, gridDim.x, tiles)) enter_item(p, this->tile / static_cast<int>(per_item));
  }

  __device__ __forceinline__ void enter_item(const AttendParams& p, int tail_item) {
    const int per_item = static_cast<int>(tiles_of(tail_keys));
    this->enter(tail_item, tail_item * per_item, (tail_item + 1) * per_item);
    this->first_row = 0;
    this->length = tail_keys;
    if (p.tail_skip != nullptr) {
      const int64_t* skip = p.tail_skip + 2 * (tail_item / (p.kv_heads * p.tail_row_blocks));
      skip_begin = static_cast<int>(skip[0]);
      skip_end = static_cast<int>(skip[1]);
    }
  }
};

}  // namespace kvzip
