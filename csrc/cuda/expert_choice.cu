// How expert choice is cut into blocks, and where its workspace lies.
#include <algorithm>

#include "expert_choice_long.hpp"
#include "launch.hpp"
#include "workspace.hpp"

namespace moe::cuda {

namespace {

bool is_long(int64_t group_size, TeamChoice choice) {
  return group_size > kLongestPool || choice == TeamChoice::chunks;
}

// Tokens of a long pool that a block counts at a time: enough for every processor to have eight
// chunks, unless what a chunk costs beside its tokens (2048 counts) would then matter.
int32_t chunk_of(int64_t tokens, int64_t experts, int64_t group_size, int device) {
  const int64_t wanted = tokens * experts / (int64_t{8} * limits_of(device).processors);
  int32_t chunk = group_size > kLongestPool ? 2048 : 64;
  while (chunk < 8192 && 2 * chunk <= wanted) chunk *= 2;
  return chunk;
}

struct Parts {
  float* affinities;
  uint32_t* taken;
  uint32_t* before;
  double *block_sums, *team_sums;
  Found* found;
  int32_t *team_held, *counts, *of_chunk, *above, *chunk_taken;
};

Parts cut_workspace(Workspace& space, int64_t tokens, int64_t experts, int64_t groups,
                    TeamChoice choice, int device) {
  const int64_t size = tokens / groups, words = (size + 31) / 32;
  const int64_t sums = most_blocks(device) * (experts + kMoreSums);
  Parts parts = {};
  parts.block_sums = space.take<double>(sums);
  parts.team_sums = space.take<double>(sums);
  parts.team_held = space.take<int32_t>(most_blocks(device) * (experts + 1));
  parts.affinities = space.take<float>(tokens * experts);
  parts.taken = space.take<uint32_t>(groups * words * experts);
  parts.before = space.take<uint32_t>(groups * words * experts);
  if (is_long(size, choice)) {
    const int64_t chunk = chunk_of(tokens, experts, size, device);
    const int64_t pools = groups * experts, chunks = (size + chunk - 1) / chunk;
    parts.counts = space.take<int32_t>(kPasses * pools * kLongDigits);
    parts.found = space.take<Found>(kPasses * pools);
    parts.of_chunk = space.take<int32_t>(pools * chunks * kLastDigits);
    parts.above = space.take<int32_t>(pools * chunks);
    parts.chunk_taken = space.take<int32_t>(pools * chunks * 2);
  }
  return parts;
}

// Tokens that a block turns from rows into columns at a time.
int tile_of(const TokenShape& shape, int threads) { return std::max(32, threads / shape.lanes); }

int64_t common_bytes(const ExpertChoiceArgs& args, int threads) {
  const int64_t tile = int64_t{4} * args.shape.experts * (args.tile + 1);
  return std::max({tile, sums_bytes(args.shape.experts, threads),
                   columns_bytes<double>(args.shape.experts + kMoreSums, threads) +
                       columns_bytes<int>(args.shape.experts + 1, threads)});
}

template <class Kernel, Team kTeam>
void launch_teams(const Device& device, const typename Kernel::Args& args, Grid grid) {
  const int64_t most =
      std::min(blocks_at_once<Kernel, kTeam>(device.index, grid.threads, grid.shared_bytes),
               most_blocks(device.index));
  if (kTeam == Team::grid) {
    grid.team_size = std::min(grid.team_size, most);  // all of them have to run at once
  } else {
    grid.teams = std::min(grid.teams, std::max<int64_t>(most / grid.team_size, 1));
  }
  launch<Kernel, kTeam>(device, grid, args);
}

// Warps that select from a pool, when a team has `blocks` blocks and `pools` pools: enough for none
// to be idle, and for the pools of a block to take no more shared memory than lets three of them
// share a processor.
int gang_of(int64_t blocks, int64_t pools, int64_t group_size, int warps) {
  constexpr int64_t kMostBytes = 64 << 10;
  int gang = 1;
  const auto is_enough = [&] {
    const bool none_idle = 2 * gang * pools > blocks * warps;
    const int64_t bytes = warps / gang * int64_t{4} * pool_words(static_cast<int>(group_size));
    const bool has_barrier = gang == 1 || 4 * gang >= warps;
    return none_idle && bytes <= kMostBytes && has_barrier;
  };
  while (gang < warps && !is_enough()) gang *= 2;
  return gang;
}

// The kernel for pools of a length: more threads for long ones, which few blocks have in common.
int threads_for(int64_t group_size) { return group_size > 2048 ? 512 : 256; }

template <int V>
void launch_short(const Device& device, ExpertChoiceArgs args, TeamChoice choice) {
  using Kernel = ExpertChoiceShort<V>;
  const int threads = threads_for(args.group_size), warps = threads / 32;
  const int processors = limits_of(device.index).processors;
  const auto shared_bytes = [&](int64_t blocks, int64_t pools) {
    args.gang = gang_of(blocks, pools, args.group_size, warps);
    return std::max(common_bytes(args, threads), Kernel::shared_bytes(args, threads));
  };
  // As many blocks as have a tile of tokens each.
  const int64_t useful = (args.group_size + args.tile - 1) / args.tile;
  const int64_t most_bytes = shared_bytes(1, args.shape.experts);
  const int64_t possible = largest_cluster<Kernel>(device.index, threads, most_bytes);
  int64_t cluster = 1;
  while (2 * cluster <= std::min(possible, useful)) cluster *= 2;
  const int64_t of_clusters = args.groups * cluster, of_grid = args.groups * useful;
  if (choice == TeamChoice::automatic) {
    // A cluster waits in a fraction of the time that the grid does, but a few of them leave most of
    // the GPU idle.
    const bool idle = 2 * of_clusters < processors && 4 * of_clusters <= of_grid;
    choice = idle ? TeamChoice::grid : TeamChoice::cluster;
  }
  Grid grid = {args.groups, cluster, threads, 0};
  if (choice != TeamChoice::grid) {
    grid.shared_bytes = shared_bytes(cluster, args.shape.experts);
    return launch_teams<Kernel, Team::cluster>(device, args, grid);
  }
  grid.shared_bytes = shared_bytes(std::min<int64_t>(of_grid, processors),
                                   int64_t{args.groups} * args.shape.experts);
  grid.teams = 1;
  grid.team_size = std::max<int64_t>(of_grid, 1);
  launch_teams<Kernel, Team::grid>(device, args, grid);
}

template <int V>
void launch_long(const Device& device, const ExpertChoiceArgs& common, const Parts& parts) {
  using Kernel = ExpertChoiceLong<V>;
  ExpertChoiceLongArgs args = {};
  args.common = common;
  args.chunk = chunk_of(common.tokens, common.shape.experts, common.group_size, device.index);
  args.chunks = (common.group_size + args.chunk - 1) / args.chunk;
  args.counts = parts.counts;
  args.found = parts.found;
  args.of_chunk = parts.of_chunk;
  args.above = parts.above;
  args.taken = parts.chunk_taken;
  Grid grid = {1, INT32_MAX, Kernel::kThreads, 0};
  grid.shared_bytes =
      std::max(common_bytes(common, grid.threads), Kernel::shared_bytes(args, grid.threads));
  launch_teams<Kernel, Team::grid>(device, args, grid);
}

template <int V>
void launch_values(const Device& device, const ExpertChoiceArgs& args, const Parts& parts,
                   TeamChoice choice) {
  if (is_long(args.group_size, choice)) {
    launch_long<V>(device, args, parts);
  } else {
    launch_short<V>(device, args, choice);
  }
}

}  // namespace

int64_t expert_choice_workspace(int64_t tokens, int64_t experts, int64_t groups, TeamChoice team,
                                int device) {
  Workspace space(nullptr);
  cut_workspace(space, tokens, experts, groups, team, device);
  return space.bytes();
}

void expert_choice_fwd(const Device& device, const ExpertChoiceCall& call) {
  const int64_t rows = call.experts * call.groups * call.capacity;
  check_sizes("expert_choice", call, rows);
  Workspace space(call.workspace);
  const Parts parts =
      cut_workspace(space, call.tokens, call.experts, call.groups, call.team, device.index);
  ExpertChoiceArgs args = {};
  fill_args(args, call, rows);
  args.affinities = parts.affinities;
  args.taken = parts.taken;
  args.before = parts.before;
  args.block_sums = parts.block_sums;
  args.team_sums = parts.team_sums;
  args.team_held = parts.team_held;
  args.words = (args.group_size + 31) / 32;
  args.capacity = static_cast<int32_t>(call.capacity);
  const int threads = is_long(args.group_size, call.team) ? ExpertChoiceLong<4>::kThreads
                                                          : threads_for(args.group_size);
  args.tile = tile_of(args.shape, threads);
  if (values_for(call.experts) == 4) {
    launch_values<4>(device, args, parts, call.team);
  } else {
    launch_values<8>(device, args, parts, call.team);
  }
}

}  // namespace moe::cuda
