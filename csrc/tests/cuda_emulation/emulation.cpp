// The CTA: fibers, barriers, shared memory and asynchronous copies.
#include "ptx.cuh"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

namespace kvzip {

alignas(128) unsigned char kvzip_shared[kEmulatedSharedBytes];

namespace emulation {

dim3 thread_index, block_index, grid_size;

namespace {

constexpr size_t kStackBytes = 128 * 1024;

struct Copy {
  uint32_t to;
  int bytes;
  unsigned char data[16];
};

struct Fiber {
  ucontext_t first;
  jmp_buf place;
  bool started = false, finished = false;
  const int* waits_for = nullptr;  // a generation that must move on from `seen`
  int seen = 0;
  std::vector<Copy> open;                  // copies not yet committed
  std::vector<std::vector<Copy>> pending;  // committed groups, oldest first
  std::unique_ptr<unsigned char[]> stack;
};

struct Warp {
  int generation = 0, arrived = 0;
  const char* name = nullptr;
  void* operands[32];
};

Options options;
std::vector<std::pair<const unsigned char*, size_t>> readable;
std::vector<bool> written;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
int barrier_generation, barrier_arrived;
int current;
jmp_buf scheduler;
const std::function<void()>* body;
uint64_t random_state;

uint64_t draw() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

void yield() {
  if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

void block_on(const int& generation, int seen) {
  Fiber& fiber = fibers[current];
  fiber.waits_for = &generation;
  fiber.seen = seen;
  while (generation == seen) yield();
}

void enter() {
  (*body)();
  Fiber& fiber = fibers[current];
  if (!fiber.open.empty()) fail("a thread ended with copies that it never committed");
  fiber.finished = true;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  current = thread;
  thread_index = {static_cast<unsigned>(thread), 0, 0};
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.first);
  fiber.first.uc_stack.ss_sp = fiber.stack.get();
  fiber.first.uc_stack.ss_size = kStackBytes;
  fiber.first.uc_link = nullptr;
  makecontext(&fiber.first, enter, 0);
  setcontext(&fiber.first);
}

bool is_runnable(const Fiber& fiber) {
  return !fiber.finished && (fiber.waits_for == nullptr || *fiber.waits_for != fiber.seen);
}

void land(const Copy& copy) {
  std::memcpy(kvzip_shared + copy.to, copy.data, copy.bytes);
  mark_written(copy.to, copy.bytes);
}

void run_block(int threads, int shared_bytes) {
  if (shared_bytes > kEmulatedSharedBytes) fail("more shared memory than any device has");
  std::memset(kvzip_shared, 0xff, sizeof kvzip_shared);
  written.assign(static_cast<size_t>(shared_bytes), false);
  barrier_generation = barrier_arrived = 0;
  warps.assign(threads / 32, Warp());
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.started = fiber.finished = false;
    fiber.waits_for = nullptr;
    fiber.open.clear(), fiber.pending.clear();
  }
  const int warp_count = threads / 32;
  for (int idle = 0; idle < 64 * warp_count;) {
    const int warp = static_cast<int>(draw() % warp_count), shift = static_cast<int>(draw() % 32);
    bool ran = false;
    for (int i = 0; i < 32; ++i) {
      const int thread = warp * 32 + (i + shift) % 32;
      if (!is_runnable(fibers[thread])) continue;
      resume(thread);
      ran = true;
    }
    idle = ran ? 0 : idle + 1;
  }
  for (int t = 0; t < threads; ++t) {
    if (!fibers[t].finished) fail("deadlock: some threads wait for others that never come");
  }
}

}  // namespace

void fail(const char* what) {
  std::printf("emulation: %s (block %u, thread %u)\n", what, block_index.x, thread_index.x);
  std::fflush(stdout);
  std::_Exit(1);
}

void launch(dim3 grid, int threads, int shared_bytes, const Options& chosen, const std::function<void()>& kernel) {
  options = chosen;
  random_state = chosen.seed * 0x9e3779b97f4a7c15ull + 1;
  body = &kernel;
  grid_size = grid;
  while (fibers.size() < static_cast<size_t>(threads)) {
    fibers.emplace_back();
    fibers.back().stack.reset(new unsigned char[kStackBytes]);
  }
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  for (const unsigned block : order) {
    block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    run_block(threads, shared_bytes);
  }
}

void allow_reads(const void* begin, size_t bytes) {
  readable.emplace_back(static_cast<const unsigned char*>(begin), bytes);
}
void forget_reads() { readable.clear(); }

void barrier() {
  const int seen = barrier_generation;
  if (++barrier_arrived == static_cast<int>(warps.size()) * 32) {
    barrier_arrived = 0;
    ++barrier_generation;
  } else {
    block_on(barrier_generation, seen);
  }
}

void collective(const char* name, void* operands, void (*run)(void* const operands[32])) {
  Warp& warp = warps[current / 32];
  if (warp.arrived == 0) warp.name = name;
  if (std::strcmp(warp.name, name) != 0) fail("lanes of a warp meet in different instructions");
  warp.operands[current % 32] = operands;
  const int seen = warp.generation;
  if (++warp.arrived == 32) {
    run(warp.operands);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    block_on(warp.generation, seen);
  }
}

void copy(uint32_t to, const void* from, int bytes, bool valid) {
  if (to % bytes != 0 || to + bytes > written.size()) fail("a copy to a place it must not go to");
  Copy copy{to, bytes, {}};
  if (valid) {
    const auto* source = static_cast<const unsigned char*>(from);
    if (reinterpret_cast<uintptr_t>(source) % bytes != 0)
      fail("a copy from an address that is not a multiple of its size");
    bool allowed = false;
    for (const auto& [begin, size] : readable) allowed |= source >= begin && source + bytes <= begin + size;
    if (!allowed) fail("a copy reads outside of the tensors");
    std::memcpy(copy.data, source, bytes);
  }
  if (options.late_copies) {
    std::memset(kvzip_shared + to, 0xff, bytes);
    for (int i = 0; i < bytes; ++i) written[to + i] = false;
    fibers[current].open.push_back(copy);
  } else {
    land(copy);
  }
}

void commit() {
  Fiber& fiber = fibers[current];
  fiber.pending.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait(int pending) {
  Fiber& fiber = fibers[current];
  while (fiber.pending.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : fiber.pending.front()) land(copy);
    fiber.pending.erase(fiber.pending.begin());
  }
}

void require_written(uint32_t address, int bytes) {
  if (address + bytes > written.size()) fail("a read beyond the shared memory");
  for (int i = 0; i < bytes; ++i) {
    if (!written[address + i]) fail("a read of shared memory that nothing has written");
  }
}

void mark_written(uint32_t address, int bytes) {
  if (address + bytes > written.size()) fail("a write beyond the shared memory");
  for (int i = 0; i < bytes; ++i) written[address + i] = true;
}

}  // namespace emulation
}  // namespace kvzip
