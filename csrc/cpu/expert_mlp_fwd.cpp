// Forward of the expert MLP: one parallel region over pieces of experts, each gather - product -
// activation - product while the piece is in cache; then the sum over each token's rows.
//
// The routing weight is folded into the activation, so that expert outputs need not be kept for
// its gradient. The product before bias and activation, h, is all that is written for backward, and
// not even that where nothing will be differentiated: it then stays in each thread's scratch.
#include "activation.hpp"
#include "experts.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

template <class Types, Activation Act>
struct Forward {
  using S = typename Types::S;
  using Operand = typename Types::Operand;
  using A = typename Types::A;

  const ExpertMlpFwdArgs& args;
  const int64_t hidden = args.hidden, inner = args.intermediate;
  const int64_t columns = Act == Activation::swiglu ? 2 * inner : inner;
  const Cut cut{args.rows, args.experts};
  const int64_t piece = cut.largest();

  // Scratch of one thread.
  const int64_t x_bytes = aligned_bytes<Operand>(piece * hidden);
  const int64_t a_bytes = aligned_bytes<Operand>(piece * inner);
  const bool keeps_h = args.h != nullptr;
  const bool h_in_place = Types::same_wide && keeps_h;
  const int64_t h_bytes = h_in_place ? 0 : aligned_bytes<A>(piece * columns);
  const int64_t weight_bytes = Types::same_operand ? 0 : aligned_bytes<Operand>(columns * hidden);
  const int64_t own_bytes = x_bytes + a_bytes + h_bytes + weight_bytes;

  void run_piece(int64_t expert, int64_t begin, int64_t end, char* own, A* y) const {
    Operand* x = reinterpret_cast<Operand*>(own);
    Operand* a = reinterpret_cast<Operand*>(own + x_bytes);
    S* stored = keeps_h ? static_cast<S*>(args.h) + begin * columns : nullptr;
    A* h = reinterpret_cast<A*>(h_in_place ? reinterpret_cast<char*>(stored)
                                           : own + x_bytes + a_bytes);
    Operand* copy = reinterpret_cast<Operand*>(own + x_bytes + a_bytes + h_bytes);
    const int64_t rows = end - begin;
    const S* bias_in = static_cast<const S*>(args.bias_in);
    const S* bias_out = static_cast<const S*>(args.bias_out);
    const A* weights = static_cast<const A*>(args.weights);

    gather_rows<Types>(static_cast<const S*>(args.x), args.token_indices, begin, end, hidden, x);
    const Operand* w_in = as_operand<Types>(
        static_cast<const S*>(args.w_in) + expert * columns * hidden, columns * hidden, copy);
    gemm<Operand, A>(rows, columns, hidden, {x, hidden},
                     transpose_of(weight_matrix(w_in, columns, hidden, args.w_in_transposed)), A(0),
                     {h, columns});
    if constexpr (!Types::same_wide) {
      if (keeps_h) convert_row<A>(stored, h, rows * columns);
    }
    for (int64_t r = 0; r < rows; ++r) {
      activate_row<A, Act>(h + r * columns,
                           bias_in == nullptr ? bias_in : bias_in + expert * columns,
                           weights[begin + r], a + r * inner, inner);
      if (bias_out != nullptr) {
        scale_row<A>(y + (begin + r) * hidden, bias_out + expert * hidden, weights[begin + r],
                     hidden);
      }
    }
    const Operand* w_out = as_operand<Types>(
        static_cast<const S*>(args.w_out) + expert * hidden * inner, hidden * inner, copy);
    gemm<Operand, A>(rows, hidden, inner, {a, inner},
                     transpose_of(weight_matrix(w_out, hidden, inner, args.w_out_transposed)),
                     A(bias_out != nullptr), {y + begin * hidden, hidden});
  }

  void run() const {
    const int32_t* offsets = args.expert_offsets;
    const int64_t y_bytes = aligned_bytes<A>(args.rows * hidden);
    const int64_t order_bytes = aligned_bytes<int32_t>(args.experts);
    const int team = team_size(args.threads, args.rows, hidden, columns);
    const Scratch scratch(y_bytes + order_bytes + team * own_bytes);
    A* y = scratch.as<A>();
    int32_t* order = reinterpret_cast<int32_t*>(scratch.as<char>() + y_bytes);
    char* owns = scratch.as<char>() + y_bytes + order_bytes;
    const int64_t active = order_experts(offsets, args.experts, order);
    Counter pieces;
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const SingleThread single;
      char* own = owns + thread_number() * own_bytes;
      int64_t mine = pieces.next(), first = 0;
      for (int64_t i = 0; i < active; ++i) {
        const int64_t expert = order[i];
        const int64_t rows = offsets[expert + 1] - offsets[expert], count = cut.count(rows);
        const int64_t size = ceil_div(rows, count);
        for (; mine < first + count; mine = pieces.next()) {
          const int64_t begin = offsets[expert] + (mine - first) * size;
          run_piece(expert, begin, min_of(begin + size, offsets[expert + 1]), own, y);
        }
        first += count;
      }
    }
    sum_rows<A>(y, static_cast<const A*>(nullptr), args.row_indices, args.row_offsets,
                static_cast<S*>(args.out), args.tokens, hidden, args.threads);
  }
};

}  // namespace

void expert_mlp_fwd(const ExpertMlpFwdArgs& args) {
  with_types(args.dtype, args.native_bf16, [&](auto types) {
    with_activation(args.activation,
                    [&](auto tag) { Forward<decltype(types), decltype(tag)::value>{args}.run(); });
  });
}

}  // namespace MOE_ISA
}  // namespace moe
