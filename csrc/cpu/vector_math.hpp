// exp, log, sigmoid, the normal distribution function and the activations, on whole vectors.
// Errors are a few units in the last place (tests/moe_kernels/test_cpu_math.py measures them).
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace moe {
namespace MOE_ISA {

// Polynomial in falling powers (Horner).
template <class T, int N>
MOE_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = splat<T>(coefficients[0]);
#pragma GCC unroll 32
  for (int i = 1; i < N; ++i) sum = sum * x + coefficients[i];
  return sum;
}

template <class T>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float exp_low = -104.0f, exp_high = 89.0f;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23
  static constexpr float log2_e = 1.44269504f;
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr int exponent_bias = 127, mantissa_bits = 23;
  // 1/7! ... 1/0!: the remainder below ln(2)/2 is 5e-9
  static constexpr float exp_terms[] = {
      1.98412698e-4f, 1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f,
      1.66666667e-1f, 0.5f,           1.0f,           1.0f};
  // 2/9 ... 2/1 of 2 atanh(s) for s <= 0.172: the remainder is 7e-10
  static constexpr float log_terms[] = {2.0f / 9, 2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f};
  // Maclaurin series of erf(z)/z in z^2, for |z| <= 1
  static constexpr float erf_terms[] = {1.48071928e-8f,  -1.63658447e-7f, 1.64621144e-6f,
                                        -1.49256504e-5f, 1.2055333e-4f,   -8.54832702e-4f,
                                        5.22397763e-3f,  -2.68661706e-2f, 1.12837917e-1f,
                                        -3.76126389e-1f, 1.12837917f};
  // exp(z^2) erfc(z) for 1 <= z <= 14: Chebyshev fit in (z - 2)/(z + 2), error 3e-8
  static constexpr float erfcx_center = 2.0f, erfcx_end = 14.0f;
  static constexpr float erfcx_terms[] = {3.31650193e-4f, -1.09765358e-3f, -8.82526037e-4f,
                                          7.02656716e-3f, 3.73244336e-3f,  -7.89805036e-2f,
                                          2.416583e-1f,   -4.27185814e-1f, 2.55395676e-1f};
};

template <>
struct Constants<double> {
  static constexpr double exp_low = -746.0, exp_high = 710.0;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.44269504088896341;
  static constexpr double ln2_high = 6.93147180369123816490e-01;
  static constexpr double ln2_low = 1.90821492927058770002e-10;
  static constexpr int exponent_bias = 1023, mantissa_bits = 52;
  // 1/13! ... 1/0!: the remainder below ln(2)/2 is 4e-18
  static constexpr double exp_terms[] = {1.60590438368216146e-10,
                                         2.0876756987868099e-9,
                                         2.50521083854417188e-8,
                                         2.75573192239858907e-7,
                                         2.75573192239858907e-6,
                                         2.48015873015873016e-5,
                                         1.98412698412698413e-4,
                                         1.38888888888888889e-3,
                                         8.33333333333333333e-3,
                                         4.16666666666666667e-2,
                                         1.66666666666666667e-1,
                                         0.5,
                                         1.0,
                                         1.0};
  // 2/21 ... 2/1 of 2 atanh(s) for s <= 0.172: the remainder is 3e-19
  static constexpr double log_terms[] = {2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11,
                                         2.0 / 9,  2.0 / 7,  2.0 / 5,  2.0 / 3,  2.0};
  static constexpr double erf_terms[] = {
      4.76334804051506812e-18,  -9.06397084280867248e-17, 1.63426140953671519e-15,
      -2.78351620721092135e-14, 4.46322426328647734e-13,  -6.71136685516411038e-12,
      9.42275906465041097e-11,  -1.22905553017179274e-9,  1.48071928158792172e-8,
      -1.63658446912349243e-7,  1.64621143658892474e-6,   -1.4925650358406251e-5,
      1.20553329817896643e-4,   -8.54832702345085283e-4,  5.22397762544218784e-3,
      -2.68661706451312518e-2,  1.12837916709551257e-1,   -3.76126389031837525e-1,
      1.12837916709551257};
  // exp(z^2) erfc(z) for 1 <= z <= 28: Chebyshev fit in (z - 3)/(z + 3), error 2e-17
  static constexpr double erfcx_center = 3.0, erfcx_end = 28.0;
  static constexpr double erfcx_terms[] = {
      -1.6402491099029068e-08, 5.086840529599289e-08,   4.3097001153142196e-08,
      -2.4475606308355465e-07, -2.9799149372135835e-07, 1.25789723047337e-06,
      2.120069180467903e-06,   -7.979538969580996e-06,  -1.2860297629074093e-05,
      6.405676151156264e-05,   4.525525290835872e-05,   -0.0005970619660145479,
      0.0007077464434986949,   0.004269136333673907,    -0.024392499318895613,
      0.07166583719795777,     -0.15011593650077248,    0.2456038017123311,
      -0.3262335600430373,     0.17900115118138996};
};

