// One block of memory is kept between kernels, because new memory costs more than the arithmetic at
// small sizes: the system maps and clears every page of it on first touch.
#include "scratch.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

constexpr int64_t kKeepAtLeast = 1 << 18;  // smaller blocks are quick to get from malloc
constexpr int64_t kKeepAtMost = 64 << 20;

struct Kept {
  void* data = nullptr;
  int64_t bytes = 0;
  bool busy = false;
};
Kept kept;

void* allocate(int64_t bytes) {
  void* data = nullptr;
  // Large blocks start at a huge page, so that none of them is left in small pages.
  const size_t alignment = bytes >= kKeepAtLeast ? size_t{1} << 21 : 64;
  if (posix_memalign(&data, alignment, static_cast<size_t>(bytes)) != 0) abort();
  prefer_huge_pages(data, bytes);
  return data;
}

}  // namespace

void* take_memory(int64_t bytes, bool* is_kept) {
  if (bytes <= 0) return nullptr;
  // Another thread may be inside a kernel: then this call gets a block of its own.
  if (bytes < kKeepAtLeast || bytes > kKeepAtMost ||
      __atomic_exchange_n(&kept.busy, true, __ATOMIC_ACQUIRE)) {
    return allocate(bytes);
  }
  if (kept.bytes < bytes) {
    free(kept.data);
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  *is_kept = true;
  return kept.data;
}

void give_memory(void* data, bool is_kept) {
  if (is_kept) {
    __atomic_store_n(&kept.busy, false, __ATOMIC_RELEASE);
  } else {
    free(data);
  }
}

}  // namespace MOE_ISA
}  // namespace moe
