// New memory is mapped and cleared page by page on first touch, and blocks above 32 MB go back to
// the system as soon as they are freed. A stacked weight gradient is that large: at hidden size 384
// and 8 experts a layer's backward on 128 tokens took 36.7 ms with new memory and 21.6 ms without
// (one thread). So freed blocks are kept.
#include "memory.hpp"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moe {
namespace {

constexpr int64_t kSmall = 1 << 18;  // malloc is quick below
constexpr int64_t kHugePage = 1 << 21;

struct Block {
  void* data;
  int64_t bytes;
};

std::mutex mutex;
std::list<Block> unused;  // longest unused first
int64_t unused_bytes = 0;
int64_t limit = int64_t{1} << 30;

int64_t rounded(int64_t bytes) {
  const int64_t unit = bytes < kSmall ? 64 : bytes < kHugePage ? 4096 : kHugePage;
  return (bytes + unit - 1) / unit * unit;
}

void* allocate(int64_t bytes) {
  void* data = nullptr;
  const size_t alignment = bytes < kHugePage ? 64 : kHugePage;
  if (posix_memalign(&data, alignment, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // a hint
#endif
  return data;
}

// Frees the longest unused blocks until `bytes` are left; the lock is held.
void shrink_to(int64_t bytes) {
  while (unused_bytes > bytes) {
    unused_bytes -= unused.front().bytes;
    free(unused.front().data);
    unused.pop_front();
  }
}

}  // namespace

void* take_memory(int64_t bytes) {
  if (bytes <= 0) return nullptr;
  const int64_t size = rounded(bytes);
  if (size >= kSmall) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto block = unused.begin(); block != unused.end(); ++block) {
      if (block->bytes != size) continue;
      void* data = block->data;
      unused_bytes -= size;
      unused.erase(block);
      return data;
    }
  }
  return allocate(size);
}

void give_memory(void* data, int64_t bytes) {
  if (data == nullptr) return;
  const int64_t size = rounded(bytes);
  if (size < kSmall || size > limit) {
    free(data);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  unused.push_back({data, size});
  unused_bytes += size;
  shrink_to(limit);
}

void keep_at_most(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  limit = bytes;
  shrink_to(limit);
}

int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return unused_bytes;
}

}  // namespace moe
