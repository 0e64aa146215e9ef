// The C largest of n integer keys, ties to the lower index, indices in ascending order.
#pragma once

#include "scratch.hpp"

namespace moe {
namespace MOE_ISA {

// Order-preserving integers: a < b as numbers exactly when key(a) < key(b), with -0 equal to 0 and
// NaN equal to -inf. The map is its own inverse (but for those two).
template <class T>
MOE_INLINE Int<T> ordered_keys(Vec<T> value) {
  value = value == value ? value : splat<T>(-__builtin_inf());
  value += T(0);  // -0 becomes 0
  const Int<T> bits = bit_cast<Int<T>>(value);
  constexpr auto magnitude = static_cast<typename Simd<T>::IntScalar>(
      ~(typename Simd<T>::IntScalar(1) << (8 * sizeof(T) - 1)));
  return bits ^ ((bits >> (8 * sizeof(T) - 1)) & magnitude);
}

template <class T>
MOE_INLINE T value_of_key(typename Simd<T>::IntScalar key) {
  using I = typename Simd<T>::IntScalar;
  constexpr I magnitude = static_cast<I>(~(I(1) << (8 * sizeof(T) - 1)));
  return bit_cast<T>(key ^ ((key >> (8 * sizeof(T) - 1)) & magnitude));
}

template <class T>
struct Threshold {
  typename Simd<T>::IntScalar key;  // the C-th largest, or one that separates as well
  int64_t ties;                     // how many keys equal to it are taken; -1: all
};

// Bit i is set where keys[i] >= bound, for one vector of keys. With AVX-512 a comparison can leave
// its result in a mask register; as a vector it would travel there and back.
template <class T>
MOE_INLINE uint32_t mask_at_least(Int<T> key, typename Simd<T>::IntScalar bound) {
#if defined(MOE_ISA_AVX512)
  const __m512i value = bit_cast<__m512i>(key);
  if constexpr (sizeof(T) == 4) return _mm512_cmpge_epi32_mask(value, _mm512_set1_epi32(bound));
  if constexpr (sizeof(T) == 8) return _mm512_cmpge_epi64_mask(value, _mm512_set1_epi64(bound));
#else
  return lane_mask<T>(key >= bound);
#endif
}

template <class T>
MOE_INLINE uint32_t mask_equal(Int<T> key, typename Simd<T>::IntScalar value) {
#if defined(MOE_ISA_AVX512)
  const __m512i keys = bit_cast<__m512i>(key);
  if constexpr (sizeof(T) == 4) return _mm512_cmpeq_epi32_mask(keys, _mm512_set1_epi32(value));
  if constexpr (sizeof(T) == 8) return _mm512_cmpeq_epi64_mask(keys, _mm512_set1_epi64(value));
#else
  return lane_mask<T>(key == value);
#endif
}

template <class T>
MOE_INLINE int64_t count_at_least(const typename Simd<T>::IntScalar* keys, int64_t size,
                                  typename Simd<T>::IntScalar bound) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t total = 0, i = 0;
#if defined(MOE_ISA_AVX512)
  for (; i + lanes <= size; i += lanes) {
    Int<T> key;
    memcpy(&key, keys + i, sizeof(key));
    total += __builtin_popcount(mask_at_least<T>(key, bound));
  }
#else
  Int<T> counts = {};
  for (; i + lanes <= size; i += lanes) {
    Int<T> key;
    memcpy(&key, keys + i, sizeof(key));
    counts -= key >= bound;
  }
  for (int lane = 0; lane < lanes; ++lane) total += counts[lane];
#endif
  for (; i < size; ++i) total += keys[i] >= bound;
  return total;
}

// Copies the keys inside [low, high] to `out` (which may be `keys`) and returns how many there are.
template <class T>
MOE_INLINE int64_t keep_between(const typename Simd<T>::IntScalar* keys, int64_t size,
                                typename Simd<T>::IntScalar low, typename Simd<T>::IntScalar high,
                                typename Simd<T>::IntScalar* out) {
  int64_t kept = 0, i = 0;
#if defined(MOE_ISA_AVX512)
  constexpr int lanes = Simd<T>::lanes;
  for (; i + lanes <= size; i += lanes) {
    Int<T> key;
    memcpy(&key, keys + i, sizeof(key));
    const uint32_t mask = lane_mask<T>((key >= low) & (key <= high));
    if (mask == 0) continue;
    // Compressed in a register: compressing to memory is slow on some processors. What is written
    // behind the kept keys has been read already, or is not yet in use.
    const __m512i value = bit_cast<__m512i>(key);
    const __m512i packed = sizeof(T) == 4 ? _mm512_maskz_compress_epi32(mask, value)
                                          : _mm512_maskz_compress_epi64(mask, value);
    _mm512_storeu_si512(out + kept, packed);
    kept += __builtin_popcount(mask);
  }
#endif
  for (; i < size; ++i) {
    const typename Simd<T>::IntScalar key = keys[i];
    out[kept] = key;
    kept += key >= low && key <= high;
  }
  return kept;
}

// A pass over so few candidates is quicker than leaving some out.
constexpr int64_t kShortPool = 512;

// Bisection on the key. Candidates are copied together (into `spare`, size keys) once the open
// interval holds at most a quarter of them, so that later passes are short.
template <class T>
MOE_INLINE Threshold<T> find_threshold(const typename Simd<T>::IntScalar* keys, int64_t size,
                                       int64_t capacity, typename Simd<T>::IntScalar* spare) {
  using I = typename Simd<T>::IntScalar;
  constexpr int lanes = Simd<T>::lanes;
  I low = keys[0], high = keys[0];
  if (size >= lanes) {
    Int<T> least, most;
    memcpy(&least, keys, sizeof(least));
    most = least;
    for (int64_t i = 0; i < size; i += lanes) {
      Int<T> key;  // the last vector overlaps the one before
      memcpy(&key, keys + min_of(i, size - lanes), sizeof(key));
      least = key < least ? key : least;
      most = key > most ? key : most;
    }
    for (int lane = 0; lane < lanes; ++lane) {
      low = least[lane] < low ? least[lane] : low;
      high = most[lane] > high ? most[lane] : high;
    }
  } else {
    for (int64_t i = 1; i < size; ++i) {
      low = keys[i] < low ? keys[i] : low;
      high = keys[i] > high ? keys[i] : high;
    }
  }
  // Invariant: at least C keys are >= low, fewer than C are > high.
  int64_t from_low = size, above_high = 0;
  const I* pool = keys;
  int64_t pool_size = size, above_pool = 0;
  for (int step = 0; low < high; ++step) {
    // In int64, where the width of the fp32 keys cannot overflow; as unsigned for fp64.
    const uint64_t width =
        static_cast<uint64_t>(static_cast<int64_t>(high)) - static_cast<int64_t>(low);
    uint64_t offset = width / 2 + (width & 1);
    if (step % 2 == 0) {  // in turn: where the C-th key would lie if keys were spread evenly
      const float share =
          static_cast<float>(from_low - capacity) / static_cast<float>(from_low - above_high);
      offset =
          static_cast<uint64_t>((share < 0.9999f ? share : 0.9999f) * static_cast<float>(width));
      offset = offset < 1 ? 1 : offset > width ? width : offset;
    }
    const I middle = static_cast<I>(static_cast<uint64_t>(static_cast<int64_t>(low)) + offset);
    const int64_t count = above_pool + count_at_least<T>(pool, pool_size, middle);
    if (count == capacity) return {middle, -1};
    if (count > capacity) {
      low = middle;
      from_low = count;
    } else {
      high = static_cast<I>(middle - 1);
      above_high = count;
    }
    const int64_t open = from_low - above_high;
    if (pool_size > kShortPool && open * 4 <= pool_size) {
      pool_size = keep_between<T>(pool, pool_size, low, high, spare);
      pool = spare;
      above_pool = above_high;
    }
  }
  return {low, capacity - above_high};
}

// Writes the indices of the chosen keys, ascending: exactly C of them.
template <class T>
MOE_INLINE void take_chosen(const typename Simd<T>::IntScalar* keys, int64_t size,
                            Threshold<T> threshold, int32_t first, int32_t* out) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t taken = 0, i = 0;
  int64_t ties = threshold.ties < 0 ? size : threshold.ties;
  for (; i + lanes <= size; i += lanes) {
    Int<T> key;
    memcpy(&key, keys + i, sizeof(key));
    uint32_t chosen = mask_at_least<T>(key, threshold.key);
    if (chosen == 0) continue;
    uint32_t equal = threshold.ties < 0 ? 0 : mask_equal<T>(key, threshold.key);
    for (; equal != 0; equal &= equal - 1) {
      if (ties-- <= 0) chosen &= ~(equal & -equal);
    }
    const int32_t base = first + static_cast<int32_t>(i);
    const int count = __builtin_popcount(chosen);
#if defined(MOE_ISA_AVX512)
    if constexpr (lanes == 16) {
      const __m512i index =
          _mm512_add_epi32(_mm512_set1_epi32(base),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
      _mm512_mask_storeu_epi32(out + taken, static_cast<__mmask16>((1u << count) - 1),
                               _mm512_maskz_compress_epi32(static_cast<__mmask16>(chosen), index));
      taken += count;
      continue;
    }
#endif
    for (int64_t place = taken; chosen != 0; chosen &= chosen - 1) {
      out[place++] = base + __builtin_ctz(chosen);
    }
    taken += count;
  }
  for (; i < size; ++i) {
    if (keys[i] < threshold.key || (keys[i] == threshold.key && ties-- <= 0)) continue;
    out[taken++] = first + static_cast<int32_t>(i);
  }
}

}  // namespace MOE_ISA
}  // namespace moe
