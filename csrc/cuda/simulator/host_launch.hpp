// launch.hpp on the host: teams run one after another, the threads of a team as fibers.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include "host_block.hpp"

namespace moe::cuda {

// The GPU that is simulated; tests set it (bindings.cpp).
struct SimulatedGpu {
  int processors = 3;
  int largest_cluster = 4;
  int64_t shared_bytes = 99 << 10;  // that of SM86 and SM89, the least of all
  int blocks_per_processor = 1;
  Order order = Order::forward;
  uint64_t seed = 0;
  int64_t launches = 0;  // so far
};
extern SimulatedGpu simulated_gpu;

// A team of a launch, with blocks of their own shared memory.
struct HostTeam {
  HostTeam(const Grid& grid, uint64_t seed);
  Fibers fibers;
  Barrier barrier;
  std::vector<std::unique_ptr<HostBlockState>> blocks;
};

// Runs `thread_of(team, block, thread)` for every thread; checks the grid like a driver would.
void run_grid(const Grid& grid, const char* kernel, int most_threads,
              const std::function<void(int64_t, HostTeam&, int64_t, int)>& thread_of);

template <class Kernel, Team kTeam>
int resident_blocks(int, int, int64_t) {
  return simulated_gpu.blocks_per_processor;
}

template <class Kernel>
int64_t largest_cluster(int, int, int64_t) {
  return simulated_gpu.largest_cluster;
}

template <class Kernel, Team kTeam>
void launch(const Device&, const Grid& grid, const typename Kernel::Args& args) {
  run_grid(grid, Kernel::name, Kernel::kThreads,
           [&](int64_t team, HostTeam& own, int64_t block, int thread) {
             Kernel::run(
                 HostBlock<kTeam>(*own.blocks[static_cast<size_t>(block)], own.barrier, thread,
                                  grid.threads, block, grid.team_size, team, grid.teams),
                 args);
           });
}

}  // namespace moe::cuda
