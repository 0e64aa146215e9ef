// Token choice: softmax or sigmoid, top-k, weights, losses in one pass over the logits; then a
// stable counting sort of the (token, expert) pairs into expert order, from per-chunk histograms.
#include "token_block.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

// The best `size` keys of every lane, descending, ties to the earlier index.
template <class T>
struct TopList {
  Vec<T>* keys;
  Int<T>* indices;
};

// Inserts candidate number `index` (counted from 0) into a list that holds min(index, size) keys.
template <class T>
MOE_INLINE void insert(TopList<T> list, int64_t size, Vec<T> key, int64_t index) {
  const int64_t filled = min_of(index, size);
  Vec<T> carried_key = key;
  Int<T> carried = Int<T>{} + static_cast<typename Simd<T>::IntScalar>(index);
  for (int64_t j = 0; j < filled; ++j) {
    // The list falls, so that once `key` wins a place every later one moves down.
    const Int<T> better = key > list.keys[j];
    const Vec<T> old_key = list.keys[j];
    const Int<T> old = list.indices[j];
    list.keys[j] = better ? carried_key : old_key;
    list.indices[j] = better ? carried : old;
    carried_key = better ? old_key : carried_key;
    carried = better ? old : carried;
  }
  if (index < size) {
    list.keys[filled] = carried_key;
    list.indices[filled] = carried;
  }
}

template <class T>
MOE_INLINE Vec<T> nan_last(Vec<T> key) {
  return key == key ? key : splat<T>(-__builtin_inf());
}

template <class T>
struct Work {
  TokenBlock<T> block;
  Vec<T>* keys;     // (E)
  TopList<T> best;  // K experts
  TopList<T> kept;  // top_k_groups expert groups

  static int64_t bytes(const TokenChoiceArgs& args) {
    const int64_t lists = 2 * (args.top_k + args.top_k_groups);
    return token_block_bytes<T>(args.experts) +
           (2 * args.experts + lists) * static_cast<int64_t>(sizeof(Vec<T>));
  }
  // Also returns the memory for E sums behind the parts.
  Vec<T>* place(void* memory, const TokenChoiceArgs& args) {
    block = make_token_block<T>(memory, args.experts, args.affinity);
    Vec<T>* next = static_cast<Vec<T>*>(memory) + 3 * args.experts;
    keys = next;
    next += args.experts;
    best = {next, reinterpret_cast<Int<T>*>(next + args.top_k)};
    next += 2 * args.top_k;
    kept = {next, reinterpret_cast<Int<T>*>(next + args.top_k_groups)};
    return next + 2 * args.top_k_groups;
  }
};

// Sets the key of experts outside the best groups to -inf. A group is worth the sum of its two best
// keys (its one key when it holds one expert).
template <class T>
void keep_best_groups(Work<T>& work, const TokenChoiceArgs& args) {
  const int64_t size = args.experts / args.expert_groups;
  const Vec<T> lowest = splat<T>(-__builtin_inf());
  for (int64_t g = 0; g < args.expert_groups; ++g) {
    Vec<T> first = work.keys[g * size], second = lowest;
    for (int64_t i = 1; i < size; ++i) {
      const Vec<T> key = work.keys[g * size + i];
      second = max<T>(min<T>(first, key), second);
      first = max<T>(first, key);
    }
    insert<T>(work.kept, args.top_k_groups, nan_last<T>(size > 1 ? first + second : first), g);
  }
  for (int64_t g = 0; g < args.expert_groups; ++g) {
    Int<T> inside = {};
    for (int64_t j = 0; j < args.top_k_groups; ++j) {
      inside |= work.kept.indices[j] == static_cast<typename Simd<T>::IntScalar>(g);
    }
    for (int64_t i = 0; i < size; ++i) {
      work.keys[g * size + i] = inside ? work.keys[g * size + i] : lowest;
    }
  }
}

template <class T>
MOE_INLINE void select_experts(Work<T>& work, const TokenChoiceArgs& args) {
  const T* bias = static_cast<const T*>(args.selection_bias);
  const bool grouped = args.top_k_groups < args.expert_groups;
  if (bias == nullptr && !grouped && args.top_k == 2) {  // the published models: in registers
    Vec<T> keys[2];
    Int<T> indices[2];
    for (int64_t e = 0; e < args.experts; ++e) {
      insert<T>({keys, indices}, 2, nan_last<T>(work.block.affinity[e]), e);
    }
    for (int j = 0; j < 2; ++j) work.best.indices[j] = indices[j];
    return;
  }
  for (int64_t e = 0; e < args.experts; ++e) {
    const Vec<T> key = nan_last<T>(work.block.affinity[e]);
    work.keys[e] = bias == nullptr ? key : key + bias[e];
  }
  if (grouped) keep_best_groups(work, args);
  for (int64_t e = 0; e < args.experts; ++e) insert<T>(work.best, args.top_k, work.keys[e], e);
}

