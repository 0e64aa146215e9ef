// One block of memory, cut into arrays that start at multiples of 16 bytes.
#pragma once

#include <cstdint>

namespace moe::cuda {

class Workspace {
 public:
  // Without memory it only adds up what is asked for.
  explicit Workspace(char* memory) : memory_(memory) {}

  template <class T>
  T* take(int64_t count) {
    const int64_t start = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + start);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace moe::cuda
