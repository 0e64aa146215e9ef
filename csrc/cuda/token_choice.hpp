// Token choice: each token's K best experts, then a stable counting sort of the choices by expert.
//
// The tokens are cut into chunks, each inside one group, and every block has a run of chunks. It
// numbers its own choices of each expert in the order of tokens (a bit a token, counted; so no
// atomic whose order matters). Then all blocks meet once, and a block's rows start after those of
// the blocks before it. Then they add up the loss sums of the chunks, too, and the last block to
// end makes losses of them.
#pragma once

#include "radix.hpp"
#include "reduce.hpp"
#include "route_args.hpp"

namespace moe::cuda {

struct TokenChoiceArgs : RouteArgs {
  const float* selection_bias;
  float* affinities;      // (T, K) of the chosen experts
  int32_t* numbers;       // (T, K) of each choice among those of its block and expert
  double* chunk_sums;     // (chunks, E + 3) loss sums, see token_lanes.hpp
  int32_t* chunk_counts;  // (chunks, E)
  int32_t* block_counts;  // (blocks, E)
  double* sums;           // (E + 3,)
  double* balances;       // (blocks,) of the groups that each block adds up
  int32_t top_k, expert_groups, top_k_groups;
  int32_t chunk;             // tokens of a chunk, fewer at the end of a group
  int32_t chunks_per_group;  // the number of chunks is at most 2^31 - 1, too
};

// Ranks by key, then by falling index: equal keys go to the lower index. No two are equal.
MOE_DEVICE uint64_t pack_choice(float key, uint32_t index) {
  return static_cast<uint64_t>(ordered_key(key)) << 32 | (0xffffffffu - index);
}

// Tokens of a chunk.
MOE_DEVICE Range tokens_of(const TokenChoiceArgs& args, int64_t chunk) {
  const int64_t group = chunk / args.chunks_per_group;
  const int64_t first = (chunk - group * args.chunks_per_group) * args.chunk;
  const int64_t last = smaller<int64_t>(first + args.chunk, args.group_size);
  return {group * args.group_size + first, group * args.group_size + last};
}

template <class Block>
MOE_DEVICE Range run_of(const Block& block, const TokenChoiceArgs& args) {
  const int64_t chunks = static_cast<int64_t>(args.groups) * args.chunks_per_group;
  return share(chunks, block.rank(), block.team_blocks());
}

// Gives experts outside the token's best groups the key -inf. A group's worth is the sum of its
// two best keys (its one key when it holds one expert). `scratch` has E keys and as many worths a
// token, whose threads are all of one warp.
template <int V, class Block>
MOE_DEVICE void keep_best_groups(const Block& block, const TokenChoiceArgs& args, const Slot& slot,
                                 float (&keys)[V], float* scratch) {
  const int experts = args.shape.experts, groups = args.expert_groups, size = experts / groups;
  float* own_keys = scratch + slot.token * 2 * experts;
  float* worths = own_keys + experts;
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    if (slot.expert + v < experts) own_keys[slot.expert + v] = keys[v];
  }
  block.sync_warp();
  for (int group = slot.lane; group < groups; group += args.shape.lanes) {
    float best = own_keys[group * size], second = kLowest;
    for (int i = 1; i < size; ++i) {
      const float key = own_keys[group * size + i];
      second = fmaxf(second, fminf(best, key));
      best = fmaxf(best, key);
    }
    worths[group] = ranking_key(size > 1 ? best + second : best);
  }
  block.sync_warp();
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    if (slot.expert + v >= experts) continue;
    const int group = (slot.expert + v) / size;
    int better = 0;
    for (int other = 0; other < groups; ++other) {
      const bool wins =
          other < group ? worths[other] >= worths[group] : worths[other] > worths[group];
      better += wins ? 1 : 0;
    }
    if (better >= args.top_k_groups) keys[v] = kLowest;
  }
  block.sync_warp();
}

