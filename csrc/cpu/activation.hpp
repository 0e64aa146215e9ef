// GELU (tanh or exact) and SwiGLU over one row, with bias and routing weight folded in.
#pragma once

#include "rows.hpp"
#include "vector_math.hpp"

namespace moe {
namespace MOE_ISA {

template <class A, class B>
MOE_INLINE Vec<A> add_bias(Vec<A> h, const B* bias, int64_t i, int64_t count) {
  return bias == nullptr ? h : h + load_part<A>(bias + i, count);
}

// a = weight * act(h + bias); swiglu: weight * silu(gate) * up with h = gate | up.
template <class A, Activation Act, class H, class B, class To>
MOE_INLINE void activate_row(const H* h, const B* bias, A weight, To* a, int64_t size) {
  for_each_vector<A>(size, [&](int64_t i, int64_t count) {
    const Vec<A> in = add_bias<A>(load_part<A>(h + i, count), bias, i, count);
    Vec<A> value = activate<A, Act>(in).value * weight;
    if constexpr (Act == Activation::swiglu) {
      value *= add_bias<A>(load_part<A>(h + size + i, count), bias, size + i, count);
    }
    store_part<A>(a + i, value, count);
  });
}

// From da = d(loss)/d(a): dh, and d(weight) = <da, act(h + bias)>, which is returned; with WriteA
// also a again.
template <class A, Activation Act, bool WriteA, class H, class B, class Da, class To>
MOE_INLINE A activate_row_bwd(const H* h, const B* bias, A weight, const Da* da, To* a, To* dh,
                              int64_t size) {
  Vec<A> dot = {};
  for_each_vector<A>(size, [&](int64_t i, int64_t count) {
    const Vec<A> in = add_bias<A>(load_part<A>(h + i, count), bias, i, count);
    const Vec<A> upstream = load_part<A>(da + i, count);
    const Activated<A> act = activate<A, Act>(in);
    if constexpr (Act == Activation::swiglu) {
      const Vec<A> up = add_bias<A>(load_part<A>(h + size + i, count), bias, size + i, count);
      const Vec<A> value = act.value * up;
      dot += upstream * value;
      if constexpr (WriteA) store_part<A>(a + i, value * weight, count);
      const Vec<A> weighted = upstream * weight;
      store_part<A>(dh + i, weighted * up * act.derivative, count);
      store_part<A>(dh + size + i, weighted * act.value, count);
    } else {
      dot += upstream * act.value;
      if constexpr (WriteA) store_part<A>(a + i, act.value * weight, count);
      store_part<A>(dh + i, upstream * weight * act.derivative, count);
    }
  });
  return sum_lanes<A>(dot);
}

// Calls body with the activation as a compile-time constant.
template <Activation Act>
struct ActivationTag {
  static constexpr Activation value = Act;
};
template <class Body>
MOE_INLINE void with_activation(Activation activation, Body body) {
  switch (activation) {
    case Activation::gelu_tanh:
      return body(ActivationTag<Activation::gelu_tanh>{});
    case Activation::gelu:
      return body(ActivationTag<Activation::gelu>{});
    case Activation::swiglu:
      return body(ActivationTag<Activation::swiglu>{});
  }
}

}  // namespace MOE_ISA
}  // namespace moe
