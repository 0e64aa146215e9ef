#include "route_bwd.hpp"

#include <algorithm>

#include "launch.hpp"

namespace moe::cuda {

namespace {

// Blocks that fill the GPU, or as many as there are items.
template <class Kernel>
void launch_items(const Device& device, const typename Kernel::Args& args, int64_t items,
                  int64_t shared_bytes) {
  const int64_t most =
      blocks_at_once<Kernel, Team::cluster>(device.index, Kernel::kThreads, shared_bytes);
  const Grid grid = {std::min(items, most), 1, Kernel::kThreads, shared_bytes};
  launch<Kernel, Team::cluster>(device, grid, args);
}

}  // namespace

void route_bwd(const Device& device, const RouteBwdCall& call) {
  const PlanLayout layout(call.tokens, call.experts, call.groups, call.rows);
  RouteBwdArgs args = {};
  args.logits = call.logits;
  args.dweights = call.dweights;
  args.dload_balance = call.dload_balance;
  args.dz_loss = call.dz_loss;
  args.dterms = call.dterms;
  args.row_indices = call.packed + layout.row_indices;
  args.row_experts = call.packed + layout.row_experts;
  args.row_offsets = call.packed + layout.row_offsets;
  args.tokens_per_expert = call.packed + layout.tokens_per_expert;
  args.group_counts = call.packed + layout.group_counts;
  args.dlogits = call.dlogits;
  args.shape = token_shape(call.logits, call.experts, call.affinity);
  args.loss_groups = static_cast<int32_t>(call.groups);
  args.groups = call.dterms == nullptr ? 1 : args.loss_groups;
  args.group_size = static_cast<int32_t>(call.tokens / args.groups);
  args.frequency = static_cast<float>(static_cast<double>(call.experts) /
                                      static_cast<double>(std::max<int64_t>(call.rows, 1)));
  args.tokens = static_cast<float>(std::max<int64_t>(call.tokens, 1));
  args.chunk = RouteBwd<4>::kThreads / args.shape.lanes;
  args.chunks_per_group = (args.group_size + args.chunk - 1) / args.chunk;
  args.per_token = call.per_token;
  args.scale = call.scale;
  const int64_t chunks = int64_t{args.groups} * args.chunks_per_group;
  const int64_t shared_bytes = call.experts * static_cast<int64_t>(sizeof(float));
  if (values_for(call.experts) == 4) {
    launch_items<RouteBwd<4>>(device, args, chunks, shared_bytes);
  } else {
    launch_items<RouteBwd<8>>(device, args, chunks, shared_bytes);
  }
}

void affinity_fwd(const Device& device, const AffinityCall& call) {
  AffinityArgs args = {};
  args.logits = call.logits;
  args.probs = call.probs;
  args.shape = token_shape(call.logits, call.experts, call.affinity);
  args.tokens = call.tokens;
  const int64_t slots = AffinityFwd<4>::kThreads / args.shape.lanes;
  const int64_t blocks = (call.tokens + slots - 1) / slots;
  if (values_for(call.experts) == 4) {
    launch_items<AffinityFwd<4>>(device, args, blocks, 0);
  } else {
    launch_items<AffinityFwd<8>>(device, args, blocks, 0);
  }
}

}  // namespace moe::cuda
