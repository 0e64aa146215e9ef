// Backward of both routers: from d(routing weights) and d(losses) straight to d(logits), one pass
// over the logits. Also the affinities alone.
#pragma once

#include "token_lanes.hpp"

namespace moe::cuda {

struct RouteBwdArgs {
  const float* logits;
  const float* dweights;  // null without a gradient, as the next three
  const float* dload_balance;
  const float* dz_loss;
  const float* dterms;
  const int32_t* row_indices;
  const int32_t* row_experts;
  const int32_t* row_offsets;
  const int32_t* tokens_per_expert;
  const int32_t* group_counts;
  float* dlogits;
  TokenShape shape;
  int32_t groups, group_size;  // one group where no loss tells them apart
  int32_t loss_groups;         // G
  float frequency;             // E / R
  float tokens;                // at least 1
  int32_t chunk, chunks_per_group;
  bool per_token;
  float scale;
};

// d(losses) / d(distribution), the same for all tokens of a group: (E,) in shared memory.
template <class Block>
MOE_DEVICE void find_coefficients(const Block& block, const RouteBwdArgs& args, int64_t group,
                                  float* coefficients) {
  const int experts = args.shape.experts;
  const float pooled = args.dload_balance == nullptr ? 0 : *args.dload_balance;
  const float per_group =
      args.dterms == nullptr ? 0 : args.dterms[kBalancePerGroup] * args.loss_groups;
  block.sync();
  for (int e = block.thread(); e < experts; e += block.threads()) {
    float value = 0;
    if (args.dload_balance != nullptr) {
      value += pooled * args.frequency * static_cast<float>(args.tokens_per_expert[e]);
    }
    if (args.dterms != nullptr) {
      const float rows = static_cast<float>(args.group_counts[group * experts + e]);
      value += per_group * args.frequency * rows + args.dterms[kMeanProb + e];
    }
    coefficients[e] = value / args.tokens;
  }
  block.sync();
}

// d(affinity) of a token: each of its rows' d(weight) at the row's expert, with the normalisation
// undone.
template <int V, class Block>
MOE_DEVICE void gather_gradient(const Block& block, const RouteBwdArgs& args, const Slot& slot,
                                int64_t token, bool is_token, const float (&affinity)[V],
                                float (&gradient)[V]) {
  float value[V];  // affinities of the experts that hold the token
  MOE_UNROLL
  for (int v = 0; v < V; ++v) gradient[v] = value[v] = 0;
  const int begin = is_token ? args.row_offsets[token] : 0;
  const int end = is_token ? args.row_offsets[token + 1] : 0;
  float total = 0, product = 0;
  for (int i = begin; i < end; ++i) {
    const int place = args.row_experts[i] - slot.expert;
    if (place < 0 || place >= V) continue;
    const float dweight = args.dweights[args.row_indices[i]];
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (v != place) continue;
      gradient[v] = dweight;
      value[v] = affinity[v];
    }
  }
  float divisor = 1, correction = 0;
  if (args.per_token) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      total += value[v];
      product += value[v] * gradient[v];
    }
    total = sum_lanes(block, total, args.shape.lanes);
    product = sum_lanes(block, product, args.shape.lanes);
    divisor = positive_or_one(total);
    correction = total > 0 ? product / total : 0.0f;
  }
  for (int i = begin; args.per_token && i < end; ++i) {
    const int place = args.row_experts[i] - slot.expert;
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (v == place) gradient[v] = (gradient[v] - correction) / divisor;
    }
  }
  MOE_UNROLL
  for (int v = 0; v < V; ++v) gradient[v] *= args.scale;
}

