// What the routing kernels of every module agree on with Python: options, and where results lie.
#pragma once

#include <cstdint>

namespace moe {

enum class Dtype : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Affinity : int { softmax = 0, sigmoid = 1, identity = 2 };

// Offsets of the int32 outputs of a router inside their one buffer (one allocation instead of
// eight: at T = 256 allocations would take most of the time). moe_kernels/ops/pack.py
// cuts the same buffer.
struct PlanLayout {
  int64_t token_indices, row_indices, row_experts, row_offsets, expert_offsets, tokens_per_expert;
  int64_t histogram, group_counts, expert_indices;

  __attribute__((always_inline)) PlanLayout(int64_t tokens, int64_t experts, int64_t groups,
                                            int64_t rows)
      : token_indices(0),
        row_indices(rows),
        row_experts(2 * rows),
        row_offsets(3 * rows),
        expert_offsets(row_offsets + tokens + 1),
        tokens_per_expert(expert_offsets + experts + 1),
        histogram(tokens_per_expert + experts),
        group_counts(histogram + experts + 1),
        expert_indices(group_counts + groups * experts) {}
};

// `terms`: the balance loss of each group averaged, the mean entropy of the routing distribution,
// then that distribution's mean over the tokens, (2 + E,).
enum Term : int { kBalancePerGroup = 0, kEntropy = 1, kMeanProb = 2 };

}  // namespace moe
