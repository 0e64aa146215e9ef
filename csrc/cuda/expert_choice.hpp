// Expert choice: what its kernels share. A team of blocks routes some groups in three phases, each
// spread over all of its blocks, and waits between them:
//
//   1. affinities of every token, transposed to a pool (E, G, S) for each expert and group;
//   2. each pool's C best tokens: their rows, and for every 32 tokens a word of who was taken and
//      how many were before (a token's row then needs no search);
//   3. each token's list of rows, and the losses.
//
// A group has exactly E·C rows, so that a team knows where its lists start without asking others.
#pragma once

#include "radix.hpp"
#include "reduce.hpp"
#include "route_args.hpp"

namespace moe::cuda {

struct ExpertChoiceArgs : RouteArgs {
  float* affinities;   // (G, E, S)
  uint32_t* taken;     // (G, W, E): a bit for each of 32 tokens, W = S / 32 rounded up
  uint32_t* before;    // (G, W, E): tokens taken before those
  double* block_sums;  // (blocks, E + 3) loss sums, see token_lanes.hpp
  double* team_sums;   // (teams, E + 3)
  int32_t* team_held;  // (teams, E + 1) tokens that 0, 1, ..., E experts took
  int32_t words, capacity;
  int gang;  // warps that select from a pool
  int tile;  // tokens that a block transposes at a time, a multiple of those in its registers
};

// The groups of the team at hand.
template <class Block>
MOE_DEVICE Range groups_of(const Block& block, const ExpertChoiceArgs& args) {
  return share(args.groups, block.team(), block.teams());
}

// Divided in 32 bits: in 64 it is a call.
MOE_DEVICE int64_t group_of(const ExpertChoiceArgs& args, int64_t token) {
  return static_cast<uint32_t>(token) / static_cast<uint32_t>(args.group_size);
}

// Loss sums of the team's first block; those of the others follow.
template <class Block>
MOE_DEVICE double* block_sums_of(const Block& block, const ExpertChoiceArgs& args) {
  return args.block_sums + block.team() * block.team_blocks() * (args.shape.experts + kMoreSums);
}

template <class Block>
MOE_DEVICE int32_t* held_of(const Block& block, const ExpertChoiceArgs& args) {
  return args.team_held + block.team() * (args.shape.experts + 1);
}

template <int V, class Block>
MOE_DEVICE void compute_affinities(const Block& block, const ExpertChoiceArgs& args) {
  const TokenShape& shape = args.shape;
  const Slot slot = slot_of<V>(block, shape);
  const Range groups = groups_of(block, args);
  const int64_t end = groups.end * args.group_size;
  const int stride = args.tile + 1;  // one more, so that a column meets all banks
  float* tile = block.template shared<float>();
  LossSums<V> sums;
  const int64_t start = groups.begin * args.group_size + block.rank() * args.tile;
  const int64_t round = block.team_blocks() * args.tile;
  float coming[V];  // the next logits, on their way while the present ones are worked on
  load_logits<V>(args.logits, start + slot.token, shape, slot.expert, start + slot.token < end,
                 coming);
  for (int64_t first = start; first < end; first += round) {
    for (int step = 0; step < args.tile; step += slot.slots) {
      const int place = step + slot.token;
      const int64_t token = first + place;
      const bool is_token = token < end;
      float x[V];
      MOE_UNROLL
      for (int v = 0; v < V; ++v) x[v] = coming[v];
      const bool is_last = step + slot.slots >= args.tile;
      const int64_t next = is_last ? first + round + slot.token : token + slot.slots;
      load_logits<V>(args.logits, next, shape, slot.expert, next < end, coming);
      sums.check(x, shape, slot.expert);
      const Routed<V> routed = route_token<V>(block, x, shape);
      if (!is_token) continue;
      sums.add(routed);
      MOE_UNROLL
      for (int v = 0; v < V; ++v) {
        const int expert = slot.expert + v;
        if (expert < shape.experts) tile[expert * stride + place] = routed.affinity[v];
      }
    }
    block.sync();
    for (int place = block.lane(); place < args.tile; place += 32) {
      const int64_t token = first + place;
      if (token >= end) break;
      const int64_t group = group_of(args, token);
      const int64_t pool = group * shape.experts;
      float* to = args.affinities + pool * args.group_size + (token - group * args.group_size);
      for (int64_t expert = block.warp(); expert < shape.experts; expert += block.warps()) {
        to[expert * args.group_size] = tile[expert * stride + place];
      }
    }
    block.sync();
  }
  sums.write(block, shape, tile,
             block_sums_of(block, args) + block.rank() * (shape.experts + kMoreSums));
  if (block.rank() != 0) return;
  int32_t* held = held_of(block, args);
  for (int i = block.thread(); i <= shape.experts; i += block.threads()) held[i] = 0;
}

// After phase 1, while others still select.
template <class Block>
MOE_DEVICE void sum_team(const Block& block, const ExpertChoiceArgs& args) {
  const int columns = args.shape.experts + kMoreSums;
  sum_columns_of_team(block, block_sums_of(block, args), block.team_blocks(), columns,
                      args.team_sums + block.team() * columns);
}

// Where a gang stands in a pool: what was taken before its tokens.
struct Taken {
  int above, equal;  // keys above the threshold, and equal to it
};

// Takes tokens [first, last) of a pool by its threshold; first is a multiple of 32. `key_of(token)`
// is asked for tokens of the pool only. Each warp takes a run of words; `scratch` has two numbers
// a warp.
template <class Gang, class KeyOf>
MOE_DEVICE void take_tokens(const Gang& gang, const ExpertChoiceArgs& args, int64_t group,
                            int expert, int first, int last, const Threshold& threshold,
                            Taken start, int* scratch, KeyOf key_of) {
  const auto& block = gang.block;
  const int words = (last - first + 31) / 32;
  const Range run = share(words, gang.warp(), gang.warps());
  const int begin = first / 32 + static_cast<int>(run.begin);
  const int end = first / 32 + static_cast<int>(run.end);
  if (gang.warps() > 1) {
    int above = 0, equal = 0;
    for (int word = begin; word < end; ++word) {
      const int token = word * 32 + block.lane();
      const uint32_t key = token < last ? key_of(token) : 0;
      above += token < last && key > threshold.key ? 1 : 0;
      equal += token < last && key == threshold.key ? 1 : 0;
    }
    above = sum_lanes(block, above, 32);
    equal = sum_lanes(block, equal, 32);
    if (block.lane() == 0) {
      scratch[2 * gang.warp()] = above;
      scratch[2 * gang.warp() + 1] = equal;
    }
    gang.sync();
    for (int warp = 0; warp < gang.warp(); ++warp) {
      start.above += scratch[2 * warp];
      start.equal += scratch[2 * warp + 1];
    }
    gang.sync();
  }
  const int64_t pool = (group * args.shape.experts + expert) * args.group_size;
  const int64_t first_row = (static_cast<int64_t>(expert) * args.groups + group) * args.capacity;
  const uint32_t lower_lanes = (1u << block.lane()) - 1;
  int taken = start.above + smaller(start.equal, threshold.needed);
  for (int word = begin; word < end; ++word) {
    const int token = word * 32 + block.lane();
    const uint32_t key = token < last ? key_of(token) : 0;
    const uint32_t equal = block.ballot(token < last && key == threshold.key);
    const bool is_equal = (equal >> block.lane() & 1) != 0;
    const bool first_of_equal =
        is_equal && start.equal + count_bits(equal & lower_lanes) < threshold.needed;
    const bool is_taken = (token < last && key > threshold.key) || first_of_equal;
    const uint32_t mask = block.ballot(is_taken);
    if (block.lane() == 0) {
      const int64_t place = (group * args.words + word) * args.shape.experts + expert;
      args.taken[place] = mask;
      args.before[place] = static_cast<uint32_t>(taken);
    }
    if (is_taken) {
      const int64_t row = first_row + taken + count_bits(mask & lower_lanes);
      args.token_indices[row] = static_cast<int32_t>(group * args.group_size + token);
      // From memory, not from the key: a NaN stays one.
      args.weights[row] = args.affinities[pool + token] * args.scale;
    }
    taken += count_bits(mask);
    start.equal += count_bits(equal);
  }
}

// Words of a thread's experts; 0 in places past the last one.
template <int V>
MOE_DEVICE void load_words(const uint32_t* words, const TokenShape& shape, int expert,
                           uint32_t (&out)[V]) {
  MOE_UNROLL
  for (int v = 0; v < V; v += 4) {
    const uint32_t* from = words + expert + v;
    Word4 four = {0, 0, 0, 0};
    if (shape.experts % 4 == 0) {  // then every run of four is aligned
      if (expert + v < shape.experts) four = *reinterpret_cast<const Word4*>(from);
    } else {
      if (expert + v + 0 < shape.experts) four.x = from[0];
      if (expert + v + 1 < shape.experts) four.y = from[1];
      if (expert + v + 2 < shape.experts) four.z = from[2];
      if (expert + v + 3 < shape.experts) four.w = from[3];
    }
    out[v] = four.x;
    out[v + 1] = four.y;
    out[v + 2] = four.z;
    out[v + 3] = four.w;
  }
}

// Phase 3 of the tokens, after the team has met: rows of each token by rising expert, weights
// divided by their sum, how many tokens 0, 1, ..., E experts took.
template <int V, class Block>
MOE_DEVICE void list_rows(const Block& block, const ExpertChoiceArgs& args) {
  const TokenShape& shape = args.shape;
  const Slot slot = slot_of<V>(block, shape);
  const Range groups = groups_of(block, args);
  const int64_t end = groups.end * args.group_size;
  int* held = block.template shared<int>();
  for (int i = block.thread(); i <= shape.experts; i += block.threads()) held[i] = 0;
  block.sync();
  const int64_t step = block.team_blocks() * slot.slots;
  for (int64_t first = groups.begin * args.group_size + block.rank() * slot.slots; first < end;
       first += step) {
    const int64_t token = first + slot.token;
    const bool is_token = token < end;
    const int64_t group = group_of(args, is_token ? token : first);
    const int place = static_cast<int>((is_token ? token : first) - group * args.group_size);
    const int64_t word = (group * args.words + place / 32) * shape.experts;
    const uint32_t bit = 1u << (place % 32);
    uint32_t taken[V], earlier[V];
    load_words<V>(args.taken + word, shape, slot.expert, taken);
    load_words<V>(args.before + word, shape, slot.expert, earlier);
    int row_of[V];  // -1 where the expert did not take the token
    int before = 0, own = 0;
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      row_of[v] = -1;
      const int expert = slot.expert + v;
      if (!is_token || expert >= shape.experts) continue;
      const int position = static_cast<int>(earlier[v]) + count_bits(taken[v] & (bit - 1));
      before += position;
      if ((taken[v] & bit) == 0) continue;
      own += 1;
      row_of[v] = (expert * args.groups + static_cast<int>(group)) * args.capacity + position;
    }
    before = sum_lanes(block, before, shape.lanes);
    const int lower = exclusive_lanes(block, own, shape.lanes);
    const int count = sum_lanes(block, own, shape.lanes);
    const int offset = static_cast<int>(group) * shape.experts * args.capacity + before;
    const int64_t pool = group * shape.experts * args.group_size + place;
    float affinity[V];
    float total = 0;
    if (args.per_token) {
      MOE_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t expert = slot.expert + v;
        affinity[v] = row_of[v] >= 0 ? args.affinities[pool + expert * args.group_size] : 0.0f;
        total += affinity[v];
      }
      total = positive_or_one(sum_lanes(block, total, shape.lanes));
    }
    if (!is_token) continue;
    int at = offset + lower;
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (row_of[v] < 0) continue;
      args.row_indices[at] = row_of[v];
      args.row_experts[at] = slot.expert + v;
      ++at;
      if (args.per_token) args.weights[row_of[v]] = affinity[v] / total * args.scale;
    }
    if (slot.lane == 0) {
      args.row_offsets[token] = offset;
      block.add_shared(held + count, 1);
    }
  }
  for (int64_t i = groups.begin * shape.experts + block.rank() * block.threads() + block.thread();
       i < groups.end * shape.experts; i += block.team_blocks() * block.threads()) {
    args.group_counts[i] = args.capacity;
  }
  block.sync();
  int32_t* all = held_of(block, args);
  for (int i = block.thread(); i <= shape.experts; i += block.threads()) {
    if (held[i] != 0) block.add_global(all + i, held[i]);
  }
}

