#include "../device.hpp"
#include "../launch.hpp"

namespace moe::cuda {

SimulatedGpu simulated_gpu;

Limits limits_of(int) {
  return {simulated_gpu.processors, simulated_gpu.largest_cluster, simulated_gpu.shared_bytes};
}

std::string why_no_gpu() { return ""; }

bool is_capturing(void*) { return false; }

uint32_t* new_counters(int, int64_t count) {
  static std::vector<std::unique_ptr<uint32_t[]>> pages;
  pages.emplace_back(new uint32_t[static_cast<size_t>(count)]());
  return pages.back().get();
}

HostBlockState::HostBlockState(Fibers& fibers, int64_t index, int threads, int64_t shared_bytes)
    : barrier(fibers, threads, "block " + std::to_string(index)),
      shared(new char[static_cast<size_t>(shared_bytes)]) {
  warps.reserve(static_cast<size_t>(threads / 32));  // barriers know their own address
  for (int warp = 0; warp < threads / 32; ++warp) {
    warps.emplace_back(fibers, "warp " + std::to_string(warp));
  }
  for (int width = 2; width < threads / 32; width *= 2) {
    for (int run = 0; run < threads / 32 / width; ++run) {
      const std::string name = std::to_string(width) + " warps, run " + std::to_string(run);
      runs.try_emplace({width, run}, fibers, width * 32, name);
    }
  }
  // What a kernel reads before it writes is garbage on a GPU: here a huge number, of any type.
  std::memset(shared.get(), 0x7f, static_cast<size_t>(shared_bytes));
}

HostTeam::HostTeam(const Grid& grid, uint64_t seed)
    : fibers(static_cast<int>(grid.team_size) * grid.threads, simulated_gpu.order, seed),
      barrier(fibers, static_cast<int>(grid.team_size) * grid.threads, "the team") {
  for (int64_t block = 0; block < grid.team_size; ++block) {
    blocks.push_back(
        std::make_unique<HostBlockState>(fibers, block, grid.threads, grid.shared_bytes));
  }
}

void run_grid(const Grid& grid, const char* kernel, int most_threads,
              const std::function<void(int64_t, HostTeam&, int64_t, int)>& thread_of) {
  const auto refuse = [kernel](const std::string& why) {
    throw std::invalid_argument(std::string("cannot start kernel ") + kernel + ": " + why);
  };
  if (grid.threads < 32 || grid.threads % 32 != 0 || grid.threads > most_threads) {
    refuse(std::to_string(grid.threads) + " threads a block");
  }
  if (grid.shared_bytes > simulated_gpu.shared_bytes) {
    refuse(std::to_string(grid.shared_bytes) + " bytes of shared memory");
  }
  if (grid.teams * grid.team_size > INT32_MAX) refuse("more than 2^31 - 1 blocks");
  ++simulated_gpu.launches;
  for (int64_t i = 0; i < grid.teams; ++i) {
    const int64_t team = simulated_gpu.order == Order::forward ? i : grid.teams - 1 - i;
    HostTeam own(grid, simulated_gpu.seed + static_cast<uint64_t>(team));
    own.fibers.run(
        [&](int fiber) { thread_of(team, own, fiber / grid.threads, fiber % grid.threads); });
  }
}

}  // namespace moe::cuda
