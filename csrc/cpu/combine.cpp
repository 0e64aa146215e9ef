// Combine: the weighted sum of each token's rows, and the gather with gate gradient that is its
// backward. Dispatch is the same pair the other way round, without weights.
#include "kernels.hpp"
#include "rows.hpp"

namespace moe {
namespace MOE_ISA {

void combine(const CombineArgs& args) {
  with_storage(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    using A = WideOf<S>;
    sum_rows<A>(static_cast<const S*>(args.rows), static_cast<const A*>(args.weights),
                args.row_indices, args.row_offsets, static_cast<S*>(args.out), args.tokens,
                args.hidden, args.threads);
  });
}

void gather(const GatherArgs& args) {
  with_storage(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    using A = WideOf<S>;
    const S* dout = static_cast<const S*>(args.dout);
    const S* rows = static_cast<const S*>(args.rows);
    const A* weights = static_cast<const A*>(args.weights);
    S* drows = static_cast<S*>(args.drows);
    A* dweights = static_cast<A*>(args.dweights);
    const int64_t hidden = args.hidden;
    const int team = args.num_rows * hidden >= kParallelElements ? args.threads : 1;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
    for (int64_t row = 0; row < args.num_rows; ++row) {
      const S* from = dout + args.token_indices[row] * hidden;
      S* to = drows + row * hidden;
      if (weights == nullptr) {
        copy_row(to, from, hidden);
      } else {
        scale_row<A>(to, from, weights[row], hidden);
      }
      if (dweights != nullptr) dweights[row] = dot_row<A>(from, rows + row * hidden, hidden);
    }
  });
}

}  // namespace MOE_ISA
}  // namespace moe
