// How token choice is cut into blocks, and where its workspace lies.
#include "token_choice.hpp"

#include <algorithm>

#include "launch.hpp"
#include "workspace.hpp"

namespace moe::cuda {

namespace {

// Tokens of a chunk: small enough that every processor gets two, large enough that a block has work
// for all threads and that what a chunk costs beside its tokens does not matter.
int32_t chunk_of(int64_t tokens, int64_t experts, int64_t group_size, int device) {
  const int64_t wanted = tokens / (int64_t{2} * limits_of(device).processors);
  const TokenShape shape = token_shape(nullptr, experts, Affinity::softmax);
  const int64_t least = std::max(32, TokenChoice<4>::kThreads / shape.lanes);
  const int64_t chunk = std::min(std::max((wanted + 31) / 32 * 32, least), int64_t{256});
  return static_cast<int32_t>(std::max<int64_t>(std::min(chunk, group_size), 1));
}

struct Cut {
  int32_t chunk, chunks_per_group;
  int64_t chunks;
  float* affinities;
  int32_t *numbers, *chunk_counts, *block_counts;
  double *chunk_sums, *sums, *balances;
};

Cut cut_tokens(Workspace& space, int64_t tokens, int64_t experts, int64_t groups, int64_t top_k,
               int device) {
  Cut cut = {};
  const int64_t size = tokens / groups;
  cut.chunk = chunk_of(tokens, experts, size, device);
  cut.chunks_per_group = static_cast<int32_t>((size + cut.chunk - 1) / cut.chunk);
  cut.chunks = groups * cut.chunks_per_group;
  cut.chunk_sums = space.take<double>(cut.chunks * (experts + kMoreSums));
  cut.sums = space.take<double>(experts + kMoreSums);
  cut.balances = space.take<double>(most_blocks(device));
  cut.affinities = space.take<float>(tokens * top_k);
  cut.numbers = space.take<int32_t>(tokens * top_k);
  cut.chunk_counts = space.take<int32_t>(cut.chunks * experts);
  cut.block_counts = space.take<int32_t>(most_blocks(device) * experts);
  return cut;
}

template <int V>
void launch_values(const Device& device, const TokenChoiceArgs& args, int64_t chunks) {
  using Kernel = TokenChoice<V>;
  Grid grid = {1, 1, Kernel::kThreads, Kernel::shared_bytes(args, Kernel::kThreads)};
  const int64_t most =
      std::min(blocks_at_once<Kernel, Team::grid>(device.index, grid.threads, grid.shared_bytes),
               most_blocks(device.index));
  // No more blocks than give each as many chunks as the busiest has: the others would only wait.
  const int64_t rounds = std::max<int64_t>((chunks + most - 1) / most, 1);
  grid.team_size = std::max<int64_t>((chunks + rounds - 1) / rounds, 1);
  launch<Kernel, Team::grid>(device, grid, args);
}

}  // namespace

int64_t token_choice_workspace(int64_t tokens, int64_t experts, int64_t groups, int64_t top_k,
                               int device) {
  Workspace space(nullptr);
  cut_tokens(space, tokens, experts, groups, top_k, device);
  return space.bytes();
}

void token_choice_fwd(const Device& device, const TokenChoiceCall& call) {
  check_sizes("token_choice", call, call.tokens * call.top_k);
  Workspace space(call.workspace);
  const Cut cut =
      cut_tokens(space, call.tokens, call.experts, call.groups, call.top_k, device.index);
  TokenChoiceArgs args = {};
  fill_args(args, call, call.tokens * call.top_k);
  args.selection_bias = call.selection_bias;
  args.affinities = cut.affinities;
  args.numbers = cut.numbers;
  args.chunk_sums = cut.chunk_sums;
  args.chunk_counts = cut.chunk_counts;
  args.block_counts = cut.block_counts;
  args.sums = cut.sums;
  args.balances = cut.balances;
  args.top_k = static_cast<int32_t>(call.top_k);
  args.expert_groups = static_cast<int32_t>(call.expert_groups);
  args.top_k_groups = static_cast<int32_t>(call.top_k_groups);
  args.chunk = cut.chunk;
  args.chunks_per_group = cut.chunks_per_group;
  if (values_for(call.experts) == 4) {
    launch_values<4>(device, args, cut.chunks);
  } else {
    launch_values<8>(device, args, cut.chunks);
  }
}

}  // namespace moe::cuda
