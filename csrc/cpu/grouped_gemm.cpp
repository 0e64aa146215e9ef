// One product an expert over ragged rows, in one parallel region over pieces of experts.
#include "experts.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

template <class Types>
struct GroupedGemm {
  using S = typename Types::S;
  using Operand = typename Types::Operand;
  using A = typename Types::A;

  const GroupedGemmArgs& args;
  const int64_t in = args.in_features, out = args.out_features;
  const Cut cut{args.num_rows, args.experts};
  const int64_t piece = cut.largest();
  // Scratch of one thread: operands in the form that products read, and a wide result.
  const int64_t rows_bytes =
      Types::same_operand ? 0 : aligned_bytes<Operand>(piece * max_of(in, out));
  const int64_t weight_bytes = Types::same_operand ? 0 : aligned_bytes<Operand>(in * out);
  const int64_t dw_rows = args.w_transposed ? in : out, dw_columns = args.w_transposed ? out : in;
  const int64_t wide_size = max_of(piece * max_of(in, out), kWeightRows* dw_columns);
  const int64_t wide_bytes = Types::same_wide ? 0 : aligned_bytes<A>(wide_size);
  const int64_t own_bytes = rows_bytes + weight_bytes + wide_bytes;
  const int team = team_size(args.threads, args.num_rows, in, out);

  const S* rows_of(const void* base, int64_t row, int64_t width) const {
    return static_cast<const S*>(base) + row * width;
  }
  const S* weight_of(int64_t expert) const {
    return static_cast<const S*>(args.w) + expert * in * out;
  }

  // out[begin:end] = rows[begin:end] · w^T, or drows = dout · w.
  void run_rows(bool backward, int64_t expert, int64_t begin, int64_t end, char* own) const {
    Operand* copy = reinterpret_cast<Operand*>(own);
    Operand* weight_copy = reinterpret_cast<Operand*>(own + rows_bytes);
    A* wide = reinterpret_cast<A*>(own + rows_bytes + weight_bytes);
    const int64_t rows = end - begin, from = backward ? out : in, to = backward ? in : out;
    const S* source = rows_of(backward ? args.dout : args.rows, begin, from);
    const Operand* operand = as_operand<Types>(source, rows * from, copy);
    const Matrix<const Operand> w = weight_matrix(
        as_operand<Types>(weight_of(expert), in * out, weight_copy), out, in, args.w_transposed);
    S* result = static_cast<S*>(backward ? args.drows : args.out) + begin * to;
    gemm_to_storage<Types>(rows, to, from, {operand, from}, backward ? w : transpose_of(w), result,
                           wide);
  }

  // A piece of dw[expert] = dout^T · rows.
  void run_weights(int64_t expert, int64_t number, const Operand* rows, const Operand* dout,
                   char* own) const {
    A* wide = reinterpret_cast<A*>(own + rows_bytes + weight_bytes);
    const int64_t depth = args.expert_offsets[expert + 1] - args.expert_offsets[expert];
    weight_piece<Types>(args.w_transposed, number, depth, {dout, out}, {rows, in},
                        static_cast<S*>(args.dw) + expert * out * in, wide);
  }

  // Calls body(expert, piece number, pieces) for every piece, shared among the threads.
  template <class Pieces, class Body>
  void share(const int32_t* order, int64_t active, char* owns, Pieces pieces, Body body) const {
    Counter counter;
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const SingleThread single;
      char* own = owns + thread_number() * own_bytes;
      int64_t mine = counter.next(), first = 0;
      for (int64_t i = 0; i < active; ++i) {
        const int64_t count = pieces(order[i]);
        for (; mine < first + count; mine = counter.next()) body(order[i], mine - first, own);
        first += count;
      }
    }
  }

  void run(bool backward) const {
    const int32_t* offsets = args.expert_offsets;
    const int64_t order_bytes = aligned_bytes<int32_t>(args.experts);
    const bool copies = backward && args.dw != nullptr && !Types::same_operand;
    const int64_t in_bytes = copies ? aligned_bytes<Operand>(args.num_rows * in) : 0;
    const int64_t out_bytes = copies ? aligned_bytes<Operand>(args.num_rows * out) : 0;
    const Scratch scratch(order_bytes + in_bytes + out_bytes + team * own_bytes);
    int32_t* order = scratch.as<int32_t>();
    char* memory = scratch.as<char>() + order_bytes;
    char* owns = memory + in_bytes + out_bytes;
    const int64_t active = order_experts(offsets, args.experts, order);

    if (!backward || args.drows != nullptr) {
      const auto pieces = [&](int64_t e) { return cut.count(offsets[e + 1] - offsets[e]); };
      share(order, active, owns, pieces, [&](int64_t e, int64_t number, char* own) {
        const int64_t size = ceil_div(offsets[e + 1] - offsets[e], pieces(e));
        const int64_t begin = offsets[e] + number * size;
        run_rows(backward, e, begin, min_of(begin + size, offsets[e + 1]), own);
      });
    }
    if (!backward || args.dw == nullptr) return;
    for (int64_t e = 0; e < args.experts; ++e) {
      if (offsets[e + 1] > offsets[e]) continue;
      memset(static_cast<S*>(args.dw) + e * in * out, 0, in * out * sizeof(S));
    }
    const Operand* rows = as_operand<Types>(rows_of(args.rows, 0, in), args.num_rows * in,
                                            reinterpret_cast<Operand*>(memory));
    const Operand* dout = as_operand<Types>(rows_of(args.dout, 0, out), args.num_rows * out,
                                            reinterpret_cast<Operand*>(memory + in_bytes));
    const auto blocks = [&](int64_t) { return ceil_div(dw_rows, kWeightRows); };
    share(order, active, owns, blocks, [&](int64_t e, int64_t number, char* own) {
      run_weights(e, number, rows + offsets[e] * in, dout + offsets[e] * out, own);
    });
  }
};

}  // namespace

void grouped_gemm_fwd(const GroupedGemmArgs& args) {
  with_types(args.dtype, args.native_bf16,
             [&](auto types) { GroupedGemm<decltype(types)>{args}.run(false); });
}

void grouped_gemm_bwd(const GroupedGemmArgs& args) {
  with_types(args.dtype, args.native_bf16,
             [&](auto types) { GroupedGemm<decltype(types)>{args}.run(true); });
}

}  // namespace MOE_ISA
}  // namespace moe
