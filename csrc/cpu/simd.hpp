// Vectors of the width of the instruction set that this file is compiled for.
//
// GCC vector extensions, because "omp simd" loops silently stayed scalar (4 to 8 times slower).
// Everything lives in namespace moe::<isa> and nothing here uses std:: templates: the linker merges
// equal inline functions, and one compiled for AVX-512 must never serve an older processor.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
// GCC 12 takes the undefined lanes inside its own intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace moe {
namespace MOE_ISA {

#if defined(MOE_ISA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(MOE_ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define MOE_METHOD inline __attribute__((always_inline))
#define MOE_INLINE static MOE_METHOD

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Simd;
template <>
struct Simd<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UInt __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  using IntScalar = int32_t;
};
template <>
struct Simd<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UInt __attribute__((vector_size(kVectorBytes)));
  using IntScalar = int64_t;
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;

template <class T>
MOE_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

template <class To, class From>
MOE_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Half precision without F16C: one number at a time, exact, round to nearest even.
MOE_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent bias of 15 to 127, denormals included.
  const float value = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t{239} << 23);
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

MOE_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;        // rounds to 65536 or more
  if (magnitude < 0x38800000) {                             // below 2^-14: steps of 2^-24
    const float steps = bit_cast<float>(magnitude) + 0.5f;  // 0.5 has an ulp of 2^-24
    return sign | static_cast<uint16_t>(bit_cast<uint32_t>(steps) - 0x3f000000);
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return sign | static_cast<uint16_t>((magnitude - 0x38000000 + 0xfff + odd) >> 13);
}

MOE_INLINE float widen(bf16 value) { return bit_cast<float>(uint32_t{value.bits} << 16); }
MOE_INLINE float widen(f16 value) { return half_to_float(value.bits); }
MOE_INLINE float widen(float value) { return value; }
MOE_INLINE double widen(double value) { return value; }

// load<A>(p): one vector of A from storage of A, bf16 or f16.
template <class A>
MOE_INLINE Vec<A> load(const A* from) {
  Vec<A> value;
  memcpy(&value, from, sizeof(value));
  return value;
}
template <class A>
MOE_INLINE Vec<A> load(const bf16* from) {
  typename Simd<float>::Half half;
  memcpy(&half, from, sizeof(half));
  return bit_cast<Vec<float>>(__builtin_convertvector(half, Simd<float>::UInt) << 16);
}
template <class A>
MOE_INLINE Vec<A> load(const f16* from) {
#if defined(MOE_ISA_AVX512)
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)));
#elif defined(MOE_ISA_AVX2)
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)));
#else
  Vec<float> value;
  for (int i = 0; i < Simd<float>::lanes; ++i) value[i] = half_to_float(from[i].bits);
  return value;
#endif
}

MOE_INLINE void store(float* to, Vec<float> value) { memcpy(to, &value, sizeof(value)); }
MOE_INLINE void store(double* to, Vec<double> value) { memcpy(to, &value, sizeof(value)); }
MOE_INLINE void store(bf16* to, Vec<float> value) {
  using UInt = Simd<float>::UInt;
  const UInt bits = bit_cast<UInt>(value);
  const UInt rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  const UInt quiet = (bits >> 16) | 0x40;
  const auto half =
      __builtin_convertvector(value == value ? rounded : quiet, typename Simd<float>::Half);
  memcpy(to, &half, sizeof(half));
}
MOE_INLINE void store(f16* to, Vec<float> value) {
#if defined(MOE_ISA_AVX512)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(bit_cast<__m512>(value), 0));
#elif defined(MOE_ISA_AVX2)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(bit_cast<__m256>(value), 0));
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) to[i].bits = float_to_half(value[i]);
#endif
}

// The last count < lanes elements of a row; missing lanes read as 0.
template <class A, class S>
MOE_INLINE Vec<A> load_tail(const S* from, int64_t count) {
  S padded[Simd<A>::lanes];
  memset(padded, 0, sizeof(padded));
  memcpy(padded, from, count * sizeof(S));
  return load<A>(padded);
}
template <class A, class S>
MOE_INLINE void store_tail(S* to, Vec<A> value, int64_t count) {
  S padded[Simd<A>::lanes];
  store(padded, value);
  memcpy(to, padded, count * sizeof(S));
}

// Calls body(start, count, Load, Store) over [0, size): whole vectors, then one tail. `full` is a
// compile-time constant in the whole part, so that its loads and stores have no branches.
template <class A, class Body>
MOE_INLINE void for_each_vector(int64_t size, Body body) {
  constexpr int lanes = Simd<A>::lanes;
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) body(i, static_cast<int64_t>(lanes));
  if (i < size) body(i, size - i);
}
template <class A, class S>
MOE_INLINE Vec<A> load_part(const S* from, int64_t count) {
  return count == Simd<A>::lanes ? load<A>(from) : load_tail<A>(from, count);
}
template <class A, class S>
MOE_INLINE void store_part(S* to, Vec<A> value, int64_t count) {
  if (count == Simd<A>::lanes) {
    store(to, value);
  } else {
    store_tail<A>(to, value, count);
  }
}

template <class T>
MOE_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
MOE_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// Sum of the lanes as a tree: the same order for every caller.
template <class T>
MOE_INLINE T sum_lanes(Vec<T> value) {
  T lane[Simd<T>::lanes];
  store(lane, value);
  for (int width = Simd<T>::lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Bit i is set where lane i of a comparison is true.
template <class T>
MOE_INLINE uint32_t lane_mask(Int<T> comparison) {
#if defined(MOE_ISA_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(comparison));
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask(bit_cast<__m512i>(comparison));
#elif defined(MOE_ISA_AVX2)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(bit_cast<__m256>(comparison));
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(bit_cast<__m256d>(comparison));
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps(bit_cast<__m128>(comparison));
  if constexpr (sizeof(T) == 8) return _mm_movemask_pd(bit_cast<__m128d>(comparison));
#else
  uint32_t mask = 0;
  for (int i = 0; i < Simd<T>::lanes; ++i) mask |= static_cast<uint32_t>(comparison[i] & 1) << i;
  return mask;
#endif
}

MOE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
MOE_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace MOE_ISA
}  // namespace moe
