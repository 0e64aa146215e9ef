// Operations on rows of hidden_size numbers that several kernels share.
#pragma once

#include "kernels.hpp"
#include "scratch.hpp"

namespace moe {
namespace MOE_ISA {

// Fewer elements than this are not worth waking other threads.
constexpr int64_t kParallelElements = 32768;

// What a storage type is computed in.
template <class S>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class S>
using WideOf = typename Wide<S>::type;

// Calls body with a value of the storage type.
template <class Body>
MOE_INLINE void with_storage(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(float{});
    case Dtype::f64:
      return body(double{});
    case Dtype::bf16:
      return body(bf16{});
    case Dtype::f16:
      return body(f16{});
  }
}

// to[i] = scale * from[i]
template <class A, class From, class To>
MOE_INLINE void scale_row(To* to, const From* from, A scale, int64_t size) {
  for_each_vector<A>(size, [&](int64_t i, int64_t count) {
    store_part<A>(to + i, load_part<A>(from + i, count) * scale, count);
  });
}

template <class T>
MOE_INLINE void copy_row(T* to, const T* from, int64_t size) {
  memcpy(to, from, size * sizeof(T));
}
template <class A, class From, class To>
MOE_INLINE void convert_row(To* to, const From* from, int64_t size) {
  for_each_vector<A>(size, [&](int64_t i, int64_t count) {
    store_part<A>(to + i, load_part<A>(from + i, count), count);
  });
}
template <class A, class T>
MOE_INLINE void convert_row(T* to, const T* from, int64_t size) {
  copy_row(to, from, size);
}

// Two chains of additions, so that their latencies overlap.
template <class A, class S, class U>
MOE_INLINE A dot_row(const S* a, const U* b, int64_t size) {
  constexpr int lanes = Simd<A>::lanes;
  Vec<A> even = {}, odd = {};
  int64_t i = 0;
  for (; i + 2 * lanes <= size; i += 2 * lanes) {
    even += load<A>(a + i) * load<A>(b + i);
    odd += load<A>(a + i + lanes) * load<A>(b + i + lanes);
  }
  for_each_vector<A>(size - i, [&](int64_t j, int64_t count) {
    even += load_part<A>(a + i + j, count) * load_part<A>(b + i + j, count);
  });
  return sum_lanes<A>(even + odd);
}

// out[t] = sum of weights[r] * rows[r] over a token's rows, in the order of the list.
template <class A, class RowType, class OutType>
void sum_rows(const RowType* rows, const A* weights, const int32_t* row_indices,
              const int32_t* row_offsets, OutType* out, int64_t tokens, int64_t hidden,
              int threads) {
  constexpr int lanes = Simd<A>::lanes, unroll = 8;
  const int team = tokens * hidden >= kParallelElements ? threads : 1;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t token = 0; token < tokens; ++token) {
    const int32_t begin = row_offsets[token], end = row_offsets[token + 1];
    OutType* to = out + token * hidden;
    int64_t i = 0;
    for (; i + unroll * lanes <= hidden; i += unroll * lanes) {
      Vec<A> sum[unroll] = {};
      for (int32_t r = begin; r < end; ++r) {
        const RowType* row = rows + row_indices[r] * hidden + i;
        const Vec<A> weight = splat<A>(weights == nullptr ? A(1) : weights[row_indices[r]]);
#pragma GCC unroll 8
        for (int u = 0; u < unroll; ++u) sum[u] += weight * load<A>(row + u * lanes);
      }
#pragma GCC unroll 8
      for (int u = 0; u < unroll; ++u) store(to + i + u * lanes, sum[u]);
    }
    for_each_vector<A>(hidden - i, [&](int64_t j, int64_t count) {
      Vec<A> sum = {};
      for (int32_t r = begin; r < end; ++r) {
        const RowType* row = rows + row_indices[r] * hidden + i + j;
        const A weight = weights == nullptr ? A(1) : weights[row_indices[r]];
        sum += weight * load_part<A>(row, count);
      }
      store_part<A>(to + i + j, sum, count);
    });
  }
}

}  // namespace MOE_ISA
}  // namespace moe
