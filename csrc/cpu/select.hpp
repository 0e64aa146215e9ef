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

template <class T>
MOE_INLINE int64_t count_at_least(const typename Simd<T>::IntScalar* keys, int64_t size,
                                  typename Simd<T>::IntScalar bound) {
  constexpr int lanes = Simd<T>::lanes;
  Int<T> counts = {};
  int64_t i = 0;
  for (; i + lanes <= size; i += lanes) {
    Int<T> key;
    memcpy(&key, keys + i, sizeof(key));
    counts -= key >= bound;
  }
  int64_t total = 0;
  for (; i < size; ++i) total += keys[i] >= bound;
  for (int lane = 0; lane < lanes; ++lane) total += counts[lane];
  return total;
}

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
  while (low < high) {
    using U = typename Simd<T>::UInt;
    (void)sizeof(U);
    const uint64_t width = static_cast<uint64_t>(static_cast<int64_t>(high)) -
                           static_cast<uint64_t>(static_cast<int64_t>(low));
    const I middle = static_cast<I>(static_cast<int64_t>(
        static_cast<uint64_t>(static_cast<int64_t>(low)) + width / 2 + (width & 1)));
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
    if (pool_size > 4 * lanes && open * 4 <= pool_size) {
      int64_t kept = 0;
      const int64_t old_size = pool_size;
      for (int64_t i = 0; i < old_size; ++i) {  // in place after the first time: kept <= i
        const I key = pool[i];
        spare[kept] = key;
        kept += key >= low && key <= high;
      }
      pool = spare;
      pool_size = kept;
      above_pool = above_high;
    }
  }
  return {low, capacity - above_high};
}

// Writes the indices of the chosen keys, ascending; returns nothing: exactly C are written.
template <class T>
MOE_INLINE void take_chosen(const typename Simd<T>::IntScalar* keys, int64_t size, int64_t capacity,
                            Threshold<T> threshold, int32_t first, int32_t* out) {
  int64_t taken = 0, i = 0;
#if defined(MOE_ISA_AVX512)
  if (threshold.ties < 0) {
    constexpr int lanes = Simd<T>::lanes;
    for (; i + lanes <= size && taken + lanes <= capacity; i += lanes) {
      Int<T> key;
      memcpy(&key, keys + i, sizeof(key));
      if constexpr (lanes == 16) {
        const __mmask16 mask =
            _mm512_cmpge_epi32_mask(bit_cast<__m512i>(key), _mm512_set1_epi32(threshold.key));
        const __m512i index = _mm512_add_epi32(
            _mm512_set1_epi32(first + static_cast<int32_t>(i)),
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        // compress to a register, then store: compress to memory is microcoded on some processors
        _mm512_storeu_si512(out + taken, _mm512_maskz_compress_epi32(mask, index));
        taken += __builtin_popcount(mask);
      } else {
        const __mmask8 mask =
            _mm512_cmpge_epi64_mask(bit_cast<__m512i>(key), _mm512_set1_epi64(threshold.key));
        const __m256i index = _mm256_add_epi32(_mm256_set1_epi32(first + static_cast<int32_t>(i)),
                                               _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + taken),
                            _mm256_maskz_compress_epi32(mask, index));
        taken += __builtin_popcount(mask);
      }
    }
  }
#endif
  int64_t ties = threshold.ties < 0 ? size : threshold.ties;
  for (; taken < capacity; ++i) {
    const bool tie = keys[i] == threshold.key && ties > 0;
    ties -= tie;
    out[taken] = first + static_cast<int32_t>(i);
    taken += keys[i] > threshold.key || tie;
  }
}

}  // namespace MOE_ISA
}  // namespace moe
