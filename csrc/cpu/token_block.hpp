// One block of tokens, a token a lane: affinities, routing distribution and logsumexp.
//
// The block is transposed, (T, E) logits to E vectors, so that softmax, top-k and sums over experts
// are plain vector code. Every lane does the same operations in the same order, so a token's
// numbers do not depend on its place.
#pragma once

#include "scratch.hpp"
#include "transpose.hpp"
#include "vector_math.hpp"

namespace moe {
namespace MOE_ISA {

// Tokens that share partial sums. Fixed, so that sums do not depend on the number of threads.
constexpr int64_t kChunk = 256;
// Fewer logits than this are not worth waking other threads.
constexpr int64_t kParallelLogits = 16384;

template <class T>
struct TokenBlock {
  Vec<T>* logits;                    // (E)
  Vec<T>* affinity;                  // (E)
  Vec<T>* distribution;              // (E) over experts; the same array as `affinity` for softmax
  Vec<T> logsumexp, entropy, total;  // total: sum of sigmoid affinities
};

template <class T>
MOE_INLINE int64_t token_block_bytes(int64_t experts) {
  return 3 * experts * static_cast<int64_t>(sizeof(Vec<T>));
}

template <class T>
MOE_INLINE TokenBlock<T> make_token_block(void* memory, int64_t experts, Affinity affinity) {
  Vec<T>* parts = static_cast<Vec<T>*>(memory);
  const bool one = affinity == Affinity::softmax;
  TokenBlock<T> block;
  block.logits = parts;
  block.affinity = parts + experts;
  block.distribution = one ? block.affinity : parts + 2 * experts;
  return block;
}

// Softmax into `out`; sets logsumexp and the entropy of the result.
template <class T>
MOE_INLINE void softmax_block(TokenBlock<T>& block, Vec<T>* out, int64_t experts) {
  Vec<T> top = block.logits[0];
  for (int64_t e = 1; e < experts; ++e) top = max<T>(top, block.logits[e]);
  // Kahan's sum: a small addend after a large one is lost otherwise, 130 of them are 2e-6.
  Vec<T> sum = {}, lost = {}, weighted = {};
  for (int64_t e = 0; e < experts; ++e) {
    const Vec<T> shifted = block.logits[e] - top;
    const Vec<T> value = exp<T>(shifted);
    out[e] = value;
    const Vec<T> addend = value - lost, next = sum + addend;
    lost = (next - sum) - addend;
    sum = next;
    weighted += value > T(0) ? value * shifted : value;  // 0 * -inf is 0 here
  }
  const Vec<T> inverse = T(1) / sum;
  for (int64_t e = 0; e < experts; ++e) out[e] *= inverse;
  const Vec<T> log_sum = log<T>(sum);
  block.logsumexp = top + log_sum;
  block.entropy = log_sum - weighted * inverse;
}

template <class T>
MOE_INLINE void sigmoid_block(TokenBlock<T>& block, int64_t experts) {
  Vec<T> total = {};
  for (int64_t e = 0; e < experts; ++e) {
    block.affinity[e] = sigmoid<T>(block.logits[e]);
    total += block.affinity[e];
  }
  block.total = total > T(0) ? total : splat<T>(1);
}

// Affinities alone.
template <class T, Affinity A>
MOE_INLINE void compute_affinity(TokenBlock<T>& block, int64_t experts) {
  if constexpr (A == Affinity::softmax) {
    softmax_block(block, block.affinity, experts);
  } else if constexpr (A == Affinity::sigmoid) {
    sigmoid_block(block, experts);
  } else {
    for (int64_t e = 0; e < experts; ++e) block.affinity[e] = block.logits[e];
  }
}

// Affinities, distribution, logsumexp and entropy.
template <class T, Affinity A>
MOE_INLINE void compute_block(TokenBlock<T>& block, int64_t experts) {
  compute_affinity<T, A>(block, experts);
  if constexpr (A == Affinity::sigmoid) {
    softmax_block(block, block.distribution, experts);  // for logsumexp
    Vec<T> entropy = {};
    for (int64_t e = 0; e < experts; ++e) {
      const Vec<T> q = block.affinity[e] / block.total;
      block.distribution[e] = q;
      entropy -= q > T(1e-30) ? q * log<T>(q) : splat<T>(0);
    }
    block.entropy = entropy;
  } else if constexpr (A == Affinity::identity) {
    softmax_block(block, block.distribution, experts);
  }
}

// What a chunk of tokens adds to the losses and the telemetry.
template <class T>
struct ChunkSums {
  Vec<T>* distribution;  // (E)
  Vec<T> z, entropy;
  Vec<T> finite;  // stays 0 unless a logit is NaN or infinite

