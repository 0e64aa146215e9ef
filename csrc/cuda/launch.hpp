// How a kernel is started. A Kernel is a struct with
//
//   using Args                        plain data, passed by value
//   static constexpr const char* name
//   static constexpr int kThreads     most threads of a block; a multiple of 32
//   static constexpr int kBlocks      blocks that a processor should be able to hold at once
//   template <class Block> static void run(const Block&, const Args&)
//
// Nothing here allocates or waits, so that launches can be captured into a CUDA graph. An error is
// thrown with the kernel's name.
#pragma once

#include <stdexcept>
#include <string>

#include "block.hpp"
#include "kernels.hpp"

namespace moe::cuda {

// Throws where sizes are beyond what the routing kernels count in 32 bits; a little less, so that
// they may count past the end.
inline void check_sizes(const char* op, const RouteCall& call, int64_t rows) {
  constexpr int64_t kMost = INT32_MAX - (1 << 16);
  if (call.experts < 1 || call.experts > kMostExperts) {
    throw std::invalid_argument(std::string(op) + " got " + std::to_string(call.experts) +
                                " experts; the CUDA kernels take 1 to " +
                                std::to_string(kMostExperts) + ". Use another backend for more.");
  }
  if (call.tokens <= kMost && rows <= kMost && call.groups * call.experts <= kMost) return;
  throw std::invalid_argument(std::string(op) + " got " + std::to_string(call.tokens) +
                              " tokens in " + std::to_string(call.groups) + " groups, " +
                              std::to_string(call.experts) + " experts and " +
                              std::to_string(rows) + " rows; at most " + std::to_string(kMost) +
                              " tokens, rows, and groups times experts are possible. "
                              "Use backend 'reference', or route in several calls.");
}

struct Grid {
  int64_t teams;      // 1 for Team::grid
  int64_t team_size;  // blocks of a team
  int threads;
  int64_t shared_bytes;
};

// What the launchers need to know of a GPU.
struct Limits {
  int processors;        // streaming multiprocessors
  int largest_cluster;   // blocks; 1 where there are no clusters
  int64_t shared_bytes;  // dynamic shared memory that a block may ask for
};

Limits limits_of(int device);

}  // namespace moe::cuda

#if defined(MOE_SIMULATED)
#include "simulator/host_launch.hpp"
#else
#include "device_launch.cuh"
#endif

namespace moe::cuda {

// Blocks that the whole GPU holds at once.
template <class Kernel, Team kTeam>
int64_t blocks_at_once(int device, int threads, int64_t shared_bytes) {
  return int64_t{limits_of(device).processors} *
         resident_blocks<Kernel, kTeam>(device, threads, shared_bytes);
}

// As many as any GPU holds of 256 threads: workspaces have room for these.
inline int64_t most_blocks(int device) { return int64_t{8} * limits_of(device).processors; }

}  // namespace moe::cuda
