// The Block of block.hpp on a GPU. Blocks are one-dimensional and whole warps.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace moe::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// A block's place in its cluster and among clusters; every block is one of its own below SM90.
#if __CUDA_ARCH__ >= 900
#define MOE_CLUSTER_REGISTER(name, otherwise)   \
  [] {                                          \
    uint32_t value;                             \
    asm("mov.u32 %0, " name ";" : "=r"(value)); \
    return value;                               \
  }()
#else
#define MOE_CLUSTER_REGISTER(name, otherwise) otherwise
#endif

template <Team kTeam>
struct DeviceBlock {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int warps() const { return blockDim.x / 32; }

  __device__ int64_t rank() const {
    if constexpr (kTeam == Team::grid) return blockIdx.x;
    return MOE_CLUSTER_REGISTER("%%cluster_ctarank", 0);
  }
  __device__ int64_t team_blocks() const {
    if constexpr (kTeam == Team::grid) return gridDim.x;
    return MOE_CLUSTER_REGISTER("%%cluster_nctarank", 1);
  }
  __device__ int64_t team() const {
    if constexpr (kTeam == Team::grid) return 0;
    // Without asking where no cluster was asked for.
    return team_blocks() == 1 ? blockIdx.x : MOE_CLUSTER_REGISTER("%%clusterid.x", blockIdx.x);
  }
  __device__ int64_t teams() const {
    if constexpr (kTeam == Team::grid) return 1;
    return team_blocks() == 1 ? gridDim.x : MOE_CLUSTER_REGISTER("%%nclusterid.x", gridDim.x);
  }

  template <class T>
  __device__ T* shared() const {
    extern __shared__ __align__(16) char memory[];
    return reinterpret_cast<T*>(memory);
  }

  __device__ void sync_warp() const { __syncwarp(); }
  __device__ void sync() const { __syncthreads(); }
  __device__ void sync_warps(int count) const {
    if (count == 1) {
      __syncwarp();
    } else if (count == warps()) {
      __syncthreads();
    } else {
      // Barrier 0 is that of __syncthreads. With a number that the compiler knows the block takes
      // no more than these of its processor's barriers.
      switch (warp() / count) {
        case 0:
          return sync_run<1>(count);
        case 1:
          return sync_run<2>(count);
        case 2:
          return sync_run<3>(count);
        default:
          return sync_run<4>(count);
      }
    }
  }
  __device__ void sync_team() const {
    if constexpr (kTeam == Team::grid) {
      cooperative_groups::this_grid().sync();
    } else {
#if __CUDA_ARCH__ >= 900
      asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
      asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
      __syncthreads();
#endif
    }
  }

  __device__ uint32_t ballot(bool vote) const { return __ballot_sync(kWholeWarp, vote); }
  template <class T>
  __device__ T shuffle(T value, int lane) const {
    return __shfl_sync(kWholeWarp, value, lane);
  }
  template <class T>
  __device__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(kWholeWarp, value, mask);
  }
  template <class T>
  __device__ T shuffle_up(T value, int distance) const {
    return __shfl_up_sync(kWholeWarp, value, distance);
  }

  __device__ void add_shared(int* to, int value) const { atomicAdd(to, value); }
  __device__ void or_shared(uint32_t* to, uint32_t bits) const { atomicOr(to, bits); }
  __device__ void add_global(int* to, int value) const { atomicAdd(to, value); }

  // True in every thread of the last of `count` blocks to come here; that block sees what the
  // others wrote before. The counter is 0 before and after.
  __device__ bool is_last_of(uint32_t* counter, int64_t count) const {
    const uint32_t most = static_cast<uint32_t>(count - 1);
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();  // also of what the others wrote before the barrier
      is_last = atomicInc(counter, most) == most;
      __threadfence();
    }
    return __syncthreads_or(is_last);
  }

 private:
  template <int kBarrier>
  __device__ static void sync_run(int warps) {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(warps * 32) : "memory");
  }
};

}  // namespace moe::cuda