// The losses from the sums of all tokens.
template <class Block>
MOE_DEVICE void store_losses(const Block& block, const ExpertChoiceArgs& args, const double* sums,
                             const int* held) {
  const int experts = args.shape.experts;
  const int rows = args.groups * args.capacity;  // of each expert
  const double tokens = larger(args.tokens, 1);
  for (int e = block.thread(); e <= experts; e += block.threads()) {
    args.expert_offsets[e] = e * rows;
    args.histogram[e] = held[e];
    if (e == experts) break;
    args.tokens_per_expert[e] = rows;
    args.terms[kMeanProb + e] = static_cast<float>(sums[e] / tokens);
  }
  if (block.warp() != 0) return;
  const double frequency = static_cast<double>(experts) / larger(experts * rows, 1);
  double distribution = 0;
  for (int e = block.lane(); e < experts; e += 32) distribution += sums[e];
  distribution = sum_lanes(block, distribution, 32);
  if (block.lane() != 0) return;
  // Every expert takes the same from every group: the loss of the groups is that of the pool.
  const float balance = static_cast<float>(distribution * rows * frequency / tokens);
  *args.load_balance = balance;
  args.terms[kBalancePerGroup] = balance;
  args.terms[kEntropy] = static_cast<float>(sums[experts + kSumEntropy] / tokens);
  *args.z_loss = static_cast<float>(sums[experts + kSumZ] / tokens);
  *args.non_finite = sums[experts + kSumNonFinite] > 0 ? 1 : 0;
  args.row_offsets[args.tokens] = experts * rows;
}

// The last team to end adds up the sums of all of them.
template <class Block>
MOE_DEVICE void finish(const Block& block, const ExpertChoiceArgs& args) {
  block.sync_team();
  if (block.rank() != 0) return;
  if (block.teams() > 1 && !block.is_last_of(args.counter, block.teams())) return;
  const int columns = args.shape.experts + kMoreSums;
  double* sums = block.template shared<double>();
  sum_columns(block, args.team_sums, block.teams(), columns, sums);
  int* held = reinterpret_cast<int*>(sums + larger(columns, block.threads()));
  sum_columns(block, args.team_held, block.teams(), args.shape.experts + 1, held);
  store_losses(block, args, sums, held);
}

}  // namespace moe::cuda
