// What the kernels of both routers are given alike.
#pragma once

#include "token_lanes.hpp"

namespace moe::cuda {

struct RouteArgs {
  const float* logits;
  float* weights;
  float* load_balance;
  float* z_loss;
  float* terms;
  int32_t* token_indices;
  int32_t* row_indices;
  int32_t* row_experts;
  int32_t* row_offsets;
  int32_t* expert_offsets;
  int32_t* tokens_per_expert;
  int32_t* histogram;
  int32_t* group_counts;
  int32_t* expert_indices;  // of token choice
  int32_t* non_finite;
  uint32_t* counter;
  TokenShape shape;
  int32_t tokens, groups, group_size;
  bool per_token;
  float scale;
};

inline void fill_args(RouteArgs& args, const RouteCall& call, int64_t rows) {
  const PlanLayout layout(call.tokens, call.experts, call.groups, rows);
  args.logits = call.logits;
  args.weights = call.weights;
  args.load_balance = call.load_balance;
  args.z_loss = call.z_loss;
  args.terms = call.terms;
  args.token_indices = call.packed + layout.token_indices;
  args.row_indices = call.packed + layout.row_indices;
  args.row_experts = call.packed + layout.row_experts;
  args.row_offsets = call.packed + layout.row_offsets;
  args.expert_offsets = call.packed + layout.expert_offsets;
  args.tokens_per_expert = call.packed + layout.tokens_per_expert;
  args.histogram = call.packed + layout.histogram;
  args.group_counts = call.packed + layout.group_counts;
  args.expert_indices = call.packed + layout.expert_indices;
  args.non_finite = call.non_finite;
  args.counter = call.counter;
  args.shape = token_shape(call.logits, call.experts, call.affinity);
  args.tokens = static_cast<int32_t>(call.tokens);
  args.groups = static_cast<int32_t>(call.groups);
  args.group_size = static_cast<int32_t>(call.tokens / call.groups);
  args.per_token = call.per_token;
  args.scale = call.scale;
}

}  // namespace moe::cuda
