// The numbers that rows are made of, as bits in memory and as the float that they stand for.
//
// narrow() rounds to the nearest, ties to even; what is too large becomes infinite, and every NaN
// the same one. A GPU has instructions for it, the simulator does it by hand, with equal bits.
#pragma once

#include "block.hpp"

namespace moe::cuda {

struct Float32 {
  using Bits = uint32_t;
  MOE_DEVICE static float widen(Bits bits) { return bit_cast<float>(bits); }
  MOE_DEVICE static Bits narrow(float value) { return bit_cast<Bits>(value); }
};

struct BFloat16 {
  using Bits = uint16_t;
  MOE_DEVICE static float widen(Bits bits) {
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  MOE_DEVICE static Bits narrow(float value);
};

struct Float16 {
  using Bits = uint16_t;
  MOE_DEVICE static float widen(Bits bits);
  MOE_DEVICE static Bits narrow(float value);
};

#if defined(MOE_SIMULATED)

constexpr uint16_t kNan16 = 0x7fff;  // that of the GPU's conversions

// Drops low bits of a magnitude; a carry goes into the exponent, where it belongs.
inline uint32_t drop_bits(uint32_t magnitude, int count) {
  const uint32_t below_half = (1u << (count - 1)) - 1, is_odd = magnitude >> count & 1;
  return (magnitude + below_half + is_odd) >> count;
}

inline uint16_t BFloat16::narrow(float value) {
  if (std::isnan(value)) return kNan16;
  return static_cast<uint16_t>(drop_bits(bit_cast<uint32_t>(value), 16));
}

inline float Float16::widen(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 0x400), exponent - 25);
  }
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

inline uint16_t Float16::narrow(float value) {
  if (std::isnan(value)) return kNan16;
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  uint32_t rounded;
  if (magnitude >= 0x47800000) {  // 2^16
    rounded = 0x7c00;
  } else if (magnitude < 0x38800000) {  // 2^-14: below it numbers are multiples of 2^-24
    rounded = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  } else {
    rounded = drop_bits(magnitude - (112u << 23), 13);  // exponents differ by 127 - 15
  }
  return static_cast<uint16_t>(bits >> 31 << 15 | rounded);
}

#else

MOE_DEVICE uint16_t BFloat16::narrow(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

MOE_DEVICE float Float16::widen(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

MOE_DEVICE uint16_t Float16::narrow(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

#endif

}  // namespace moe::cuda