// Choices, loss sums and counts of a chunk. `chosen` (E, words) has a bit for each of its tokens,
// `counts` (E,) how often earlier chunks of the block chose each expert.
template <int V, class Block>
MOE_DEVICE void choose_experts(const Block& block, const TokenChoiceArgs& args, int64_t chunk,
                               int* counts, uint32_t* chosen, float* scratch) {
  const TokenShape& shape = args.shape;
  const Slot slot = slot_of<V>(block, shape);
  const Range range = tokens_of(args, chunk);
  const int words = (args.chunk + 31) / 32;
  for (int i = block.thread(); i < words * shape.experts; i += block.threads()) chosen[i] = 0;
  block.sync();
  LossSums<V> sums;
  // The next logits are on their way while the present ones are worked on; eight do not fit.
  constexpr bool kAhead = V == 4;
  float coming[V];
  const int64_t start = range.begin + slot.token;
  load_logits<V>(args.logits, start, shape, slot.expert, start < range.end, coming);
  for (int64_t first = range.begin; first < range.end; first += slot.slots) {
    const int64_t token = first + slot.token;
    const int place = static_cast<int>(token - range.begin);
    const bool is_token = token < range.end;
    float x[V], keys[V];
    MOE_UNROLL
    for (int v = 0; v < V; ++v) x[v] = coming[v];
    const int64_t next = token + slot.slots;
    if (kAhead) load_logits<V>(args.logits, next, shape, slot.expert, next < range.end, coming);
    sums.check(x, shape, slot.expert);
    const Routed<V> routed = route_token<V>(block, x, shape);
    if (is_token) sums.add(routed);
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      const int expert = slot.expert + v;
      keys[v] = ranking_key(routed.affinity[v]);
      if (args.selection_bias != nullptr && expert < shape.experts) {
        keys[v] = ranking_key(keys[v] + args.selection_bias[expert]);
      }
    }
    if (args.top_k_groups < args.expert_groups) {
      keep_best_groups<V>(block, args, slot, keys, scratch);
    }
    uint64_t ranked[V];
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      const int expert = slot.expert + v;
      ranked[v] = expert < shape.experts ? pack_choice(keys[v], static_cast<uint32_t>(expert)) : 0;
    }
    for (int k = 0; k < args.top_k; ++k) {
      uint64_t best = ranked[0];
      MOE_UNROLL
      for (int v = 1; v < V; ++v) best = larger(best, ranked[v]);
      best = max_lanes(block, best, shape.lanes);
      MOE_UNROLL
      for (int v = 0; v < V; ++v) {
        if (ranked[v] != best) continue;
        ranked[v] = 0;  // below every packed key
        if (!is_token) continue;
        const int expert = slot.expert + v;
        args.expert_indices[token * args.top_k + k] = expert;
        args.affinities[token * args.top_k + k] = routed.affinity[v];
        block.or_shared(chosen + expert * words + place / 32, 1u << (place % 32));
      }
    }
    if (!kAhead) load_logits<V>(args.logits, next, shape, slot.expert, next < range.end, coming);
  }
  block.sync();
  for (int64_t i = range.begin * args.top_k + block.thread(); i < range.end * args.top_k;
       i += block.threads()) {
    const int expert = args.expert_indices[i];
    const int64_t token = static_cast<uint32_t>(i) / static_cast<uint32_t>(args.top_k);
    const int place = static_cast<int>(token - range.begin);
    const uint32_t* own = chosen + expert * words;
    int number = counts[expert] + count_bits(own[place / 32] & ((1u << (place % 32)) - 1));
    for (int word = 0; word < place / 32; ++word) number += count_bits(own[word]);
    args.numbers[i] = number;
  }
  block.sync();
  for (int expert = block.thread(); expert < shape.experts; expert += block.threads()) {
    int count = 0;
    for (int word = 0; word < words; ++word) count += count_bits(chosen[expert * words + word]);
    args.chunk_counts[chunk * shape.experts + expert] = count;
    counts[expert] += count;
  }
  sums.write(block, shape, scratch, args.chunk_sums + chunk * (shape.experts + kMoreSums));
}

