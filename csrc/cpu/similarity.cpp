// Router similarity loss: 1/T · sum_t p_t^T W p_t, W from how often two experts share a token.
#include "token_block.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

// W_ii = E n_ii / sum of the diagonal, W_ij = (E^2 - E) n_ij / sum off the diagonal.
template <class T>
void weigh_pairs(const SimilarityArgs& args, int64_t* together) {
  const int64_t experts = args.experts;
  for (int64_t i = 0; i < experts * experts; ++i) together[i] = 0;
  for (int64_t t = 0; t < args.tokens; ++t) {
    for (int32_t i = args.row_offsets[t]; i < args.row_offsets[t + 1]; ++i) {
      for (int32_t j = args.row_offsets[t]; j < args.row_offsets[t + 1]; ++j) {
        ++together[args.row_experts[i] * experts + args.row_experts[j]];
      }
    }
  }
  int64_t own = 0, pairs = 0;
  for (int64_t i = 0; i < experts * experts; ++i) {
    (i % (experts + 1) == 0 ? own : pairs) += together[i];
  }
  const double count = static_cast<double>(experts);
  const double diagonal = count / static_cast<double>(max_of(own, 1));
  const double rest = (count * count - count) / static_cast<double>(max_of(pairs, 1));
  T* weights = static_cast<T*>(args.pair_weights);
  for (int64_t i = 0; i < experts * experts; ++i) {
    const double factor = i % (experts + 1) == 0 ? diagonal : rest;
    weights[i] = static_cast<T>(factor * static_cast<double>(together[i]));
  }
}

template <class T>
void similarity(const SimilarityArgs& args, bool backward) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t experts = args.experts;
  const ChunkGrid grid(args.tokens, 1);
  const bool parallel = args.threads > 1 && args.tokens * experts >= kParallelLogits / 4;
  const int threads = parallel ? args.threads : 1;
  const int64_t own_bytes = 4 * experts * static_cast<int64_t>(sizeof(Vec<T>));
  const int64_t sums_bytes = aligned_bytes<double>(grid.count);
  const Scratch scratch(threads * own_bytes + sums_bytes +
                        aligned_bytes<int64_t>(experts * experts));
  double* sums = reinterpret_cast<double*>(scratch.as<char>() + threads * own_bytes);
  if (!backward) {
    weigh_pairs<T>(
        args, reinterpret_cast<int64_t*>(scratch.as<char>() + threads * own_bytes + sums_bytes));
  }
  const T* weights = static_cast<const T*>(args.pair_weights);
  const double tokens = static_cast<double>(max_of(args.tokens, 1));
  // W is symmetric: d(p^T W p) = 2 W p.
  const T upstream =
      backward ? static_cast<T>(2.0 / tokens * *static_cast<const T*>(args.dloss)) : T(0);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    char* own = scratch.as<char>() + thread_number() * own_bytes;
    TokenBlock<T> block = make_token_block<T>(own, experts, Affinity::softmax);
    Vec<T>* gradient = reinterpret_cast<Vec<T>*>(own) + 3 * experts;
    Vec<T> sum = {};
    for (int64_t token = grid.begin(chunk); token < grid.end(chunk); token += lanes) {
      const int64_t count = min_of(lanes, grid.end(chunk) - token);
      load_tokens<T>(block.logits, static_cast<const T*>(args.logits), token, count, experts);
      softmax_block(block, block.affinity, experts);
      Vec<T> total = {};
      for (int64_t i = 0; i < experts; ++i) {
        Vec<T> row = {};
        for (int64_t j = 0; j < experts; ++j) row += weights[i * experts + j] * block.affinity[j];
        gradient[i] = row * upstream;
        total += block.affinity[i] * row;
      }
      if (backward) {
        total *= upstream;
        for (int64_t e = 0; e < experts; ++e) {
          gradient[e] = block.affinity[e] * (gradient[e] - total);
        }
        store_tokens<T>(static_cast<T*>(args.dlogits), gradient, token, count, experts);
      } else {
        for (int64_t lane = count; lane < lanes; ++lane) total[lane] = 0;
        sum += total;
      }
    }
    sums[chunk] = sum_lanes<T>(sum);
  }
  if (backward) return;
  double loss = 0;
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) loss += sums[chunk];
  *static_cast<T*>(args.loss) = static_cast<T>(loss / tokens);
}

}  // namespace

void similarity_fwd(const SimilarityArgs& args) {
  args.dtype == Dtype::f64 ? similarity<double>(args, false) : similarity<float>(args, false);
}

void similarity_bwd(const SimilarityArgs& args) {
  args.dtype == Dtype::f64 ? similarity<double>(args, true) : similarity<float>(args, true);
}

}  // namespace MOE_ISA
}  // namespace moe
