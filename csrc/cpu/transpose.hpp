// Between (T, E) logits in memory and E vectors with a token a lane.
#pragma once

#include "simd.hpp"

namespace moe {
namespace MOE_ISA {

#if defined(__SSE2__)
// Four numbers of `lanes / 4` tokens, `step` numbers apart, each in its own 128 bits.
MOE_INLINE Vec<float> load_quads(const float* from, int64_t step) {
#if defined(MOE_ISA_AVX512)
  __m512 value = _mm512_castps128_ps512(_mm_loadu_ps(from));
  value = _mm512_insertf32x4(value, _mm_loadu_ps(from + step), 1);
  value = _mm512_insertf32x4(value, _mm_loadu_ps(from + 2 * step), 2);
  value = _mm512_insertf32x4(value, _mm_loadu_ps(from + 3 * step), 3);
  return bit_cast<Vec<float>>(value);
#elif defined(MOE_ISA_AVX2)
  const __m256 value = _mm256_castps128_ps256(_mm_loadu_ps(from));
  return bit_cast<Vec<float>>(_mm256_insertf128_ps(value, _mm_loadu_ps(from + step), 1));
#else
  (void)step;
  return load<float>(from);
#endif
}

MOE_INLINE void store_quads(float* to, int64_t step, Vec<float> value) {
#if defined(MOE_ISA_AVX512)
  const __m512 whole = bit_cast<__m512>(value);
  _mm_storeu_ps(to, _mm512_castps512_ps128(whole));
  _mm_storeu_ps(to + step, _mm512_extractf32x4_ps(whole, 1));
  _mm_storeu_ps(to + 2 * step, _mm512_extractf32x4_ps(whole, 2));
  _mm_storeu_ps(to + 3 * step, _mm512_extractf32x4_ps(whole, 3));
#elif defined(MOE_ISA_AVX2)
  const __m256 whole = bit_cast<__m256>(value);
  _mm_storeu_ps(to, _mm256_castps256_ps128(whole));
  _mm_storeu_ps(to + step, _mm256_extractf128_ps(whole, 1));
#else
  (void)step;
  store(to, value);
#endif
}

// Pairs of lanes of a and b inside every 128 bits: a0 b0 a1 b1, or a2 b2 a3 b3.
template <int First>
MOE_INLINE Vec<float> interleave(Vec<float> a, Vec<float> b) {
  Int<float> mask;
  for (int i = 0; i < Simd<float>::lanes; ++i) {
    mask[i] = i / 4 * 4 + First + i % 4 / 2 + i % 2 * Simd<float>::lanes;
  }
  return __builtin_shuffle(a, b, mask);
}

// Transposes every 128-bit column of four vectors as a 4 x 4 matrix.
MOE_INLINE void transpose_quads(Vec<float> (&v)[4]) {
  const Vec<float> a = interleave<0>(v[0], v[2]), b = interleave<0>(v[1], v[3]);
  const Vec<float> c = interleave<2>(v[0], v[2]), d = interleave<2>(v[1], v[3]);
  v[0] = interleave<0>(a, b);
  v[1] = interleave<2>(a, b);
  v[2] = interleave<0>(c, d);
  v[3] = interleave<2>(c, d);
}

// Experts that whole blocks of four cover, for a full block of tokens; returns how many.
MOE_INLINE int64_t load_whole(Vec<float>* block, const float* from, int64_t experts) {
  int64_t e = 0;
  for (; e + 4 <= experts; e += 4) {
    Vec<float> quads[4];
    for (int t = 0; t < 4; ++t) quads[t] = load_quads(from + t * experts + e, 4 * experts);
    transpose_quads(quads);
    for (int i = 0; i < 4; ++i) block[e + i] = quads[i];
  }
  return e;
}
MOE_INLINE int64_t store_whole(float* to, const Vec<float>* block, int64_t experts) {
  int64_t e = 0;
  for (; e + 4 <= experts; e += 4) {
    Vec<float> quads[4] = {block[e], block[e + 1], block[e + 2], block[e + 3]};
    transpose_quads(quads);
    for (int t = 0; t < 4; ++t) store_quads(to + t * experts + e, 4 * experts, quads[t]);
  }
  return e;
}
#else
MOE_INLINE int64_t load_whole(Vec<float>*, const float*, int64_t) { return 0; }
MOE_INLINE int64_t store_whole(float*, const Vec<float>*, int64_t) { return 0; }
#endif
MOE_INLINE int64_t load_whole(Vec<double>*, const double*, int64_t) { return 0; }
MOE_INLINE int64_t store_whole(double*, const Vec<double>*, int64_t) { return 0; }

// Reads `count` tokens from `token` on; the missing lanes repeat the last token.
template <class T>
MOE_INLINE void load_tokens(Vec<T>* block, const T* logits, int64_t token, int64_t count,
                            int64_t experts) {
  constexpr int lanes = Simd<T>::lanes;
  T* out = reinterpret_cast<T*>(block);
  const T* from = logits + token * experts;
  const int64_t done = count == lanes ? load_whole(block, from, experts) : 0;
  for (int lane = 0; lane < lanes; ++lane) {
    const T* row = from + min_of(lane, count - 1) * experts;
    for (int64_t e = done; e < experts; ++e) out[e * lanes + lane] = row[e];
  }
}

template <class T>
MOE_INLINE void store_tokens(T* to, const Vec<T>* block, int64_t token, int64_t count,
                             int64_t experts) {
  constexpr int lanes = Simd<T>::lanes;
  const T* from = reinterpret_cast<const T*>(block);
  T* out = to + token * experts;
  const int64_t done = count == lanes ? store_whole(out, block, experts) : 0;
  for (int64_t lane = 0; lane < count; ++lane) {
    for (int64_t e = done; e < experts; ++e) out[lane * experts + e] = from[e * lanes + lane];
  }
}

}  // namespace MOE_ISA
}  // namespace moe
