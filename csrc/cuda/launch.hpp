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

#include "block.hpp"
#include "kernels.hpp"

namespace moe::cuda {

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