template <int V>
struct RouteBwd {
  using Args = RouteBwdArgs;
  static constexpr const char* name = "route_bwd";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = V == 4 ? 3 : 2;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const bool has_coefficients = args.dload_balance != nullptr || args.dterms != nullptr;
    const Slot slot = slot_of<V>(block, args.shape);
    float* coefficients = block.template shared<float>();
    const int64_t chunks = static_cast<int64_t>(args.groups) * args.chunks_per_group;
    int64_t last_group = -1;
    for (int64_t chunk = block.team(); chunk < chunks; chunk += block.teams()) {
      const int64_t group = chunk / args.chunks_per_group;
      if (has_coefficients && group != last_group) {
        find_coefficients(block, args, group, coefficients);
      }
      last_group = group;
      const int64_t first = (chunk - group * args.chunks_per_group) * args.chunk;
      const int64_t last = smaller<int64_t>(first + args.chunk, args.group_size);
      for (int64_t place = first; place < last; place += slot.slots) {
        const bool is_token = place + slot.token < last;
        const int64_t token = group * args.group_size + place + slot.token;
        backward(block, args, slot, token, is_token, has_coefficients, coefficients);
      }
    }
  }

 private:
  template <class Block>
  MOE_DEVICE static void backward(const Block& block, const Args& args, const Slot& slot,
                                  int64_t token, bool is_token, bool has_coefficients,
                                  const float* coefficients) {
    const TokenShape& shape = args.shape;
    const bool has_losses = has_coefficients || args.dz_loss != nullptr;
    const bool is_softmax = shape.affinity == Affinity::softmax;
    float x[V], probs[V], affinity[V], gradient[V];
    load_logits<V>(args.logits, token, shape, slot.expert, is_token, x);
    float logsumexp = 0;
    if (is_softmax || has_losses) logsumexp = softmax(block, x, shape.lanes, probs).logsumexp;
    if (!is_softmax) affinities(block, x, shape, affinity);
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (is_softmax) affinity[v] = probs[v];
      gradient[v] = 0;
    }
    if (args.dweights != nullptr) {
      gather_gradient<V>(block, args, slot, token, is_token, affinity, gradient);
    }
    // d(loss) / d(softmax), which is the affinity, or what the losses read of the logits.
    float dprobs[V];
    float divisor = 1, mean = 0;
    if (shape.affinity == Affinity::sigmoid && has_coefficients) {
      // The distribution is the affinity over its sum.
      float total = 0;
      MOE_UNROLL
      for (int v = 0; v < V; ++v) total += affinity[v];
      divisor = positive_or_one(sum_lanes(block, total, shape.lanes));
      MOE_UNROLL
      for (int v = 0; v < V; ++v) {
        const bool is_expert = slot.expert + v < shape.experts;
        if (is_expert) mean += affinity[v] / divisor * coefficients[slot.expert + v];
      }
      mean = sum_lanes(block, mean, shape.lanes);
    }
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      const bool is_expert = slot.expert + v < shape.experts;
      const float own = has_coefficients && is_expert ? coefficients[slot.expert + v] : 0.0f;
      dprobs[v] = is_softmax ? gradient[v] : 0.0f;
      if (!has_coefficients) continue;
      if (shape.affinity == Affinity::sigmoid) {
        gradient[v] += (own - mean) / divisor;
      } else {
        dprobs[v] += own;
      }
    }
    if (has_losses || is_softmax) {
      float product = 0;
      MOE_UNROLL
      for (int v = 0; v < V; ++v) product += probs[v] * dprobs[v];
      product = sum_lanes(block, product, shape.lanes);
      if (args.dz_loss != nullptr) product -= 2.0f * *args.dz_loss / args.tokens * logsumexp;
      MOE_UNROLL
      for (int v = 0; v < V; ++v) probs[v] = probs[v] * (dprobs[v] - product);
    } else {
      MOE_UNROLL
      for (int v = 0; v < V; ++v) probs[v] = 0;
    }
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      if (shape.affinity == Affinity::sigmoid) {
        probs[v] += gradient[v] * affinity[v] * (1.0f - affinity[v]);
      } else if (shape.affinity == Affinity::identity) {
        probs[v] += gradient[v];
      }
    }
    if (is_token) store_values<V>(args.dlogits, token, shape, slot.expert, probs);
  }
};

struct AffinityArgs {
  const float* logits;
  float* probs;
  TokenShape shape;
  int64_t tokens;
};

template <int V>
struct AffinityFwd {
  using Args = AffinityArgs;
  static constexpr const char* name = "affinity_fwd";
  static constexpr int kThreads = 256;
  static constexpr int kBlocks = V == 4 ? 4 : 2;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const Slot slot = slot_of<V>(block, args.shape);
    for (int64_t first = block.team() * slot.slots; first < args.tokens;
         first += block.teams() * slot.slots) {
      const int64_t token = first + slot.token;
      const bool is_token = token < args.tokens;
      float x[V], affinity[V];
      load_logits<V>(args.logits, token, args.shape, slot.expert, is_token, x);
      affinities(block, x, args.shape, affinity);
      if (is_token) store_values<V>(args.probs, token, args.shape, slot.expert, affinity);
    }
  }
};

}  // namespace moe::cuda
