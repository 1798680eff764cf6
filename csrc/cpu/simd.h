// The vectors of one instruction set: float lanes, loads that widen 16-bit types, exp and horizontal sums.
//
// GCC and Clang vector extensions, so that one source serves AVX-512, AVX2, SSE2 and NEON; the width follows from the
// flags of the translation unit. Everything here lives in the namespace KVZIP_ISA of that unit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef KVZIP_ISA
#define KVZIP_ISA generic
#endif

// A loop that is written out at once. Left to itself the compiler does so late or, in large functions, not at all, and an
// array of accumulators then goes through memory.
#if defined(__clang__)
#define KVZIP_UNROLLED(i, n) _Pragma("unroll") for (int i = 0; i < (n); ++i)
#else
#define KVZIP_UNROLLED(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
#endif

namespace kvzip {
namespace KVZIP_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#elif defined(KVZIP_GENERIC_LANES)  // what a wider processor does, on any other: for tests
constexpr int kLanes = KVZIP_GENERIC_LANES;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

#if defined(__aarch64__)
typedef __fp16 Half;  // g++ has _Float16 there from version 13 on only
#else
typedef _Float16 Half;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)((UVec)_mm512_cvtepu16_epi32(bits) << 16);
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)((UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
#endif
}

inline Vec load(const float16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v = {};
  for (int i = 0; i < kLanes; ++i) {
    Half x;
    std::memcpy(&x, p + i, sizeof x);
    v[i] = static_cast<float>(x);
  }
  return v;
#endif
}

inline Vec load(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline float to_float(float x) { return x; }
inline float to_float(uint8_t x) { return x; }
inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float to_float(float16 x) {
  Half h;
  std::memcpy(&h, &x.bits, sizeof h);
  return static_cast<float>(h);
}

// Round to nearest, ties to even.
inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, bfloat16* p) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float x, float16* p) {
  const Half h = static_cast<Half>(x);
  std::memcpy(&p->bits, &h, sizeof h);
}

// `n` of a vector's elements, the others 0; n < kLanes.
template <class T>
__attribute__((noinline)) Vec load_part(const T* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
}

// The first `n` elements; n <= kLanes.
inline void store_part(float* p, Vec v, int n) {
  if (n == kLanes) {
    store(p, v);
  } else {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
}

inline Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }

// Unlike std::max these keep NaN: a head with one has a NaN result, not none.
inline float maximum(float a, float b) { return a > b || a != a ? a : b; }
inline Vec maximum(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }

inline constexpr IVec lane_index() {
  IVec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

// exp(x) - 1 = scale * p + (scale - 1), with scale a power of two: relative error of p about 1e-7. x in [-87, 88].
inline void expm1_parts(Vec x, Vec* p, Vec* scale) {
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec q = broadcast(1.9875691500e-4f);
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  *p = q * r * r + r;
  *scale = (Vec)(((IVec)shifted - (IVec)magic + 127) << 23);
}

// exp for x <= 0 (softmax): 0 below -87, where -inf lies; NaN stays NaN.
inline Vec exp_negative(Vec x) {
  const IVec tiny = x < -87.0f;
  Vec p, scale;
  expm1_parts(select(tiny, broadcast(-87.0f), x), &p, &scale);
  return select(tiny, Vec{}, scale * p + scale);
}

inline Vec tanh_of(Vec x) {
  Vec y = x + x;
  y = select(y > 20.0f, broadcast(20.0f), y);
  y = select(y < -20.0f, broadcast(-20.0f), y);
  Vec p, scale;
  expm1_parts(y, &p, &scale);
  const Vec m = scale * p + (scale - 1.0f);
  return m / (m + 2.0f);
}

#if defined(__clang__)
#define KVZIP_SHUFFLE(a, b, index) kvzip_shuffle(a, b, index)
inline Vec kvzip_shuffle(Vec a, Vec b, IVec index) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return v;
}
#else
#define KVZIP_SHUFFLE(a, b, index) __builtin_shuffle(a, b, index)
#endif

// The maximum, or the sum, of all lanes.
template <int size = kLanes / 2>
inline float max_of(Vec v) {
  v = maximum(v, KVZIP_SHUFFLE(v, v, lane_index() ^ size));
  if constexpr (size > 1) return max_of<size / 2>(v);
  return v[0];
}
template <int size = kLanes / 2>
inline float sum_of(Vec v) {
  v += KVZIP_SHUFFLE(v, v, lane_index() ^ size);
  if constexpr (size > 1) return sum_of<size / 2>(v);
  return v[0];
}

// Lanes in groups of `size`: the even groups of a and the odd ones of b where they are, which costs no shuffle; or, the
// other way, the odd groups of a and the even ones of b, each in its neighbour's place.
template <int size>
inline constexpr IVec pick(bool other) {
  IVec v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i / size % 2 * kLanes + (other ? i ^ size : i);
  return v;
}

template <int size>
inline __attribute__((always_inline)) Vec add_pairs(Vec a, Vec b) {
  return KVZIP_SHUFFLE(a, b, pick<size>(false)) + KVZIP_SHUFFLE(a, b, pick<size>(true));
}

// Query rows that share what is loaded of a key or value, and widened; where no more than two are left, two do.
constexpr int kRows = kLanes == 4 ? 1 : 4;
constexpr int kFewer = kLanes == 4 ? 1 : 2;
constexpr int kAccumulators = kLanes == 16 ? 16 : 8;  // that stay in registers beside what is loaded

// Element by element, as an array's `= {}` is a call of memset.
template <int kFirst, int kSecond>
inline void clear(Vec (&acc)[kFirst][kSecond]) {
  KVZIP_UNROLLED(i, kFirst) {
    KVZIP_UNROLLED(j, kSecond) acc[i][j] = Vec{};
  }
}

// Horizontal sums of as many accumulators as a vector has lanes, [row][key]: element kKeys * row + key of the result.
template <int kSome, int kKeys>
inline __attribute__((always_inline)) Vec sums(const Vec (&acc)[kSome][kKeys]) {
  static_assert(kSome * kKeys == kLanes, "one sum a lane");
  Vec part[kLanes / 2];
  KVZIP_UNROLLED(i, kLanes / 2) {
    part[i] = add_pairs<1>(acc[2 * i / kKeys][2 * i % kKeys], acc[(2 * i + 1) / kKeys][(2 * i + 1) % kKeys]);
  }
  KVZIP_UNROLLED(i, kLanes / 4) part[i] = add_pairs<2>(part[2 * i], part[2 * i + 1]);
  if constexpr (kLanes >= 8) {
    KVZIP_UNROLLED(i, kLanes / 8) part[i] = add_pairs<4>(part[2 * i], part[2 * i + 1]);
  }
  if constexpr (kLanes >= 16) part[0] = add_pairs<8>(part[0], part[1]);
  return part[0];
}

// Memory of one thread that is kept from call to call. Not std::vector: its functions are shared between translation
// units by the linker, and one made with AVX-512 must not end up where a lesser processor runs it.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  // At least `n` floats, with nothing in particular in them.
  float* get(int64_t n) {
    if (n > size_) {
      std::free(data_);
      data_ = static_cast<float*>(std::malloc(n * sizeof(float)));
      size_ = data_ == nullptr ? 0 : n;
      if (data_ == nullptr) throw std::bad_alloc();
    }
    return data_;
  }
  float* zeros(int64_t n) { return static_cast<float*>(std::memset(get(n), 0, n * sizeof(float))); }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace KVZIP_ISA
}  // namespace kvzip