// Weights and expert indices of the block's tokens, (T, K) by falling affinity.
template <class T>
MOE_INLINE void write_choice(const Work<T>& work, const TokenChoiceArgs& args, int64_t token,
                             int64_t count, T* weights, int32_t* expert_indices,
                             int32_t* histogram) {
  constexpr int lanes = Simd<T>::lanes;
  const T* affinity = reinterpret_cast<const T*>(work.block.affinity);
  const auto* chosen = reinterpret_cast<const typename Simd<T>::IntScalar*>(work.best.indices);
  for (int64_t lane = 0; lane < count; ++lane) {
    T* to = weights + (token + lane) * args.top_k;
    int32_t* experts = expert_indices + (token + lane) * args.top_k;
    T sum = 0;
    for (int64_t j = 0; j < args.top_k; ++j) {
      const int64_t e = chosen[j * lanes + lane];
      experts[j] = static_cast<int32_t>(e);
      ++histogram[e];
      to[j] = affinity[e * lanes + lane];
      sum += to[j];
    }
    if (args.per_token) {
      const T divisor = sum > 0 ? sum : T(1);
      for (int64_t j = 0; j < args.top_k; ++j) to[j] /= divisor;
    }
  }
}

template <class T, Affinity A>
bool route_chunk(const TokenChoiceArgs& args, int64_t begin, int64_t end, void* memory, T* weights,
                 int32_t* expert_indices, double* sums, int32_t* histogram) {
  Work<T> work;
  ChunkSums<T> chunk(work.place(memory, args), args.experts);
  for (int64_t e = 0; e < args.experts; ++e) histogram[e] = 0;
  const T* logits = static_cast<const T*>(args.logits);
  for (int64_t token = begin; token < end; token += Simd<T>::lanes) {
    const int64_t count = min_of(Simd<T>::lanes, end - token);
    load_tokens<T>(work.block.logits, logits, token, count, args.experts);
    compute_block<T, A>(work.block, args.experts);
    chunk.add(work.block, count, args.experts);
    select_experts<T>(work, args);
    write_choice<T>(work, args, token, count, weights, expert_indices, histogram);
  }
  chunk.write(sums, args.experts);
  return chunk.all_finite();
}

// Moves a chunk's pairs to their rows. `next` holds, for each expert, the chunk's first row.
template <class T>
MOE_INLINE void sort_chunk(const TokenChoiceArgs& args, const PlanLayout& layout, int64_t begin,
                           int64_t end, const T* weights, int32_t* next) {
  const int64_t top_k = args.top_k;
  const T scale = static_cast<T>(args.scale);
  T* out = static_cast<T*>(args.weights);
  const int32_t* chosen = args.plan + layout.expert_indices;
  int32_t* token_indices = args.plan + layout.token_indices;
  int32_t* row_offsets = args.plan + layout.row_offsets;
  int32_t* row_experts = args.plan + layout.row_experts;
  int32_t* row_indices = args.plan + layout.row_indices;
  const auto take_row = [&](int64_t token, int64_t pair) {
    const int32_t row = next[chosen[pair]]++;
    token_indices[row] = static_cast<int32_t>(token);
    out[row] = weights[pair] * scale;
    return row;
  };
  for (int64_t token = begin; token < end; ++token) {
    const int64_t base = token * top_k;
    row_offsets[token] = static_cast<int32_t>(base);
    if (top_k == 2) {  // the published models: without a loop
      const int32_t first = take_row(token, base), second = take_row(token, base + 1);
      const bool swap = chosen[base] > chosen[base + 1];
      row_indices[base] = swap ? second : first;
      row_indices[base + 1] = swap ? first : second;
      row_experts[base] = swap ? chosen[base + 1] : chosen[base];
      row_experts[base + 1] = swap ? chosen[base] : chosen[base + 1];
      continue;
    }
    for (int64_t j = 0; j < top_k; ++j) {  // sorted in: experts ascend, and so do the rows
      const int32_t expert = chosen[base + j], row = take_row(token, base + j);
      int64_t place = base + j;
      for (; place > base && row_experts[place - 1] > expert; --place) {
        row_experts[place] = row_experts[place - 1];
        row_indices[place] = row_indices[place - 1];
      }
      row_experts[place] = expert;
      row_indices[place] = row;
    }
  }
}

