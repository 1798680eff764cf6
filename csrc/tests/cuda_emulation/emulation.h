// One CTA on the host: its threads are fibers, and the instructions of csrc/cuda/ptx.cuh do what their documentation
// says. The kernels' source compiles against this unmodified.
//
// The emulation is there to find mistakes, so it is unkind:
//   shared memory starts as NaN, and reads by ldmatrix and load_shared of bytes that nothing has written are errors;
//   an asynchronous copy lands as late as allowed (in the copying thread's wait) or, in the other mode, at once, so
//   that a missing wait or a stage refilled too early shows as wrong data; until it lands its target is NaN;
//   warps and lanes run in random order; lanes that meet in different warp instructions are an error;
//   copies must be aligned and read only registered memory; ldmatrix must not have bank conflicts.
// What it cannot find: races within the memory model's fine print, and anything about speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace kvzip {

constexpr int kEmulatedSharedBytes = 232448;
extern unsigned char kvzip_shared[];

namespace emulation {

extern dim3 thread_index, block_index, grid_size;  // of the fiber that runs

struct Options {
  bool late_copies = true;
  uint64_t seed = 1;
};

// Runs `kernel` once for every thread of every block, blocks one after the other in random order.
void launch(dim3 grid, int threads, int shared_bytes, const Options& options, const std::function<void()>& kernel);

// Makes memory readable by asynchronous copies.
void allow_reads(const void* begin, size_t bytes);
void forget_reads();

[[noreturn]] void fail(const char* what);
void barrier();

// Hands `operands` of all lanes of the warp to `run`, once, when the last lane has come.
void collective(const char* name, void* operands, void (*run)(void* const operands[32]));

void copy(uint32_t to, const void* from, int bytes, bool valid);
void commit();
void wait(int pending);
void require_written(uint32_t address, int bytes);
void mark_written(uint32_t address, int bytes);

struct MatrixLoad {
  uint32_t address;
  uint32_t r[4];
};
void load_matrices(void* const operands[32]);
void load_matrices_transposed(void* const operands[32]);
struct Transposition {
  uint32_t in, out;
};
void transpose_matrix(void* const operands[32]);
struct Product {
  const uint32_t* a;
  uint32_t b[2];
  float* c;
};
void mma_bfloat16(void* const operands[32]);
void mma_float16(void* const operands[32]);
struct Shuffle {
  float in;
  int source;
  float out;
};
void shuffle(void* const operands[32]);
void sync(void* const operands[32]);
struct Vote {
  bool in;
  uint32_t out;
};
void ballot(void* const operands[32]);

uint16_t to_bfloat16(float x);
uint16_t to_float16(float x);
float from_float16(uint16_t bits);
inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

}  // namespace emulation

#define threadIdx (::kvzip::emulation::thread_index)
#define blockIdx (::kvzip::emulation::block_index)
#define gridDim (::kvzip::emulation::grid_size)

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - kvzip_shared);
}
inline void copy16_async(uint32_t to, const void* from, bool valid) { emulation::copy(to, from, 16, valid); }
inline void copy4_async(uint32_t to, const void* from, bool valid) { emulation::copy(to, from, 4, valid); }
inline float max_or_nan(float a, float b) {
  if (!std::isnan(a) && !std::isnan(b)) return std::fmax(a, b);
  const uint32_t bits = 0x7fffffff;
  float nan;
  std::memcpy(&nan, &bits, 4);
  return nan;
}
inline void copy_commit() { emulation::commit(); }
template <int kPending>
void copy_wait() {
  emulation::wait(kPending);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address) {
  emulation::MatrixLoad load{address, {}};
  emulation::collective("ldmatrix", &load, emulation::load_matrices);
  std::memcpy(r, load.r, sizeof r);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  emulation::MatrixLoad load{address, {}};
  emulation::collective("ldmatrix.trans", &load, emulation::load_matrices_transposed);
  std::memcpy(r, load.r, sizeof r);
}
inline uint32_t transpose_matrix(uint32_t a) {
  emulation::Transposition t{a, 0};
  emulation::collective("movmatrix", &t, emulation::transpose_matrix);
  return t.out;
}
template <typename T>
T load_shared_as(uint32_t address) {
  emulation::require_written(address, sizeof(T));
  T v;
  std::memcpy(&v, kvzip_shared + address, sizeof v);
  return v;
}
inline float4 load_shared(uint32_t address) { return load_shared_as<float4>(address); }
inline uint2 load_shared_pair(uint32_t address) { return load_shared_as<uint2>(address); }
inline uint32_t load_shared_word(uint32_t address) { return load_shared_as<uint32_t>(address); }
inline void store_shared(uint32_t address, uint4 v) {
  emulation::mark_written(address, 16);
  std::memcpy(kvzip_shared + address, &v, 16);
}
inline int thread_again() { return static_cast<int>(threadIdx.x); }
inline void allow_dependents() {}
inline void wait_for_prerequisites() {}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Product product{a, {b0, b1}, c};
  constexpr bool kIsHalf = std::is_same<T, Float16>::value;
  emulation::collective("mma", &product, kIsHalf ? emulation::mma_float16 : emulation::mma_bfloat16);
}
template <typename T>
uint32_t pack(float low, float high) {
  constexpr bool kIsHalf = std::is_same<T, Float16>::value;
  const auto narrow = kIsHalf ? emulation::to_float16 : emulation::to_bfloat16;
  return narrow(low) | static_cast<uint32_t>(narrow(high)) << 16;
}
template <class F>
uint32_t half_each(F&& f, uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [&](int shift) {
    const auto widened = [&](uint32_t x) { return emulation::from_float16(static_cast<uint16_t>(x >> shift)); };
    return static_cast<uint32_t>(emulation::to_float16(f(widened(a), widened(b), widened(c)))) << shift;
  };
  return one(0) | one(16);
}
inline uint32_t half_add(uint32_t a, uint32_t b) {
  return half_each([](float x, float y, float) { return x + y; }, a, b, 0);
}
inline uint32_t half_multiply(uint32_t a, uint32_t b) {
  return half_each([](float x, float y, float) { return x * y; }, a, b, 0);
}
inline uint32_t half_multiply_subtract(uint32_t a, uint32_t b, uint32_t c) {
  return half_each([](float x, float y, float z) { return std::fma(x, y, -z); }, a, b, c);
}
inline float widen(Float16 x) { return emulation::from_float16(x.bits); }
inline float widen(BFloat16 x) { return emulation::from_bfloat16(x.bits); }

}  // namespace kvzip

inline void __syncthreads() { kvzip::emulation::barrier(); }
inline void __syncwarp() { kvzip::emulation::collective("syncwarp", nullptr, kvzip::emulation::sync); }
inline float __shfl_sync(unsigned, float value, int source) {
  kvzip::emulation::Shuffle shuffle{value, source, 0.0f};
  kvzip::emulation::collective("shfl", &shuffle, kvzip::emulation::shuffle);
  return shuffle.out;
}
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  kvzip::emulation::Vote vote{value, 0};
  kvzip::emulation::collective("vote", &vote, kvzip::emulation::ballot);
  return vote.out;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | static_cast<uint64_t>(y) << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline void atomicMax(int* at, int value) { *at = value > *at ? value : *at; }
inline void atomicMin(unsigned* at, unsigned value) { *at = value < *at ? value : *at; }
