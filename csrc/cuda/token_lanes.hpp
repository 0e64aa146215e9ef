// A token's logits in registers, its affinities, and what it adds to the losses.
//
// `lanes` neighbouring threads share a token, and each holds V consecutive experts of it. How a sum
// over experts is added up depends on E alone, so that equal rows of logits get equal affinities
// wherever they lie and whichever kernel computes them.
#pragma once

#include "block.hpp"
#include "kernels.hpp"

namespace moe::cuda {

// What loads 16 bytes at once.
struct alignas(16) Float4 {
  float x, y, z, w;
};

struct alignas(16) Word4 {
  uint32_t x, y, z, w;
};

struct TokenShape {
  int experts;
  int lanes;     // threads of a token: a power of two, at most 32
  bool aligned;  // every row of logits starts at a multiple of 16 bytes
  Affinity affinity;
};

constexpr float kLowest = -INFINITY;

// Values a thread holds for E experts.
inline int values_for(int64_t experts) { return experts <= 32 ? 4 : 8; }

inline TokenShape token_shape(const float* logits, int64_t experts, Affinity affinity) {
  int lanes = 1;
  while (lanes * values_for(experts) < experts) lanes *= 2;
  const bool aligned = experts % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  return {static_cast<int>(experts), lanes, aligned, affinity};
}

// Where a thread stands among the tokens that a block works on at a time.
struct Slot {
  int token;   // of the block's, 0 ... slots - 1
  int lane;    // of the token's
  int expert;  // the first of the V of this thread
  int slots;   // tokens at a time
};

template <int V, class Block>
MOE_DEVICE Slot slot_of(const Block& block, const TokenShape& shape) {
  const int lane = block.thread() & (shape.lanes - 1);
  return {block.thread() / shape.lanes, lane, lane * V, block.threads() / shape.lanes};
}

// -inf in places past the last expert, so that softmax is 0 there.
template <int V>
MOE_DEVICE void load_logits(const float* logits, int64_t token, const TokenShape& shape, int expert,
                            bool is_token, float (&x)[V]) {
  const float* row = logits + token * shape.experts + expert;
  MOE_UNROLL
  for (int v = 0; v < V; v += 4) {
    Float4 four = {kLowest, kLowest, kLowest, kLowest};
    if (!is_token) {
      four = {0, 0, 0, 0};
    } else if (shape.aligned) {
      if (expert + v < shape.experts) four = *reinterpret_cast<const Float4*>(row + v);
    } else {
      if (expert + v + 0 < shape.experts) four.x = row[v + 0];
      if (expert + v + 1 < shape.experts) four.y = row[v + 1];
      if (expert + v + 2 < shape.experts) four.z = row[v + 2];
      if (expert + v + 3 < shape.experts) four.w = row[v + 3];
    }
    x[v] = four.x;
    x[v + 1] = four.y;
    x[v + 2] = four.z;
    x[v + 3] = four.w;
  }
}

template <int V>
MOE_DEVICE void store_values(float* to, int64_t token, const TokenShape& shape, int expert,
                             const float (&x)[V]) {
  float* row = to + token * shape.experts + expert;
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    if (expert + v < shape.experts) row[v] = x[v];
  }
}

struct SoftmaxSums {
  float logsumexp, entropy;
};

// Softmax of a token; NaN throughout for a row that holds NaN or +inf, as in PyTorch.
template <int V, class Block>
MOE_DEVICE SoftmaxSums softmax(const Block& block, const float (&x)[V], int lanes,
                               float (&out)[V]) {
  float top = x[0];
  MOE_UNROLL
  for (int v = 1; v < V; ++v) top = fmaxf(top, x[v]);
  for (int mask = lanes / 2; mask > 0; mask /= 2) top = fmaxf(top, block.shuffle_xor(top, mask));
  float total = 0, weighted = 0;
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    const float shifted = x[v] - top;
    out[v] = expf(shifted);
    total += out[v];
    weighted += out[v] > 0 ? out[v] * shifted : 0.0f;  // 0 · -inf is 0 here
  }
  for (int mask = lanes / 2; mask > 0; mask /= 2) {  // both sums on their way at once
    const float other = block.shuffle_xor(total, mask);
    weighted += block.shuffle_xor(weighted, mask);
    total += other;
  }
  MOE_UNROLL
  for (int v = 0; v < V; ++v) out[v] = out[v] / total;
  const float log_total = logf(total);
  return {top + log_total, log_total - weighted / total};
}

MOE_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The divisor of a normalisation: 0 / 0 = 0 when every affinity of a token underflowed.
MOE_DEVICE float positive_or_one(float total) { return total > 0 ? total : 1.0f; }

