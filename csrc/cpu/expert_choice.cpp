// Expert choice: every expert takes its C best tokens of each group. Keys of a group stay in
// scratch memory, (E, S), never in an output; the rows come out in token order, and the way back
// (rows of each token, coverage) from the same pass.
#include "select.hpp"
#include "token_block.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

template <class T>
struct Work {
  TokenBlock<T> block;
  Vec<T>* sums;                        // (E)
  typename Simd<T>::IntScalar* keys;   // (E, stride)
  typename Simd<T>::IntScalar* spare;  // (S)
  T* weight_sums;                      // (S)
  int64_t stride;

  // Rows of keys are a cache line apart from a power of two, or all of them would compete for the
  // same cache sets.
  static int64_t key_stride(int64_t group_size) { return ceil_div(group_size, 16) * 16 + 16; }
  static int64_t block_bytes(int64_t experts) {
    return token_block_bytes<T>(experts) + experts * static_cast<int64_t>(sizeof(Vec<T>));
  }
  static int64_t keys_bytes(int64_t experts, int64_t group_size) {
    return aligned_bytes<T>(experts * key_stride(group_size));
  }
  static int64_t spare_bytes(int64_t group_size) { return 2 * aligned_bytes<T>(group_size); }
};

template <class T, Affinity A>
bool score_chunk(const ExpertChoiceArgs& args, Work<T>& work, int64_t begin, int64_t end,
                 int64_t group_begin, double* sums) {
  constexpr int lanes = Simd<T>::lanes;
  ChunkSums<T> chunk(work.sums, args.experts);
  const T* logits = static_cast<const T*>(args.logits);
  for (int64_t token = begin; token < end; token += lanes) {
    const int64_t count = min_of(lanes, end - token);
    load_tokens<T>(work.block.logits, logits, token, count, args.experts);
    compute_block<T, A>(work.block, args.experts);
    chunk.add(work.block, count, args.experts);
    auto* keys = work.keys + (token - group_begin);
    for (int64_t e = 0; e < args.experts; ++e) {
      const Int<T> key = ordered_keys<T>(work.block.affinity[e]);
      // Always a whole vector: the last one of a group ends in the space behind the row.
      memcpy(keys + e * work.stride, &key, sizeof(key));
    }
  }
  chunk.write(sums, args.experts);
  return chunk.all_finite();
}

template <class T>
MOE_INLINE void select_rows(const ExpertChoiceArgs& args, const PlanLayout& layout,
                            const Work<T>& work, int64_t group, int64_t expert, int64_t group_size,
                            typename Simd<T>::IntScalar* spare) {
  const auto* keys = work.keys + expert * work.stride;
  const int64_t row = (expert * args.groups + group) * args.capacity;
  const int64_t first = group * group_size;
  int32_t* out = args.plan + layout.token_indices + row;
  const Threshold<T> threshold = find_threshold<T>(keys, group_size, args.capacity, spare);
  take_chosen<T>(keys, group_size, threshold, static_cast<int32_t>(first), out);
  T* weights = static_cast<T*>(args.weights) + row;
  const T* logits = static_cast<const T*>(args.logits);
  for (int64_t c = 0; c < args.capacity; ++c) {
    T weight = value_of_key<T>(keys[out[c] - first]);
    if (weight == -static_cast<T>(__builtin_inf())) {
      // The key of NaN. Only an identity affinity can be -inf itself.
      const T logit = logits[out[c] * args.experts + expert];
      weight = args.affinity == Affinity::identity ? logit : static_cast<T>(__builtin_nan(""));
    }
    weights[c] = weight;
  }
}

