// Memory and thread numbers inside a kernel.
#pragma once

#include <omp.h>

#include <cstdint>

#include "../memory.hpp"
#include "simd.hpp"

namespace moe {
namespace MOE_ISA {

MOE_INLINE int thread_number() { return omp_get_thread_num(); }

// Memory for the time of one kernel, 64-byte aligned: results of a BLAS product may depend on the
// alignment of its operands.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(bytes), data_(take_memory(bytes)) {}
  ~Scratch() { give_memory(data_, bytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  int64_t bytes_;
  void* data_;
};

// Bytes of `count` elements, rounded up so that the next part is aligned too.
template <class T>
MOE_INLINE int64_t aligned_bytes(int64_t count) {
  return ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
}

}  // namespace MOE_ISA
}  // namespace moe