// Turns per-chunk histograms into the first row of each chunk and expert; fills the plan's counts.
void place_rows(const TokenChoiceArgs& args, const PlanLayout& layout, const ChunkGrid& grid,
                int32_t* histograms) {
  const int64_t experts = args.experts;
  int32_t* offsets = args.plan + layout.expert_offsets;
  int32_t* per_expert = args.plan + layout.tokens_per_expert;
  int32_t* counts = args.plan + layout.group_counts;
  for (int64_t i = 0; i < args.groups * experts; ++i) counts[i] = 0;
  for (int64_t e = 0; e < experts; ++e) per_expert[e] = 0;
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    const int64_t group = chunk / grid.per_group;
    for (int64_t e = 0; e < experts; ++e) {
      const int32_t own = histograms[chunk * experts + e];
      counts[group * experts + e] += own;
      histograms[chunk * experts + e] = per_expert[e];
      per_expert[e] += own;
    }
  }
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] = offsets[e] + per_expert[e];
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    for (int64_t e = 0; e < experts; ++e) histograms[chunk * experts + e] += offsets[e];
  }
  int32_t* coverage = args.plan + layout.histogram;
  for (int64_t e = 0; e <= experts; ++e) coverage[e] = 0;
  coverage[args.top_k] = static_cast<int32_t>(args.tokens);
  args.plan[layout.row_offsets + args.tokens] = static_cast<int32_t>(args.tokens * args.top_k);
}

template <class T, Affinity A>
bool route(const TokenChoiceArgs& args) {
  const int64_t experts = args.experts, rows = args.tokens * args.top_k;
  const PlanLayout layout(args.tokens, experts, args.groups, rows);
  const ChunkGrid grid(args.tokens, args.groups);
  const bool parallel = args.threads > 1 && args.tokens * experts >= kParallelLogits;
  const int threads = parallel ? args.threads : 1;

  // One allocation: weights, sums of the chunks, sums of a group, histograms, a block per thread.
  const int64_t weights_bytes = aligned_bytes<T>(rows);
  const int64_t sums_bytes = aligned_bytes<double>((grid.count * (experts + 2)) + 2 * experts);
  const int64_t histogram_bytes = aligned_bytes<int32_t>(grid.count * experts);
  const int64_t work_bytes = ceil_div(Work<T>::bytes(args), 64) * 64;
  const Scratch scratch(weights_bytes + sums_bytes + histogram_bytes + threads * work_bytes);
  char* memory = scratch.as<char>();
  T* weights = reinterpret_cast<T*>(memory);
  double* sums = reinterpret_cast<double*>(memory + weights_bytes);
  int32_t* histograms = reinterpret_cast<int32_t*>(memory + weights_bytes + sums_bytes);
  char* work = memory + weights_bytes + sums_bytes + histogram_bytes;
  int32_t* expert_indices = args.plan + layout.expert_indices;

  bool finite = true;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    void* own = work + thread_number() * work_bytes;
    finite =
        route_chunk<T, A>(args, grid.begin(chunk), grid.end(chunk), own, weights, expert_indices,
                          sums + chunk * (experts + 2), histograms + chunk * experts) &&
        finite;
  }
  place_rows(args, layout, grid, histograms);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < grid.count; ++chunk) {
    sort_chunk<T>(args, layout, grid.begin(chunk), grid.end(chunk), weights,
                  histograms + chunk * experts);
  }
  finish_losses<T>(args, grid, sums, rows, sums + grid.count * (experts + 2));
  return finite;
}

}  // namespace

bool token_choice_fwd(const TokenChoiceArgs& args) {
  if (args.dtype == Dtype::f64) {
    return args.affinity == Affinity::softmax ? route<double, Affinity::softmax>(args)
                                              : route<double, Affinity::sigmoid>(args);
  }
  return args.affinity == Affinity::softmax ? route<float, Affinity::softmax>(args)
                                            : route<float, Affinity::sigmoid>(args);
}

}  // namespace MOE_ISA
}  // namespace moe