// Weights divided by their sum over the experts that hold the token; experts are added in order.
template <class T>
MOE_INLINE void normalize_weights(const ExpertChoiceArgs& args, const PlanLayout& layout,
                                  T* weight_sums, int64_t group, int64_t group_size) {
  const int32_t* tokens = args.plan + layout.token_indices;
  T* weights = static_cast<T*>(args.weights);
  const int64_t first = group * group_size, stride = args.groups * args.capacity;
  const T scale = static_cast<T>(args.scale);
  if (args.per_token) {
    for (int64_t s = 0; s < group_size; ++s) weight_sums[s] = 0;
    for (int64_t e = 0; e < args.experts; ++e) {
      const int64_t row = e * stride + group * args.capacity;
      for (int64_t c = row; c < row + args.capacity; ++c)
        weight_sums[tokens[c] - first] += weights[c];
    }
  } else if (scale == T(1)) {
    return;
  }
  for (int64_t e = 0; e < args.experts; ++e) {
    const int64_t row = e * stride + group * args.capacity;
    for (int64_t c = row; c < row + args.capacity; ++c) {
      const T sum = args.per_token ? weight_sums[tokens[c] - first] : T(1);
      weights[c] = weights[c] / (sum > 0 ? sum : T(1)) * scale;
    }
  }
}

// Rows of each token of the group. A group has exactly E·C rows, so its place in the list is known.
MOE_INLINE void invert_group(const ExpertChoiceArgs& args, const PlanLayout& layout, int64_t group,
                             int64_t group_size, int32_t* coverage) {
  const int64_t first = group * group_size, stride = args.groups * args.capacity;
  const int32_t* tokens = args.plan + layout.token_indices;
  int32_t* offsets = args.plan + layout.row_offsets + first;
  int32_t* rows = args.plan + layout.row_indices;
  int32_t* experts = args.plan + layout.row_experts;
  for (int64_t s = 0; s < group_size; ++s) offsets[s] = 0;
  for (int64_t e = 0; e < args.experts; ++e) {
    const int32_t* chosen = tokens + e * stride + group * args.capacity;
    for (int64_t c = 0; c < args.capacity; ++c) ++offsets[chosen[c] - first];
  }
  for (int64_t e = 0; e <= args.experts; ++e) coverage[e] = 0;
  int32_t next = static_cast<int32_t>(group * args.experts * args.capacity);
  for (int64_t s = 0; s < group_size; ++s) {
    const int32_t count = offsets[s];
    ++coverage[count];
    offsets[s] = next;
    next += count;
  }
  for (int64_t e = 0; e < args.experts; ++e) {
    const int64_t row = e * stride + group * args.capacity;
    for (int64_t c = row; c < row + args.capacity; ++c) {
      const int32_t place = offsets[tokens[c] - first]++;
      rows[place] = static_cast<int32_t>(c);
      experts[place] = static_cast<int32_t>(e);
    }
  }
  // Each start has moved to its end, which is the next token's start: shift back by one place.
  for (int64_t s = group_size - 1; s > 0; --s) offsets[s] = offsets[s - 1];
  if (group_size > 0) {
    offsets[0] = static_cast<int32_t>(group * args.experts * args.capacity);
  }
}

void fill_counts(const ExpertChoiceArgs& args, const PlanLayout& layout, int64_t rows,
                 const int32_t* coverage) {
  const int32_t per_expert = static_cast<int32_t>(args.groups * args.capacity);
  int32_t* plan = args.plan;
  for (int64_t e = 0; e <= args.experts; ++e) {
    plan[layout.expert_offsets + e] = static_cast<int32_t>(e) * per_expert;
    int32_t tokens = 0;
    for (int64_t g = 0; g < args.groups; ++g) tokens += coverage[g * (args.experts + 1) + e];
    plan[layout.histogram + e] = tokens;
  }
  for (int64_t e = 0; e < args.experts; ++e) plan[layout.tokens_per_expert + e] = per_expert;
  for (int64_t i = 0; i < args.groups * args.experts; ++i) {
    plan[layout.group_counts + i] = static_cast<int32_t>(args.capacity);
  }
  plan[layout.row_offsets + args.tokens] = static_cast<int32_t>(rows);
}

