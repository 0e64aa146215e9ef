// launch.hpp on a GPU.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace moe::cuda {

// Throws with what was being done, unless all is well.
void check(cudaError_t status, const char* action, const char* kernel);

// Makes a GPU the current one, until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
};

template <class Kernel, Team kTeam>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    kernel(const __grid_constant__ typename Kernel::Args args) {
  Kernel::run(DeviceBlock<kTeam>(), args);
}

// Blocks of the kernel that a processor holds at once, by what the driver says; kept, because
// asking takes longer than launching. Also allows the kernel its shared memory, once.
template <class Kernel, Team kTeam>
int resident_blocks(int device, int threads, int64_t shared_bytes) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, threads, shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const DeviceGuard guard(device);
  const auto* entry = reinterpret_cast<const void*>(&kernel<Kernel, kTeam>);
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, entry), "find", Kernel::name);
  // All that there is, less what the kernel has by itself: a later call may want more than this
  // one.
  const int64_t most =
      limits_of(device).shared_bytes - static_cast<int64_t>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(most)),
        "allow shared memory for", Kernel::name);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, entry, threads,
                                                      static_cast<size_t>(shared_bytes)),
        "place", Kernel::name);
  if (blocks < 1) {
    throw std::runtime_error(std::string("kernel ") + Kernel::name + " with " +
                             std::to_string(threads) + " threads and " +
                             std::to_string(shared_bytes) +
                             " bytes of shared memory does not fit this GPU");
  }
  return known[key] = blocks;
}

// Most blocks of a cluster of this kernel on this GPU, which may be a small part of one; a power of
// two.
template <class Kernel>
int64_t largest_cluster(int device, int threads, int64_t shared_bytes) {
  if (limits_of(device).largest_cluster == 1) return 1;
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int64_t>, int> known;
  resident_blocks<Kernel, Team::cluster>(device, threads, shared_bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, threads, shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const DeviceGuard guard(device);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(limits_of(device).largest_cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  int most = 1;
  check(cudaOccupancyMaxPotentialClusterSize(&most, &kernel<Kernel, Team::cluster>, &config),
        "size clusters of", Kernel::name);
  int cluster = 1;
  while (2 * cluster <= std::min(most, limits_of(device).largest_cluster)) cluster *= 2;
  return known[key] = cluster;
}

template <class Kernel, Team kTeam>
void launch(const Device& device, const Grid& grid, const typename Kernel::Args& args) {
  const int64_t blocks = grid.teams * grid.team_size;
  if (blocks == 0) return;
  resident_blocks<Kernel, kTeam>(device.index, grid.threads, grid.shared_bytes);
  const DeviceGuard guard(device.index);
  cudaLaunchAttribute attribute = {};
  if constexpr (kTeam == Team::cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.team_size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else if constexpr (kTeam == Team::grid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(device.stream);
  config.attrs = &attribute;
  config.numAttrs = kTeam == Team::cluster && grid.team_size == 1 ? 0 : 1;
  check(cudaLaunchKernelEx(&config, &kernel<Kernel, kTeam>, args), "start", Kernel::name);
}

}  // namespace moe::cuda
