// Aligned memory for the time of one kernel.
#pragma once

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>

#include "simd.hpp"

namespace moe {
namespace MOE_ISA {

MOE_INLINE int thread_number() { return omp_get_thread_num(); }

// Large new memory is mapped page by page on first touch, which cost up to 40 % of a backward with
// 38 MB of weight gradients; in pages of 2 MB it costs next to nothing. A hint: failing is fine.
MOE_INLINE void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) & ~(huge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(huge - 1);
  if (data != nullptr && end > begin) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#else
  (void)data, (void)bytes;
#endif
}

// `kept` tells whether it is the block that stays for the next kernel (scratch.cpp).
void* take_memory(int64_t bytes, bool* kept);
void give_memory(void* data, bool kept);

// 64-byte aligned: results of a BLAS product may depend on the alignment of its operands.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(take_memory(bytes, &kept_)) {}
  ~Scratch() { give_memory(data_, kept_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  bool kept_ = false;
  void* data_;
};

// Bytes of `count` elements, rounded up so that the next part is aligned too.
template <class T>
MOE_INLINE int64_t aligned_bytes(int64_t count) {
  return ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
}

}  // namespace MOE_ISA
}  // namespace moe