// First row of each expert's choices of this block, left in `starts` (E,); the first block stores
// the counts of all. `scratch` is that of two sum_columns.
template <class Block>
MOE_DEVICE void find_starts(const Block& block, const TokenChoiceArgs& args, int* starts,
                            int* scratch) {
  const int experts = args.shape.experts;
  const int parts = larger(block.threads() / experts, 1);
  int* totals = scratch + parts * experts;
  for (int i = block.thread(); i < parts * experts; i += block.threads()) {
    const int32_t* counts = args.block_counts + i % experts;
    const int64_t first = i / experts;
    const int64_t earlier = first < block.rank() ? (block.rank() - first + parts - 1) / parts : 0;
    const int64_t own = first + earlier * parts;  // the first row that is not of an earlier block
    scratch[i] = sum_strided(counts, first, block.rank(), parts, experts);
    totals[i] = scratch[i] + sum_strided(counts, own, block.team_blocks(), parts, experts);
  }
  block.sync();
  for (int e = block.thread(); e < experts; e += block.threads()) {
    int before = 0, total = 0;
    for (int part = 0; part < parts; ++part) {
      before += scratch[part * experts + e];
      total += totals[part * experts + e];
    }
    starts[e] = before;
    totals[e] = total;
  }
  block.sync();
  if (block.warp() == 0) {
    int before = 0;
    for (int first = 0; first < experts; first += 32) {
      const int e = first + block.lane();
      const int count = e < experts ? totals[e] : 0;
      const int offset = before + exclusive_lanes(block, count, 32);
      if (e < experts) {
        starts[e] += offset;
        if (block.rank() == 0) {
          args.expert_offsets[e] = offset;
          args.tokens_per_expert[e] = count;
        }
      }
      before += sum_lanes(block, count, 32);
    }
    if (block.rank() == 0 && block.lane() == 0) args.expert_offsets[experts] = before;
  }
  block.sync();
}

// Rows of the block's choices, and each token's list of rows by rising expert.
template <class Block>
MOE_DEVICE void place_choices(const Block& block, const TokenChoiceArgs& args, Range tokens,
                              const int* starts) {
  const int64_t top_k = args.top_k;
  for (int64_t i = tokens.begin * top_k + block.thread(); i < tokens.end * top_k;
       i += block.threads()) {
    const int64_t token = static_cast<uint32_t>(i) / static_cast<uint32_t>(top_k);
    const int32_t* experts = args.expert_indices + token * top_k;
    const int expert = args.expert_indices[i];
    const int row = starts[expert] + args.numbers[i];
    int lower = 0;
    for (int64_t k = 0; k < top_k; ++k) lower += experts[k] < expert ? 1 : 0;
    float weight = args.affinities[i];
    if (args.per_token) {
      float total = 0;
      for (int64_t k = 0; k < top_k; ++k) total += args.affinities[token * top_k + k];
      weight = weight / positive_or_one(total);
    }
    args.token_indices[row] = static_cast<int32_t>(token);
    args.weights[row] = weight * args.scale;
    args.row_indices[token * top_k + lower] = row;
    args.row_experts[token * top_k + lower] = expert;
    if (i == token * top_k) args.row_offsets[token] = static_cast<int32_t>(i);
  }
}

// Counts of the groups, and Σ over groups and experts of rows · distribution. A few lanes share a
// group's expert, as many as the group has chunks.
template <class Block>
MOE_DEVICE void count_groups(const Block& block, const TokenChoiceArgs& args, double* scratch) {
  const int experts = args.shape.experts;
  int lanes = 1;
  while (lanes < 32 && lanes < args.chunks_per_group) lanes *= 2;
  const int lane = block.lane() & (lanes - 1);
  const int each = block.threads() / lanes;
  const int64_t items = static_cast<int64_t>(args.groups) * experts;
  double balance = 0;
  for (int64_t first = block.rank() * each; first < items; first += block.team_blocks() * each) {
    const int64_t item = first + block.thread() / lanes;
    const int64_t group = item / experts, expert = item - group * experts;
    const int64_t begin = group * args.chunks_per_group + lane;
    const int64_t end = item < items ? (group + 1) * args.chunks_per_group : 0;
    int count = sum_strided(args.chunk_counts + expert, begin, end, lanes, experts);
    double sum = sum_strided(args.chunk_sums + expert, begin, end, lanes, experts + kMoreSums);
    count = sum_lanes(block, count, lanes);
    sum = sum_lanes(block, sum, lanes);
    if (lane != 0 || item >= items) continue;
    args.group_counts[item] = count;
    balance += sum * count;
  }
  balance = sum_lanes(block, balance, 32);
  if (block.lane() == 0) scratch[block.warp()] = balance;
  block.sync();
  if (block.thread() == 0) {
    double total = 0;
    for (int warp = 0; warp < block.warps(); ++warp) total += scratch[warp];
    args.balances[block.rank()] = total;
  }
  const int64_t chunks = static_cast<int64_t>(args.groups) * args.chunks_per_group;
  sum_columns_of_team(block, args.chunk_sums, chunks, experts + kMoreSums, args.sums);
}

