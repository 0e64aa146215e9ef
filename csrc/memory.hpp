// Memory that is kept for the next kernel instead of going back to the system.
#pragma once

#include <cstdint>

namespace moe {

// Aligned to 64 bytes, large blocks to a huge page. Not cleared. Thread-safe.
void* take_memory(int64_t bytes);
void give_memory(void* data, int64_t bytes);

// How many bytes may lie unused; 0 returns everything at once.
void keep_at_most(int64_t bytes);
int64_t kept_bytes();

}  // namespace moe
