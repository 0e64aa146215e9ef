// Expert choice from pools that a block holds in shared memory. Short ones take a warp each, so
// that a block selects from eight of them at once and never waits.
#pragma once

#include "expert_choice.hpp"

namespace moe::cuda {

constexpr int kLongestPool = 16384;
constexpr int kLongestWarpPool = 1024;

template <class Block, bool kWarp>
MOE_DEVICE void select_pools(const Block& block, const ExpertChoiceArgs& args) {
  const Gang<Block, kWarp> gang = {block};
  const int size = args.group_size, experts = args.shape.experts;
  const int gangs = kWarp ? block.warps() : 1, index = kWarp ? block.warp() : 0;
  uint32_t* keys = block.template shared<uint32_t>() + index * (size + kDigits);
  int* counts = reinterpret_cast<int*>(keys + size);
  const Range groups = groups_of(block, args);
  for (int64_t i = groups.begin * experts + block.rank() * gangs + index; i < groups.end * experts;
       i += block.team_blocks() * gangs) {
    const float* affinities = args.affinities + i * size;
    for (int token = gang.thread(); token < size; token += gang.threads()) {
      keys[token] = ordered_key(affinities[token]);
    }
    gang.sync();
    const Threshold threshold = find_threshold(gang, keys, size, args.capacity, counts);
    const int64_t group = i / experts;
    take_tokens(gang, args, group, static_cast<int>(i - group * experts), 0, size, threshold,
                {0, 0}, counts, [keys](int token) { return keys[token]; });
    gang.sync();
  }
}

template <int V>
struct ExpertChoiceShort {
  using Args = ExpertChoiceArgs;
  static constexpr const char* name = "expert_choice_fwd";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = V == 4 ? 3 : 1;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    compute_affinities<V>(block, args);
    block.sync_team();
    if (args.group_size <= kLongestWarpPool) {
      select_pools<Block, true>(block, args);
    } else {
      select_pools<Block, false>(block, args);
    }
    block.sync_team();
    list_rows<V>(block, args);
    finish(block, args);
  }

  static int64_t shared_bytes(const Args& args, int threads) {
    const int64_t pools = args.group_size <= kLongestWarpPool ? threads / 32 : 1;
    return pools * (args.group_size + kDigits) * static_cast<int64_t>(sizeof(uint32_t));
  }
};

}  // namespace moe::cuda