template <class Block>
MOE_DEVICE void store_choice_losses(const Block& block, const TokenChoiceArgs& args) {
  const int experts = args.shape.experts;
  const double* sums = args.sums;
  const double tokens = larger(args.tokens, 1);
  for (int e = block.thread(); e <= experts; e += block.threads()) {
    args.histogram[e] = e == args.top_k ? args.tokens : 0;
    if (e < experts) args.terms[kMeanProb + e] = static_cast<float>(sums[e] / tokens);
  }
  if (block.warp() != 0) return;
  double balance = 0;
  for (int e = block.lane(); e < experts; e += 32) balance += sums[e] * args.tokens_per_expert[e];
  balance = sum_lanes(block, balance, 32);
  double per_group = sum_strided(args.balances, block.lane(), block.team_blocks(), 32, 1);
  per_group = sum_lanes(block, per_group, 32);
  if (block.lane() != 0) return;
  const double rows = larger(static_cast<double>(args.tokens) * args.top_k, 1.0);
  const double frequency = experts / rows;
  *args.load_balance = static_cast<float>(balance * frequency / tokens);
  // f of one group is E / (R / G) n; the mean over groups takes the G back.
  args.terms[kBalancePerGroup] = static_cast<float>(per_group * frequency * args.groups / tokens);
  args.terms[kEntropy] = static_cast<float>(sums[experts + kSumEntropy] / tokens);
  *args.z_loss = static_cast<float>(sums[experts + kSumZ] / tokens);
  *args.non_finite = sums[experts + kSumNonFinite] > 0 ? 1 : 0;
  args.row_offsets[args.tokens] = args.tokens * args.top_k;
}

template <int V>
struct TokenChoice {
  using Args = TokenChoiceArgs;
  static constexpr const char* name = "token_choice_fwd";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = 2;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const int experts = args.shape.experts;
    const int words = (args.chunk + 31) / 32;
    int* counts = block.template shared<int>();
    uint32_t* chosen = reinterpret_cast<uint32_t*>(counts + (experts + 3) / 4 * 4);
    int* scratch = reinterpret_cast<int*>(chosen + (experts * words + 3) / 4 * 4);
    for (int e = block.thread(); e < experts; e += block.threads()) counts[e] = 0;
    block.sync();
    const Range run = run_of(block, args);
    for (int64_t chunk = run.begin; chunk < run.end; ++chunk) {
      choose_experts<V>(block, args, chunk, counts, chosen, reinterpret_cast<float*>(scratch));
    }
    for (int e = block.thread(); e < experts; e += block.threads()) {
      args.block_counts[block.rank() * experts + e] = counts[e];
    }
    block.sync_team();
    find_starts(block, args, counts, scratch);
    if (run.begin < run.end) {
      const Range tokens = {tokens_of(args, run.begin).begin, tokens_of(args, run.end - 1).end};
      place_choices(block, args, tokens, counts);
    }
    count_groups(block, args, reinterpret_cast<double*>(scratch));
    if (!block.is_last_of(args.counter, block.team_blocks())) return;
    store_choice_losses(block, args);
  }

  // Counts and bits, and the largest of what is needed one after the other.
  static int64_t shared_bytes(const Args& args, int threads) {
    const int64_t experts = args.shape.experts, words = (args.chunk + 31) / 32;
    const bool limited = args.top_k_groups < args.expert_groups;
    const int64_t groups = limited ? threads / args.shape.lanes * 2 * experts * int64_t{4} : 0;
    const int64_t scratch = std::max({groups, sums_bytes(experts, threads),
                                      threads / 32 * static_cast<int64_t>(sizeof(double)),
                                      2 * columns_bytes<int>(experts, threads)});
    return ((experts + 3) / 4 * 4 + (experts * words + 3) / 4 * 4) * 4 + scratch;
  }
};

}  // namespace moe::cuda