template <class T, Affinity A>
bool route(const ExpertChoiceArgs& args) {
  using Key = typename Simd<T>::IntScalar;
  const int64_t experts = args.experts, groups = args.groups;
  const int64_t rows = experts * groups * args.capacity;
  const PlanLayout layout(args.tokens, experts, groups, rows);
  const ChunkGrid grid(args.tokens, groups);
  const int64_t size = grid.group_size;
  const bool parallel = args.threads > 1 && args.tokens * experts >= kParallelLogits;
  const int threads = parallel ? args.threads : 1;
  // Many groups: a thread takes a whole group. Few: the threads share the chunks, then the experts.
  const bool whole_groups = groups >= threads;
  const int64_t key_sets = whole_groups ? threads : 1;

  const int64_t sums_bytes = aligned_bytes<double>(grid.count * (experts + 2) + 2 * experts);
  const int64_t coverage_bytes = aligned_bytes<int32_t>(groups * (experts + 1));
  const int64_t block_bytes = ceil_div(Work<T>::block_bytes(experts), 64) * 64;
  const int64_t spare_bytes = Work<T>::spare_bytes(size);
  const int64_t keys_bytes = Work<T>::keys_bytes(experts, size);
  const Scratch scratch(sums_bytes + coverage_bytes + threads * (block_bytes + spare_bytes) +
                        key_sets * keys_bytes);
  char* memory = scratch.as<char>();
  double* sums = reinterpret_cast<double*>(memory);
  int32_t* coverage = reinterpret_cast<int32_t*>(memory + sums_bytes);
  char* blocks = memory + sums_bytes + coverage_bytes;
  char* spares = blocks + threads * block_bytes;
  char* keys = spares + threads * spare_bytes;

  auto work_of = [&](int thread, int64_t key_set) {
    char* own = blocks + thread * block_bytes;
    char* spare = spares + thread * spare_bytes;
    Work<T> work;
    work.block = make_token_block<T>(own, experts, A);
    work.sums = reinterpret_cast<Vec<T>*>(own) + 3 * experts;
    work.spare = reinterpret_cast<Key*>(spare);
    work.weight_sums = reinterpret_cast<T*>(spare + spare_bytes / 2);
    work.keys = reinterpret_cast<Key*>(keys + key_set * keys_bytes);
    work.stride = Work<T>::key_stride(size);
    return work;
  };
  auto finish_group = [&](Work<T>& work, int64_t group) {
    normalize_weights<T>(args, layout, work.weight_sums, group, size);
    invert_group(args, layout, group, size, coverage + group * (experts + 1));
  };

  bool finite = true;
  if (size == 0) {
    for (int64_t i = 0; i < groups * (experts + 1); ++i) coverage[i] = 0;
  } else if (whole_groups) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(&& : finite)
    for (int64_t group = 0; group < groups; ++group) {
      const int thread = thread_number();
      Work<T> work = work_of(thread, thread);
      for (int64_t c = group * grid.per_group; c < (group + 1) * grid.per_group; ++c) {
        finite = score_chunk<T, A>(args, work, grid.begin(c), grid.end(c), group * size,
                                   sums + c * (experts + 2)) &&
                 finite;
      }
      for (int64_t e = 0; e < experts; ++e) {
        select_rows<T>(args, layout, work, group, e, size, work.spare);
      }
      finish_group(work, group);
    }
  } else {
    for (int64_t group = 0; group < groups; ++group) {
#pragma omp parallel for schedule(static) num_threads(threads) reduction(&& : finite)
      for (int64_t c = group * grid.per_group; c < (group + 1) * grid.per_group; ++c) {
        Work<T> work = work_of(thread_number(), 0);
        finite = score_chunk<T, A>(args, work, grid.begin(c), grid.end(c), group * size,
                                   sums + c * (experts + 2)) &&
                 finite;
      }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
      for (int64_t e = 0; e < experts; ++e) {
        Work<T> work = work_of(thread_number(), 0);
        select_rows<T>(args, layout, work, group, e, size, work.spare);
      }
      Work<T> work = work_of(0, 0);
      finish_group(work, group);
    }
  }
  fill_counts(args, layout, rows, coverage);
  finish_losses<T>(args, grid, sums, rows, sums + grid.count * (experts + 2));
  return finite;
}

template <class T>
bool route_affinity(const ExpertChoiceArgs& args) {
  switch (args.affinity) {
    case Affinity::softmax:
      return route<T, Affinity::softmax>(args);
    case Affinity::sigmoid:
      return route<T, Affinity::sigmoid>(args);
    default:
      return route<T, Affinity::identity>(args);
  }
}

}  // namespace

bool expert_choice_fwd(const ExpertChoiceArgs& args) {
  return args.dtype == Dtype::f64 ? route_affinity<double>(args) : route_affinity<float>(args);
}

}  // namespace MOE_ISA
}  // namespace moe
