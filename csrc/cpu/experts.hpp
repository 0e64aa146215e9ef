// What the expert kernels share: dtypes, how rows are cut into pieces, and the order of experts.
//
// Pieces depend on the shapes alone, never on the number of threads, and each is one product on one
// thread: so the bits do not depend on how many threads there are.
#pragma once

#include <sched.h>

#include <utility>

#include "gemm.hpp"
#include "kernels.hpp"
#include "rows.hpp"

namespace moe {
namespace MOE_ISA {

// S: storage of tokens and weights. Operand: what the products read. Wide: what they add in.
template <class S_, class Operand_>
struct Types {
  using S = S_;
  using Operand = Operand_;
  using A = WideOf<S_>;
  static constexpr bool same_operand = sizeof(S_) == sizeof(Operand_);  // f16 is never an operand
  static constexpr bool same_wide = sizeof(S_) == sizeof(A);
};

template <class Body>
MOE_INLINE void with_types(Dtype dtype, bool native_bf16, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(Types<float, float>{});
    case Dtype::f64:
      return body(Types<double, double>{});
    case Dtype::bf16:
      return native_bf16 ? body(Types<bf16, bf16>{}) : body(Types<bf16, float>{});
    case Dtype::f16:
      return body(Types<f16, float>{});
  }
}

// Fewer multiplications than this are not worth waking other threads.
constexpr int64_t kParallelProducts = int64_t{1} << 21;

MOE_INLINE int team_size(int threads, int64_t rows, int64_t in, int64_t out) {
  return rows * in * out >= kParallelProducts ? threads : 1;
}

// How an expert's rows are cut into products: enough pieces to share among threads, none too small
// to be fast. (A BLAS rearranges the whole weight for every product, which costs as much as about
// 20 rows: 128 rows took about 7 % longer than 256 at hidden size 768.) It does not ask how many
// threads there are, so that results do not depend on them.
struct Cut {
  Cut(int64_t rows, int64_t experts)
      : usual(max_of(64, min_of(ceil_div(rows / 8, 32) * 32, 512))), many(experts >= 4) {}

  // Among many experts, half a piece more than a whole number of them makes larger pieces and not
  // one more: at 256 rows of 4 experts, two pieces of 35 rows took 1.3 times as long as one of 70.
  // The last step leaves out pieces that would begin behind the rows.
  int64_t count(int64_t rows) const {
    const int64_t wanted = many ? max_of(1, (rows + usual / 2 - 1) / usual) : ceil_div(rows, usual);
    return ceil_div(rows, max_of(1, ceil_div(rows, max_of(1, wanted))));
  }
  int64_t largest() const { return many ? usual + usual / 2 : usual; }

  int64_t usual;  // rows of a piece
  bool many;
};

// Experts with rows, most rows first, so that the last pieces to be handed out are small.
MOE_INLINE int64_t order_experts(const int32_t* expert_offsets, int64_t experts, int32_t* order) {
  int64_t count = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const int32_t rows = expert_offsets[e + 1] - expert_offsets[e];
    if (rows == 0) continue;
    int64_t place = count++;
    for (; place > 0; --place) {
      const int32_t other = order[place - 1];
      if (expert_offsets[other + 1] - expert_offsets[other] >= rows) break;
      order[place] = other;
    }
    order[place] = static_cast<int32_t>(e);
  }
  return count;
}

// The operand form of `count` elements: themselves, or a copy in `copy`.
template <class Types>
MOE_INLINE const typename Types::Operand* as_operand(const typename Types::S* from, int64_t count,
                                                     typename Types::Operand* copy) {
  if constexpr (Types::same_operand) {
    return from;
  } else {
    convert_row<typename Types::A>(copy, from, count);
    return copy;
  }
}

// Rows of tokens in operand form, one after the other.
template <class Types>
MOE_INLINE void gather_rows(const typename Types::S* x, const int32_t* token_indices, int64_t begin,
                            int64_t end, int64_t hidden, typename Types::Operand* out) {
  for (int64_t r = begin; r < end; ++r) {
    typename Types::Operand* to = out + (r - begin) * hidden;
    const typename Types::S* from = x + token_indices[r] * hidden;
    if constexpr (Types::same_operand) {
      copy_row(to, from, hidden);
    } else {
      convert_row<typename Types::A>(to, from, hidden);
    }
  }
}

// One product whose result is stored as S: in place when S is what products add in, else by way of
// `wide` (m · n).
template <class Types>
MOE_INLINE void gemm_to_storage(int64_t m, int64_t n, int64_t k,
                                Matrix<const typename Types::Operand> a,
                                Matrix<const typename Types::Operand> b, typename Types::S* out,
                                typename Types::A* wide) {
  using A = typename Types::A;
  if constexpr (Types::same_wide) {
    gemm<typename Types::Operand, A>(m, n, k, a, b, A(0), Matrix<A>{out, n});
  } else {
    gemm<typename Types::Operand, A>(m, n, k, a, b, A(0), Matrix<A>{wide, n});
    convert_row<A>(out, wide, m * n);
  }
}

constexpr int64_t kWeightRows = 512;  // rows of one piece of a weight gradient

// Piece `number` of dw = p^T · q over `depth` rows of p and q; transposed, of dw^T = q^T · p.
template <class Types>
MOE_INLINE void weight_piece(bool transposed, int64_t number, int64_t depth,
                             Matrix<const typename Types::Operand> p,
                             Matrix<const typename Types::Operand> q, typename Types::S* dw,
                             typename Types::A* wide) {
  if (transposed) std::swap(p, q);
  const int64_t first = number * kWeightRows, count = min_of(kWeightRows, p.stride - first);
  gemm_to_storage<Types>(count, q.stride, depth, {p.data + first, p.stride, true}, q,
                         dw + first * q.stride, wide);
}

// Hands out the numbers 0, 1, 2, ... to the threads of a team.
class Counter {
 public:
  int64_t next() { return __atomic_fetch_add(&value_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t value_ = 0;
};

// Waits until `count` pieces have reported; yields, so that a loaded machine goes on.
MOE_INLINE void wait_for(const int64_t* done, int64_t count) {
  for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < count; ++spins) {
    if (spins > 200) sched_yield();
  }
}
MOE_INLINE void report(int64_t* done) { __atomic_fetch_add(done, 1, __ATOMIC_RELEASE); }

}  // namespace MOE_ISA
}  // namespace moe
