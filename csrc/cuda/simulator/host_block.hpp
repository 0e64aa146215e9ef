// The Block of block.hpp on the host: every thread of a team is a fiber.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace moe::cuda {

// A warp's values on their way from thread to thread. Two sets, in turn: a thread may be at the
// next exchange while another still reads this one, never further.
struct HostWarp {
  HostWarp(Fibers& fibers, std::string name) : barrier(fibers, 32, std::move(name)) {}
  Barrier barrier;
  uint64_t values[2][32] = {};
};

// What the threads of a block share.
struct HostBlockState {
  HostBlockState(Fibers& fibers, int64_t index, int threads, int64_t shared_bytes);
  std::vector<HostWarp> warps;
  Barrier barrier;
  // Of runs of 2 warps, of 4, ...; found by width and place.
  std::map<std::pair<int, int>, Barrier> runs;
  // On the heap and of the size asked for, so that the address sanitizer sees what lies beyond it.
  std::unique_ptr<char[]> shared;
  bool last = false;
};

template <Team kTeam>
class HostBlock {
 public:
  HostBlock(HostBlockState& state, Barrier& team_barrier, int thread, int threads, int64_t rank,
            int64_t team_blocks, int64_t team, int64_t teams)
      : state_(state),
        team_barrier_(team_barrier),
        warp_(state.warps[static_cast<size_t>(thread / 32)]),
        thread_(thread),
        threads_(threads),
        rank_(rank),
        team_blocks_(team_blocks),
        team_(team),
        teams_(teams) {}

  int thread() const { return thread_; }
  int threads() const { return threads_; }
  int lane() const { return thread_ % 32; }
  int warp() const { return thread_ / 32; }
  int warps() const { return threads_ / 32; }
  int64_t rank() const { return rank_; }
  int64_t team_blocks() const { return team_blocks_; }
  int64_t team() const { return team_; }
  int64_t teams() const { return teams_; }

  template <class T>
  T* shared() const {
    return reinterpret_cast<T*>(state_.shared.get());
  }

  void sync_warp() const { warp_.barrier.meet("sync_warp"); }
  void sync() const { state_.barrier.meet("sync"); }
  void sync_warps(int count) const {
    if (count == 1) return sync_warp();
    if (count == warps()) return sync();
    state_.runs.at({count, warp() / count}).meet("sync_warps");
  }
  void sync_team() const { team_barrier_.meet("sync_team"); }

  uint32_t ballot(bool vote) const {
    const uint64_t* votes = exchange(static_cast<uint64_t>(vote), "ballot");
    uint32_t word = 0;
    for (int lane = 0; lane < 32; ++lane) word |= static_cast<uint32_t>(votes[lane]) << lane;
    return word;
  }
  template <class T>
  T shuffle(T value, int lane) const {
    return read<T>(exchange(value, "shuffle")[lane & 31]);
  }
  template <class T>
  T shuffle_xor(T value, int mask) const {
    return read<T>(exchange(value, "shuffle_xor")[lane() ^ mask]);
  }
  template <class T>
  T shuffle_up(T value, int distance) const {
    const uint64_t* values = exchange(value, "shuffle_up");
    return read<T>(values[lane() >= distance ? lane() - distance : lane()]);
  }

  void add_shared(int* to, int value) const { *to += value; }
  void or_shared(uint32_t* to, uint32_t bits) const { *to |= bits; }
  void add_global(int* to, int value) const { *to += value; }

  bool is_last_of(uint32_t* counter, int64_t count) const {
    state_.barrier.meet("is_last_of");
    if (thread_ == 0) {
      state_.last = *counter == static_cast<uint32_t>(count - 1);
      *counter = state_.last ? 0 : *counter + 1;
    }
    state_.barrier.meet("is_last_of");
    return state_.last;
  }

 private:
  template <class T>
  static T read(uint64_t slot) {
    T value;
    std::memcpy(&value, &slot, sizeof(value));
    return value;
  }
  template <class T>
  const uint64_t* exchange(T value, const char* what) const {
    static_assert(sizeof(T) <= sizeof(uint64_t), "exchanged values have at most 64 bits");
    uint64_t* values = warp_.values[warp_.barrier.meetings() % 2];
    uint64_t slot = 0;
    std::memcpy(&slot, &value, sizeof(value));
    values[lane()] = slot;
    warp_.barrier.meet(what);
    return values;
  }

  HostBlockState& state_;
  Barrier& team_barrier_;
  HostWarp& warp_;
  const int thread_, threads_;
  const int64_t rank_, team_blocks_, team_, teams_;
};

}  // namespace moe::cuda
