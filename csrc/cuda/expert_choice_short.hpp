// Expert choice from pools that a block holds in shared memory. As many warps select from a pool as
// there are for each: one where experts are many, the whole block where they are few.
#pragma once

#include "expert_choice.hpp"

namespace moe::cuda {

constexpr int kLongestPool = 16384;

// Keys and counts of a pool.
MOE_HOST_DEVICE constexpr int pool_words(int size) { return size + places_of(kDigits); }

// Copies a pool's keys to shared memory; eight loads are on their way at a time.
template <class Gang, class ToKey>
MOE_DEVICE void load_keys(const Gang& gang, const float* affinities, int size, uint32_t* keys,
                          ToKey to_key) {
  constexpr int kFlight = 8;
  for (int first = gang.thread(); first < size; first += kFlight * gang.threads()) {
    float values[kFlight];
    MOE_UNROLL
    for (int i = 0; i < kFlight; ++i) {
      const int token = first + i * gang.threads();
      values[i] = token < size ? affinities[token] : 0.0f;
    }
    MOE_UNROLL
    for (int i = 0; i < kFlight; ++i) {
      const int token = first + i * gang.threads();
      if (token < size) keys[token] = to_key(values[i]);
    }
  }
}

template <class Block>
MOE_DEVICE void select_pools(const Block& block, const ExpertChoiceArgs& args) {
  const Gang<Block> gang = {block, args.gang};
  const int size = args.group_size, experts = args.shape.experts;
  uint32_t* keys = block.template shared<uint32_t>() + gang.index() * pool_words(size);
  int* counts = reinterpret_cast<int*>(keys + size);
  const Range groups = groups_of(block, args);
  const int64_t first = groups.begin * experts + block.rank() * gang.count() + gang.index();
  for (int64_t pool = first; pool < groups.end * experts;
       pool += block.team_blocks() * gang.count()) {
    load_keys(gang, args.affinities + pool * size, size, keys,
              [](float affinity) { return ordered_key(affinity); });
    gang.sync();
    const Threshold threshold = find_threshold(gang, keys, size, args.capacity, counts);
    const int64_t group = static_cast<uint32_t>(pool) / static_cast<uint32_t>(experts);
    take_tokens(gang, args, group, static_cast<int>(pool - group * experts), 0, size, threshold,
                {0, 0}, counts, [keys](int token) { return keys[token]; });
    gang.sync();
  }
}

template <int V>
struct ExpertChoiceShort {
  using Args = ExpertChoiceArgs;
  static constexpr const char* name = "expert_choice_fwd";
  static constexpr int kThreads = 512;
  static constexpr int kBlocks = 1;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    compute_affinities<V>(block, args);
    block.sync_team();
    select_pools(block, args);
    sum_team(block, args);
    block.sync_team();
    list_rows<V>(block, args);
    finish(block, args);
  }

  static int64_t shared_bytes(const Args& args, int threads) {
    const int64_t pools = threads / 32 / args.gang;
    return pools * pool_words(args.group_size) * static_cast<int64_t>(sizeof(uint32_t));
  }
};

}  // namespace moe::cuda
