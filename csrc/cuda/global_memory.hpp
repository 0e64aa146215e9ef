// Loads and stores that say what is read or written once, so that it leaves the caches first.
#pragma once

#include <type_traits>

#include "block.hpp"

namespace moe::cuda {

// The most that a thread reads or writes at once, at addresses that are multiples of its size.
struct alignas(16) Vector {
  uint32_t words[4];
};

#if defined(MOE_SIMULATED)

template <class T>
T load_cached(const T* from) {
  return *from;
}
template <class T>
T load_once(const T* from) {
  return *from;
}
template <class T>
void store_once(T* to, T value) {
  *to = value;
}

#else

// Of memory that nobody writes while the kernel runs.
template <class T>
MOE_DEVICE T load_cached(const T* from) {
  if constexpr (std::is_same_v<T, Vector>) {
    return bit_cast<Vector>(__ldg(reinterpret_cast<const uint4*>(from)));
  } else {
    return __ldg(from);
  }
}

template <class T>
MOE_DEVICE T load_once(const T* from) {
  if constexpr (std::is_same_v<T, Vector>) {
    return bit_cast<Vector>(__ldcs(reinterpret_cast<const uint4*>(from)));
  } else {
    return __ldcs(from);
  }
}

template <class T>
MOE_DEVICE void store_once(T* to, T value) {
  if constexpr (std::is_same_v<T, Vector>) {
    __stcs(reinterpret_cast<uint4*>(to), bit_cast<uint4>(value));
  } else {
    __stcs(to, value);
  }
}

#endif

}  // namespace moe::cuda