// Affinities alone.
template <int V, class Block>
MOE_DEVICE void affinities(const Block& block, const float (&x)[V], const TokenShape& shape,
                           float (&affinity)[V]) {
  if (shape.affinity == Affinity::softmax) {
    softmax(block, x, shape.lanes, affinity);
    return;
  }
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    affinity[v] = shape.affinity == Affinity::sigmoid ? sigmoid(x[v]) : x[v];
  }
}

// A token's affinities, and its distribution over experts that losses and telemetry read.
template <int V>
struct Routed {
  float affinity[V], distribution[V];
  float logsumexp, entropy;
};

template <int V, class Block>
MOE_DEVICE Routed<V> route_token(const Block& block, const float (&x)[V], const TokenShape& shape) {
  Routed<V> routed;
  const SoftmaxSums sums = softmax(block, x, shape.lanes, routed.distribution);
  routed.logsumexp = sums.logsumexp;
  routed.entropy = sums.entropy;
  if (shape.affinity == Affinity::softmax) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) routed.affinity[v] = routed.distribution[v];
    return routed;
  }
  affinities(block, x, shape, routed.affinity);
  if (shape.affinity == Affinity::identity) return routed;
  float total = 0;  // sigmoid(-inf) is 0: places past the last expert add nothing
  MOE_UNROLL
  for (int v = 0; v < V; ++v) total += routed.affinity[v];
  total = positive_or_one(sum_lanes(block, total, shape.lanes));
  float entropy = 0;
  MOE_UNROLL
  for (int v = 0; v < V; ++v) {
    const float q = routed.affinity[v] / total;
    routed.distribution[v] = q;
    entropy -= q > 1e-30f ? q * logf(q) : 0.0f;
  }
  routed.entropy = sum_lanes(block, entropy, shape.lanes);
  return routed;
}

// Columns of a row of loss sums: the distribution by expert, then these.
constexpr int kSumZ = 0, kSumEntropy = 1, kSumNonFinite = 2, kMoreSums = 3;

// What the tokens of a thread add to the losses.
template <int V>
struct LossSums {
  float distribution[V];
  float z, entropy, non_finite;

  MOE_DEVICE LossSums() : z(0), entropy(0), non_finite(0) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) distribution[v] = 0;
  }

  // Apart from `add`, so that nobody keeps the logits for it.
  MOE_DEVICE void check(const float (&x)[V], const TokenShape& shape, int expert) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) {
      const bool infinite = !(x[v] - x[v] == 0);
      if (infinite && expert + v < shape.experts) non_finite = 1;
    }
  }

  MOE_DEVICE void add(const Routed<V>& routed) {
    MOE_UNROLL
    for (int v = 0; v < V; ++v) distribution[v] += routed.distribution[v];
    z += routed.logsumexp * routed.logsumexp;
    entropy += routed.entropy;
  }

  // Sums of the block into `row` (E + 3): of each warp by exchange, of the warps through shared
  // memory, in one order. `scratch` is of sums_bytes.
  template <class Block>
  MOE_DEVICE void write(const Block& block, const TokenShape& shape, float* scratch, double* row) {
    for (int mask = shape.lanes; mask < 32; mask *= 2) {
      MOE_UNROLL
      for (int v = 0; v < V; ++v) distribution[v] += block.shuffle_xor(distribution[v], mask);
      z += block.shuffle_xor(z, mask);
      entropy += block.shuffle_xor(entropy, mask);
    }
    const bool any = block.ballot(non_finite > 0) != 0;
    const int width = shape.lanes * V + kMoreSums;
    float* own = scratch + block.warp() * width;
    if (block.lane() < shape.lanes) {
      MOE_UNROLL
      for (int v = 0; v < V; ++v) own[block.lane() * V + v] = distribution[v];
    }
    if (block.lane() == 0) {
      own[shape.lanes * V + kSumZ] = z;
      own[shape.lanes * V + kSumEntropy] = entropy;
      own[shape.lanes * V + kSumNonFinite] = any ? 1.0f : 0.0f;
    }
    block.sync();
    for (int column = block.thread(); column < shape.experts + kMoreSums;
         column += block.threads()) {
      const int place = column < shape.experts ? column : column - shape.experts + shape.lanes * V;
      double total = 0;
      for (int warp = 0; warp < block.warps(); ++warp) total += scratch[warp * width + place];
      row[column] = total;
    }
    block.sync();
  }
};

inline int64_t sums_bytes(int64_t experts, int threads) {
  int64_t padded = values_for(experts);
  while (padded < experts) padded *= 2;
  return threads / 32 * (padded + kMoreSums) * static_cast<int64_t>(sizeof(float));
}

}  // namespace moe::cuda
