// The Block of block.hpp on a GPU. Blocks are one-dimensional and whole warps.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace moe::cuda {

constexpr uint32_t kWholeWarp = 0xffffffffu;

template <Team kTeam>
struct DeviceBlock {
  __device__ int thread() const { return threadIdx.x; }
  __device__ int threads() const { return blockDim.x; }
  __device__ int lane() const { return threadIdx.x % 32; }
  __device__ int warp() const { return threadIdx.x / 32; }
  __device__ int warps() const { return blockDim.x / 32; }

  __device__ int64_t rank() const {
    if constexpr (kTeam == Team::grid) return blockIdx.x;
    return blockIdx.x % cluster_blocks();
  }
  __device__ int64_t team_blocks() const {
    if constexpr (kTeam == Team::grid) return gridDim.x;
    return cluster_blocks();
  }
  __device__ int64_t team() const {
    if constexpr (kTeam == Team::grid) return 0;
    return blockIdx.x / cluster_blocks();
  }
  __device__ int64_t teams() const {
    if constexpr (kTeam == Team::grid) return 1;
    return gridDim.x / cluster_blocks();
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
    const uint32_t last = static_cast<uint32_t>(count - 1);
    __threadfence();
    __syncthreads();
    const bool is_last = __syncthreads_or(threadIdx.x == 0 && atomicInc(counter, last) == last);
    __threadfence();
    return is_last;
  }

 private:
  template <int kBarrier>
  __device__ static void sync_run(int warps) {
    asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "r"(warps * 32) : "memory");
  }

  __device__ static int64_t cluster_blocks() {
    uint32_t blocks = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
#endif
    return blocks;
  }
};

}  // namespace moe::cuda