  MOE_METHOD ChunkSums(Vec<T>* memory, int64_t experts) : distribution(memory) {
    for (int64_t e = 0; e < experts; ++e) distribution[e] = Vec<T>{};
    z = entropy = finite = Vec<T>{};
  }

  MOE_METHOD void add(const TokenBlock<T>& block, int64_t count, int64_t experts) {
    if (count == Simd<T>::lanes) {
      for (int64_t e = 0; e < experts; ++e) distribution[e] += block.distribution[e];
      z += block.logsumexp * block.logsumexp;
      entropy += block.entropy;
    } else {
      Int<T> lane;
      for (int i = 0; i < Simd<T>::lanes; ++i) lane[i] = i;
      const Int<T> inside = lane < static_cast<typename Simd<T>::IntScalar>(count);
      const Vec<T> zero = {};
      for (int64_t e = 0; e < experts; ++e) {
        distribution[e] += inside ? block.distribution[e] : zero;
      }
      z += inside ? block.logsumexp * block.logsumexp : zero;
      entropy += inside ? block.entropy : zero;
    }
    for (int64_t e = 0; e < experts; ++e) finite += block.logits[e] * T(0);
  }

  // E distribution sums, z and entropy, in double.
  MOE_METHOD void write(double* to, int64_t experts) const {
    for (int64_t e = 0; e < experts; ++e) to[e] = sum_lanes<T>(distribution[e]);
    to[experts] = sum_lanes<T>(z);
    to[experts + 1] = sum_lanes<T>(entropy);
  }
  MOE_METHOD bool all_finite() const { return sum_lanes<T>(finite) == T(0); }
};

// Chunks lie inside a group; `chunk` counts through all groups.
struct ChunkGrid {
  int64_t group_size, per_group, count;
  ChunkGrid(int64_t tokens, int64_t groups)
      : group_size(groups > 0 ? tokens / groups : 0),
        per_group((group_size + kChunk - 1) / kChunk),
        count(per_group * groups) {}
  int64_t begin(int64_t chunk) const {
    return chunk / per_group * group_size + chunk % per_group * kChunk;
  }
  int64_t end(int64_t chunk) const {
    const int64_t group_end = (chunk / per_group + 1) * group_size;
    const int64_t whole = begin(chunk) + kChunk;
    return whole < group_end ? whole : group_end;
  }
};

// Losses, mean distribution and entropy from the sums of the chunks and the rows of each group.
template <class T>
MOE_INLINE void finish_losses(const RouteArgs& args, const ChunkGrid& grid, const double* sums,
                              int64_t rows, double* group_sum) {
  const int64_t experts = args.experts, stride = experts + 2;
  const PlanLayout layout(args.tokens, experts, args.groups, rows);
  const int32_t* per_expert = args.plan + layout.tokens_per_expert;
  const int32_t* counts = args.plan + layout.group_counts;
  T* terms = static_cast<T*>(args.terms);
  const double tokens = static_cast<double>(max_of(args.tokens, 1));
  const double frequency = static_cast<double>(experts) / static_cast<double>(max_of(rows, 1));
  double balance = 0, per_group = 0, z = 0, entropy = 0;
  double* total = group_sum + experts;
  for (int64_t e = 0; e < experts; ++e) total[e] = 0;
  for (int64_t g = 0; g < args.groups; ++g) {
    for (int64_t e = 0; e < experts; ++e) group_sum[e] = 0;
    for (int64_t c = g * grid.per_group; c < (g + 1) * grid.per_group; ++c) {
      const double* part = sums + c * stride;
      for (int64_t e = 0; e < experts; ++e) group_sum[e] += part[e];
      z += part[experts];
      entropy += part[experts + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      total[e] += group_sum[e];
      per_group += group_sum[e] * counts[g * experts + e];
    }
  }
  for (int64_t e = 0; e < experts; ++e) {
    balance += total[e] * per_expert[e];
    terms[kMeanProb + e] = static_cast<T>(total[e] / tokens);
  }
  *static_cast<T*>(args.load_balance) = static_cast<T>(balance * frequency / tokens);
  // f of one group is E / (R / G) n; the mean over groups takes the G back.
  terms[kBalancePerGroup] = static_cast<T>(per_group * frequency * args.groups / tokens);
  *static_cast<T*>(args.z_loss) = static_cast<T>(z / tokens);
  terms[kEntropy] = static_cast<T>(entropy / tokens);
}

}  // namespace MOE_ISA
}  // namespace moe