// e^x; 0 below the smallest denormal, inf above the largest number, NaN for NaN.
template <class T>
MOE_INLINE Vec<T> exp(Vec<T> x) {
  using C = Constants<T>;
  x = x < C::exp_low ? splat<T>(C::exp_low) : x;
  x = x > C::exp_high ? splat<T>(C::exp_high) : x;
  const Vec<T> shifted = x * C::log2_e + C::round_magic;
  const Vec<T> n = shifted - C::round_magic;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
#if defined(MOE_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512 p = bit_cast<__m512>(polynomial<T>(r, C::exp_terms));
    return bit_cast<Vec<T>>(_mm512_scalef_ps(p, bit_cast<__m512>(n)));
  } else {
    const __m512d p = bit_cast<__m512d>(polynomial<T>(r, C::exp_terms));
    return bit_cast<Vec<T>>(_mm512_scalef_pd(p, bit_cast<__m512d>(n)));
  }
#else
  // The low bits of `shifted` are n. 2^n in two factors, so that denormals are reached.
  const Int<T> whole =
      bit_cast<Int<T>>(shifted) - bit_cast<typename Simd<T>::IntScalar>(C::round_magic);
  const Int<T> half = whole >> 1;
  const Vec<T> a = bit_cast<Vec<T>>((half + C::exponent_bias) << C::mantissa_bits);
  const Vec<T> b = bit_cast<Vec<T>>((whole - half + C::exponent_bias) << C::mantissa_bits);
  return polynomial<T>(r, C::exp_terms) * a * b;
#endif
}

// ln(x) of a normal positive number; NaN for NaN. (The sums of exponentials here are at least 1.)
template <class T>
MOE_INLINE Vec<T> log(Vec<T> x) {
  using C = Constants<T>;
  constexpr typename Simd<T>::IntScalar one = 1;
  const Int<T> bits = bit_cast<Int<T>>(x);
  // Mantissa in [sqrt(1/2), sqrt(2)): the exponent is counted from sqrt(1/2).
  const auto offset = bit_cast<typename Simd<T>::IntScalar>(static_cast<T>(0.70710678118654752));
  const Int<T> exponent = (bits - offset) >> C::mantissa_bits;
  const Vec<T> mantissa = bit_cast<Vec<T>>(bits - exponent * (one << C::mantissa_bits));
  const Vec<T> s = (mantissa - T(1)) / (mantissa + T(1));
  const Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> value = n * C::ln2_high + (s * polynomial<T>(s * s, C::log_terms) + n * C::ln2_low);
  return x == x && x < splat<T>(__builtin_inf()) ? value : x;
}

template <class T>
MOE_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> divisor = T(1) + exp<T>(-x);
#if defined(MOE_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    // An estimate and one step of Newton's method instead of a slow division (with the
    // exponential's scaling in one instruction, 15.6 for 18.1 cycles a vector of GELU). Of an
    // infinite divisor the step would make NaN.
    const Vec<T> first = bit_cast<Vec<T>>(_mm512_rcp14_ps(bit_cast<__m512>(divisor)));
    const Vec<T> second = first + first * (T(1) - divisor * first);
    return divisor < T(1e37) ? second : first;
  }
#endif
  return T(1) / divisor;
}

// Value and derivative of the activation at h. For swiglu `h` is the gate: silu and its derivative.
template <class T>
struct Activated {
  Vec<T> value, derivative;
};

template <class T>
MOE_INLINE Activated<T> silu(Vec<T> h) {
  const Vec<T> s = sigmoid<T>(h);
  return {h * s, s + h * s * (T(1) - s)};
}

// 0.5 h (1 + tanh(u)) = h sigmoid(2u) with u = sqrt(2/pi) (h + 0.044715 h^3).
template <class T>
MOE_INLINE Activated<T> gelu_tanh(Vec<T> h) {
  constexpr T two_root = T(1.59576912160573071);  // 2 sqrt(2/pi)
  constexpr T cubic = T(0.044715);
  const Vec<T> square = h * h;
  const Vec<T> s = sigmoid<T>(two_root * h * (T(1) + cubic * square));
  const Vec<T> slope = two_root * (T(1) + T(3) * cubic * square);
  // Far out h * h overflows and sigmoid is 0 or 1: s (1 - s) is 0 there, not 0 * inf.
  const Vec<T> flat = s * (T(1) - s);
  return {h * s, s + (flat > T(0) ? h * flat * slope : flat)};
}

// h Phi(h) with Phi(h) = erfc(-h / sqrt(2)) / 2; its density shares the exponential.
template <class T>
MOE_INLINE Activated<T> gelu(Vec<T> h) {
  using C = Constants<T>;
  const Vec<T> z = h * T(0.70710678118654752);
  const Vec<T> distance = z < T(0) ? -z : z;
  const Vec<T> gauss = exp<T>(-z * z);
  const Vec<T> clamped = min<T>(distance, splat<T>(C::erfcx_end));
  const Vec<T> t = (clamped - C::erfcx_center) / (clamped + C::erfcx_center);
  const Vec<T> tail = T(0.5) * gauss * polynomial<T>(t, C::erfcx_terms);
  const Vec<T> middle = T(0.5) + T(0.5) * z * polynomial<T>(z * z, C::erf_terms);
  const Vec<T> far = z < T(0) ? tail : T(1) - tail;
  const Vec<T> phi = distance <= T(1) ? middle : far;
  const Vec<T> density = gauss * T(0.39894228040143268);
  return {h * phi, phi + h * density};
}

template <class T, Activation A>
MOE_INLINE Activated<T> activate(Vec<T> h) {
  if constexpr (A == Activation::gelu_tanh) return gelu_tanh<T>(h);
  if constexpr (A == Activation::gelu) return gelu<T>(h);
  return silu<T>(h);
}

}  // namespace MOE_ISA
}  // namespace moe
