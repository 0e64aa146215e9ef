// What a kernel sees of the GPU: its place, its shared memory, and ways to wait and to exchange
// values. Kernels are templates over a Block, so that one source runs on a GPU (device_block.cuh)
// and, for tests, on the host (simulator/host_block.hpp). Both have the members
//
//   thread() threads() lane() warp() warps()   place in the block; a warp is 32 threads
//   rank() team_blocks() team() teams()        place in the team of blocks, and of the team
//   shared<T>()                                the block's dynamic shared memory
//   sync_warp() sync() sync_team()             wait for the warp, the block, the team; what was
//                                              written before is seen by all of them after
//   sync_warps(n)                              the same for n neighbouring warps: one, all of the
//                                              block, or a quarter or half of them
//   ballot(bool) shuffle(v, lane) shuffle_xor(v, mask) shuffle_up(v, n)   whole warps only
//   add_shared(int*, n) or_shared(uint32_t*, bits) add_global(int*, n)    atomic, of integers only,
//                                              without result: any order gives the same
//   is_last_of(counter, n)                     see below
//
// Every thread of a warp, block or team calls these together; the simulator reports who does not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(MOE_SIMULATED)
#define MOE_DEVICE inline
#define MOE_HOST_DEVICE inline
#define MOE_UNROLL
#else
#define MOE_DEVICE __device__ __forceinline__
#define MOE_HOST_DEVICE __host__ __device__ __forceinline__
#define MOE_UNROLL _Pragma("unroll")
#endif

namespace moe::cuda {

// Blocks that wait for each other: those of a cluster, one or (from SM90 on) several, or the whole
// grid.
enum class Team { cluster, grid };

MOE_DEVICE int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Zeros above the highest 1; 32 for 0.
MOE_DEVICE int leading_zeros(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __clz(static_cast<int>(word));
#else
  return word == 0 ? 32 : __builtin_clz(word);
#endif
}

template <class To, class From>
MOE_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
MOE_DEVICE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
MOE_DEVICE T larger(T a, T b) {
  return a < b ? b : a;
}

// Reductions over aligned runs of `lanes` threads, a power of two; every thread gets the result,
// and the same one: both sides of an exchange add the same two numbers.
template <class Block, class T>
MOE_DEVICE T sum_lanes(const Block& block, T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) value += block.shuffle_xor(value, mask);
  return value;
}

template <class Block, class T>
MOE_DEVICE T max_lanes(const Block& block, T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value = larger(value, block.shuffle_xor(value, mask));
  }
  return value;
}

// Sum over the lower threads of the run.
template <class Block>
MOE_DEVICE int exclusive_lanes(const Block& block, int value, int lanes) {
  const int own = block.lane() & (lanes - 1);
  int sum = value;
  for (int step = 1; step < lanes; step *= 2) {
    const int other = block.shuffle_up(sum, step);
    if (own >= step) sum += other;
  }
  return sum - value;
}

// Range of `count` items that falls to `index` of `parts`: contiguous, in order, even.
struct Range {
  int64_t begin, end;
};

// Counts are below 2^32: a division in 64 bits is a call.
MOE_DEVICE Range share(int64_t count, int64_t index, int64_t parts) {
  const uint32_t items = static_cast<uint32_t>(count);
  const int64_t each = items / static_cast<uint32_t>(parts), more = count - each * parts;
  const int64_t begin = index * each + smaller(index, more);
  return {begin, begin + each + (index < more ? 1 : 0)};
}

}  // namespace moe::cuda

#if defined(MOE_SIMULATED)
#include "simulator/host_block.hpp"
namespace moe::cuda {
template <Team kTeam>
using Block = HostBlock<kTeam>;
}  // namespace moe::cuda
#else
#include "device_block.cuh"
namespace moe::cuda {
template <Team kTeam>
using Block = DeviceBlock<kTeam>;
}  // namespace moe::cuda
#endif
