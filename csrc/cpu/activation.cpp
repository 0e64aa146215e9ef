// The activation over all expert rows, for products that PyTorch does (see
// backends/cpu/fallback.py).
#include "activation.hpp"

#include "kernels.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

// Calls row(r, expert) over all rows, in parallel over fixed spans.
template <class Row>
MOE_INLINE void for_each_row(const ActivationArgs& args, Row row) {
  constexpr int64_t span = 16;
  const int64_t spans = ceil_div(args.num_rows, span);
  const int team = args.num_rows * args.intermediate >= kParallelElements ? args.threads : 1;
#pragma omp parallel for schedule(static) num_threads(team) if (team > 1)
  for (int64_t s = 0; s < spans; ++s) {
    const int64_t end = min_of((s + 1) * span, args.num_rows);
    int64_t expert = 0;
    for (int64_t r = s * span; r < end; ++r) {
      while (args.expert_offsets != nullptr && args.expert_offsets[expert + 1] <= r) ++expert;
      row(r, expert);
    }
  }
}

}  // namespace

void activation_fwd(const ActivationArgs& args) {
  with_storage(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    using A = WideOf<S>;
    with_activation(args.activation, [&](auto tag) {
      constexpr Activation act = decltype(tag)::value;
      const int64_t size = args.intermediate, columns = act == Activation::swiglu ? 2 * size : size;
      const S* bias = static_cast<const S*>(args.bias);
      const A* weights = static_cast<const A*>(args.weights);
      for_each_row(args, [&](int64_t r, int64_t expert) {
        activate_row<A, act>(static_cast<const S*>(args.h) + r * columns,
                             bias == nullptr ? bias : bias + expert * columns,
                             weights == nullptr ? A(1) : weights[r],
                             static_cast<S*>(args.a) + r * size, size);
      });
    });
  });
}

void activation_bwd(const ActivationArgs& args) {
  with_storage(args.dtype, [&](auto storage) {
    using S = decltype(storage);
    using A = WideOf<S>;
    with_activation(args.activation, [&](auto tag) {
      constexpr Activation act = decltype(tag)::value;
      const int64_t size = args.intermediate, columns = act == Activation::swiglu ? 2 * size : size;
      const S* bias = static_cast<const S*>(args.bias);
      const A* weights = static_cast<const A*>(args.weights);
      A* dweights = static_cast<A*>(args.dweights);
      for_each_row(args, [&](int64_t r, int64_t expert) {
        const S* h = static_cast<const S*>(args.h) + r * columns;
        const S* own_bias = bias == nullptr ? bias : bias + expert * columns;
        const A weight = weights == nullptr ? A(1) : weights[r];
        const S* da = static_cast<const S*>(args.da) + r * size;
        S* dh = static_cast<S*>(args.dh) + r * columns;
        S* a = static_cast<S*>(args.a);
        const A dweight =
            a == nullptr
                ? activate_row_bwd<A, act, false>(h, own_bias, weight, da, a, dh, size)
                : activate_row_bwd<A, act, true>(h, own_bias, weight, da, a + r * size, dh, size);
        if (dweights != nullptr) dweights[r] = dweight;
      });
    });
  });
}

}  // namespace MOE_ISA
}  // namespace moe
