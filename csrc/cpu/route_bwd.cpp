// Backward of both routers: from d(routing weights) and d(losses) straight to d(logits), one
// pass over the logits. Also the affinities alone.
#include "token_block.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

// d(loss)/d(distribution) is the same for every token of a group; see finish_losses.
template <class T>
struct LossGradient {
  T* coefficients;  // (E), of the group at hand
  T z = 0;          // 2/T · d(z loss)
  bool any = false;

  static double read(const void* value) {
    return value == nullptr ? 0.0 : static_cast<double>(*static_cast<const T*>(value));
  }

  MOE_METHOD void set_group(const RouteBwdArgs& args, const PlanLayout& layout, int64_t group) {
    const T* dterms = static_cast<const T*>(args.dterms);
    const double tokens = static_cast<double>(max_of(args.tokens, 1));
    const double frequency =
        static_cast<double>(args.experts) / static_cast<double>(max_of(args.rows, 1));
    const int32_t* per_expert = args.plan + layout.tokens_per_expert;
    const int32_t* counts = args.plan + layout.group_counts + group * args.experts;
    const double pooled = read(args.dload_balance);
    const double per_group =
        dterms == nullptr ? 0 : dterms[kBalancePerGroup] * static_cast<double>(args.groups);
    for (int64_t e = 0; e < args.experts; ++e) {
      const double balance = pooled * per_expert[e] + per_group * counts[e];
      const double mean = dterms == nullptr ? 0 : dterms[kMeanProb + e];
      coefficients[e] = static_cast<T>((balance * frequency + mean) / tokens);
    }
    z = static_cast<T>(2.0 * read(args.dz_loss) / tokens);
    any = true;
  }
};

// Adds each row's d(weight) to d(affinity) of its token and expert; undoes the normalisation.
template <class T>
MOE_INLINE void scatter_weights(const RouteBwdArgs& args, const PlanLayout& layout,
                                const Vec<T>* affinity_block, Vec<T>* gradient_block, int64_t token,
                                int64_t count) {
  constexpr int lanes = Simd<T>::lanes;
  for (int64_t e = 0; e < args.experts; ++e) gradient_block[e] = Vec<T>{};
  if (args.dweights == nullptr) return;
  const T* dweights = static_cast<const T*>(args.dweights);
  const T* affinity = reinterpret_cast<const T*>(affinity_block);
  T* gradient = reinterpret_cast<T*>(gradient_block);
  const int32_t* offsets = args.plan + layout.row_offsets;
  const int32_t* rows = args.plan + layout.row_indices;
  const int32_t* experts = args.plan + layout.row_experts;
  const T scale = static_cast<T>(args.scale);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t begin = offsets[token + lane], end = offsets[token + lane + 1];
    T divisor = 1, correction = 0;
    if (args.per_token) {
      T sum = 0, product = 0;
      for (int64_t i = begin; i < end; ++i) {
        const T value = affinity[experts[i] * lanes + lane];
        sum += value;
        product += value * dweights[rows[i]];
      }
      if (sum > 0) {
        divisor = sum;
        correction = product / sum;
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      gradient[experts[i] * lanes + lane] = scale * (dweights[rows[i]] - correction) / divisor;
    }
  }
}

template <class T, Affinity A>
MOE_INLINE void logits_gradient(TokenBlock<T>& block, Vec<T>* gradient, const LossGradient<T>& loss,
                                int64_t experts) {
  const T* coefficients = loss.coefficients;
  const Vec<T> z = loss.any ? loss.z * block.logsumexp : Vec<T>{};
  if constexpr (A == Affinity::softmax) {
    Vec<T> mean = {};
    for (int64_t e = 0; e < experts; ++e) {
      if (loss.any) gradient[e] += coefficients[e];
      mean += block.affinity[e] * gradient[e];
    }
    for (int64_t e = 0; e < experts; ++e) {
      gradient[e] = block.affinity[e] * (gradient[e] - mean + z);
    }
    return;
  }
  Vec<T> mean = {};
  if (loss.any) {
    for (int64_t e = 0; e < experts; ++e) mean += block.distribution[e] * coefficients[e];
  }
  for (int64_t e = 0; e < experts; ++e) {
    const Vec<T> own = loss.any ? coefficients[e] - mean : Vec<T>{};
    if constexpr (A == Affinity::sigmoid) {
      const Vec<T> s = block.affinity[e];
      gradient[e] = (gradient[e] + own / block.total) * s * (T(1) - s);
      if (loss.any) gradient[e] += z * exp<T>(block.logits[e] - block.logsumexp);
    } else if (loss.any) {
      gradient[e] += block.distribution[e] * (own + z);
    }
  }
}

template <class T, Affinity A>
void route_backward(const RouteBwdArgs& args) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t experts = args.experts;
  const PlanLayout layout(args.tokens, experts, args.groups, args.rows);
  const ChunkGrid grid(args.tokens, args.groups);
  const bool parallel = args.threads > 1 && args.tokens * experts >= kParallelLogits;
  const int threads = parallel ? args.threads : 1;
  const int64_t vectors = 4 * experts * static_cast<int64_t>(sizeof(Vec<T>));
  const int64_t own_bytes = vectors + aligned_bytes<T>(experts);
  const Scratch scratch(threads * own_bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    char* own = scratch.as<char>() + thread_number() * own_bytes;
    TokenBlock<T> block = make_token_block<T>(own, experts, A);
    Vec<T>* gradient = reinterpret_cast<Vec<T>*>(own) + 3 * experts;
    LossGradient<T> loss{reinterpret_cast<T*>(own + vectors)};
    if (args.dload_balance != nullptr || args.dz_loss != nullptr || args.dterms != nullptr) {
      loss.set_group(args, layout, chunk / grid.per_group);
    }
    const int64_t end = grid.end(chunk);
    for (int64_t token = grid.begin(chunk); token < end; token += lanes) {
      const int64_t count = min_of(lanes, end - token);
      load_tokens<T>(block.logits, static_cast<const T*>(args.logits), token, count, experts);
      if (loss.any) {
        compute_block<T, A>(block, experts);
      } else {
        compute_affinity<T, A>(block, experts);
      }
      scatter_weights<T>(args, layout, block.affinity, gradient, token, count);
      logits_gradient<T, A>(block, gradient, loss, experts);
      store_tokens<T>(static_cast<T*>(args.dlogits), gradient, token, count, experts);
    }
  }
}

template <class T>
void backward_affinity(const RouteBwdArgs& args) {
  switch (args.affinity) {
    case Affinity::softmax:
      return route_backward<T, Affinity::softmax>(args);
    case Affinity::sigmoid:
      return route_backward<T, Affinity::sigmoid>(args);
    default:
      return route_backward<T, Affinity::identity>(args);
  }
}

template <class T, Affinity A>
void affinities(const AffinityArgs& args) {
  constexpr int lanes = Simd<T>::lanes;
  const int64_t blocks = ceil_div(args.tokens, lanes);
  const bool parallel = args.threads > 1 && args.tokens * args.experts >= kParallelLogits;
  const int threads = parallel ? args.threads : 1;
  const int64_t own_bytes = token_block_bytes<T>(args.experts);
  const Scratch scratch(threads * own_bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    char* own = scratch.as<char>() + thread_number() * own_bytes;
    TokenBlock<T> block = make_token_block<T>(own, args.experts, A);
    const int64_t token = i * lanes, count = min_of(lanes, args.tokens - token);
    load_tokens<T>(block.logits, static_cast<const T*>(args.logits), token, count, args.experts);
    compute_affinity<T, A>(block, args.experts);
    store_tokens<T>(static_cast<T*>(args.probs), block.affinity, token, count, args.experts);
  }
}

template <class T>
void affinities_of(const AffinityArgs& args) {
  switch (args.affinity) {
    case Affinity::softmax:
      return affinities<T, Affinity::softmax>(args);
    case Affinity::sigmoid:
      return affinities<T, Affinity::sigmoid>(args);
    default:
      return affinities<T, Affinity::identity>(args);
  }
}

}  // namespace

void route_bwd(const RouteBwdArgs& args) {
  args.dtype == Dtype::f64 ? backward_affinity<double>(args) : backward_affinity<float>(args);
}

void affinity_fwd(const AffinityArgs& args) {
  args.dtype == Dtype::f64 ? affinities_of<double>(args) : affinities_of<float>(args);
}

}  // namespace MOE_ISA
}  // namespace moe
