// Backward of the expert MLP from x and h alone.
//
// Two kinds of pieces for every expert. Row pieces: da = dy · w_out, through the activation to dh
// and the activation again, dx rows = dh · w_in. Then weight pieces: dw_out = dy^T · a and
// dw_in = dh^T · x in blocks of rows in memory, and the bias gradients. Both kinds are handed out
// from one list, in which an expert's weight pieces come after the row pieces of the experts that
// follow it, so that hardly anybody waits; buffers of a few experts are alive at a time.
#include "activation.hpp"
#include "experts.hpp"

namespace moe {
namespace MOE_ISA {
namespace {

template <class Types, Activation Act>
struct Backward {
  using S = typename Types::S;
  using Operand = typename Types::Operand;
  using A = typename Types::A;

  const ExpertMlpBwdArgs& args;
  const int64_t hidden = args.hidden, inner = args.intermediate;
  const int64_t columns = Act == Activation::swiglu ? 2 * inner : inner;
  const Cut cut{args.rows, args.experts};
  const bool need_bias = args.dbias_in != nullptr || args.dbias_out != nullptr;

  // Scratch of one thread: d(activation) of a piece, converted weights or a wide weight block.
  const int64_t da_bytes = aligned_bytes<A>(cut.largest() * inner);
  const int64_t copy_bytes = Types::same_operand ? 0 : aligned_bytes<Operand>(columns * hidden);
  const int64_t widest =
      max_of(args.w_in_transposed ? columns : hidden, args.w_out_transposed ? hidden : inner);
  const int64_t wide_bytes = Types::same_wide ? 0 : aligned_bytes<A>(kWeightRows * widest);
  // dx rows of a piece are stored wide; bias sums need a row of each width.
  const int64_t bias_bytes = aligned_bytes<A>(max_of(columns, hidden));
  const int64_t own_bytes = da_bytes + copy_bytes + wide_bytes + bias_bytes;

  // Buffers of one expert that is being worked on.
  struct Slot {
    Operand *x, *dy, *a, *dh;
  };

  Slot slot_of(char* memory, int64_t rows) const {
    Slot slot;
    slot.x = reinterpret_cast<Operand*>(memory);
    slot.dy = reinterpret_cast<Operand*>(memory + aligned_bytes<Operand>(rows * hidden));
    slot.a = reinterpret_cast<Operand*>(memory + 2 * aligned_bytes<Operand>(rows * hidden));
    slot.dh = slot.a + aligned_bytes<Operand>(rows * inner) / sizeof(Operand);
    return slot;
  }
  int64_t slot_bytes(int64_t rows) const {
    return 2 * aligned_bytes<Operand>(rows * hidden) + aligned_bytes<Operand>(rows * inner) +
           aligned_bytes<Operand>(rows * columns);
  }

  // Rows [from, to) of the expert.
  void run_rows(int64_t expert, int64_t from, int64_t to, const Slot& slot, char* own,
                A* dx_rows) const {
    const int64_t rows = to - from, begin = args.expert_offsets[expert] + from;
    const S* bias_in = static_cast<const S*>(args.bias_in);
    const S* bias_out = static_cast<const S*>(args.bias_out);
    const A* weights = static_cast<const A*>(args.weights);
    A* da = reinterpret_cast<A*>(own);
    Operand* copy = reinterpret_cast<Operand*>(own + da_bytes);
    Operand* dy = slot.dy + from * hidden;
    Operand* dh = slot.dh + from * columns;

    gather_rows<Types>(static_cast<const S*>(args.dout), args.token_indices, begin, begin + rows,
                       hidden, dy);
    if (args.dw_in != nullptr) {
      gather_rows<Types>(static_cast<const S*>(args.x), args.token_indices, begin, begin + rows,
                         hidden, slot.x + from * hidden);
    }
    const Operand* w_out = as_operand<Types>(
        static_cast<const S*>(args.w_out) + expert * hidden * inner, hidden * inner, copy);
    gemm<Operand, A>(rows, inner, hidden, {dy, hidden},
                     weight_matrix(w_out, hidden, inner, args.w_out_transposed), A(0), {da, inner});
    for (int64_t r = 0; r < rows; ++r) {
      A dweight = activate_row_bwd<A, Act, true>(
          static_cast<const S*>(args.h) + (begin + r) * columns,
          bias_in == nullptr ? bias_in : bias_in + expert * columns, weights[begin + r],
          da + r * inner, slot.a + (from + r) * inner, dh + r * columns, inner);
      if (bias_out != nullptr) {
        dweight += dot_row<A>(dy + r * hidden, bias_out + expert * hidden, hidden);
      }
      if (args.dweights != nullptr) static_cast<A*>(args.dweights)[begin + r] = dweight;
    }
    if (args.dx != nullptr) {
      const Operand* w_in = as_operand<Types>(
          static_cast<const S*>(args.w_in) + expert * columns * hidden, columns * hidden, copy);
      gemm<Operand, A>(rows, hidden, columns, {dh, columns},
                       weight_matrix(w_in, columns, hidden, args.w_in_transposed), A(0),
                       {dx_rows + begin * hidden, hidden});
    }
  }

  // Number of weight pieces of an expert: blocks of dw_out, blocks of dw_in, biases.
  int64_t blocks_out() const {
    if (args.dw_out == nullptr) return 0;
    return ceil_div(args.w_out_transposed ? inner : hidden, kWeightRows);
  }
  int64_t blocks_in() const {
    if (args.dw_in == nullptr) return 0;
    return ceil_div(args.w_in_transposed ? hidden : columns, kWeightRows);
  }
  int64_t weight_pieces() const { return blocks_out() + blocks_in() + need_bias; }

  void run_weights(int64_t expert, int64_t block, const Slot& slot, char* own) const {
    const int64_t rows = args.expert_offsets[expert + 1] - args.expert_offsets[expert];
    A* wide = reinterpret_cast<A*>(own + da_bytes + copy_bytes);
    if (block < blocks_out()) {
      S* dw = static_cast<S*>(args.dw_out) + expert * hidden * inner;
      weight_piece<Types>(args.w_out_transposed, block, rows, {slot.dy, hidden}, {slot.a, inner},
                          dw, wide);
      return;
    }
    block -= blocks_out();
    if (block < blocks_in()) {
      S* dw = static_cast<S*>(args.dw_in) + expert * columns * hidden;
      weight_piece<Types>(args.w_in_transposed, block, rows, {slot.dh, columns}, {slot.x, hidden},
                          dw, wide);
      return;
    }
    A* sum = reinterpret_cast<A*>(own + da_bytes + copy_bytes + wide_bytes);
    const A* weights = static_cast<const A*>(args.weights) + args.expert_offsets[expert];
    if (args.dbias_in != nullptr) {
      add_rows(slot.dh, nullptr, rows, columns, sum);
      convert_row<A>(static_cast<S*>(args.dbias_in) + expert * columns, sum, columns);
    }
    if (args.dbias_out != nullptr) {
      add_rows(slot.dy, weights, rows, hidden, sum);
      convert_row<A>(static_cast<S*>(args.dbias_out) + expert * hidden, sum, hidden);
    }
  }

  // sum = the weighted sum of rows
  void add_rows(const Operand* from, const A* weights, int64_t rows, int64_t size, A* sum) const {
    for (int64_t i = 0; i < size; ++i) sum[i] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const A weight = weights == nullptr ? A(1) : weights[r];
      for_each_vector<A>(size, [&](int64_t i, int64_t count) {
        const Vec<A> term = load_part<A>(from + r * size + i, count) * weight;
        store_part<A>(sum + i, load_part<A>(sum + i, count) + term, count);
      });
    }
  }

  // An expert without rows gets zeros, never uninitialised memory.
  void clear_expert(int64_t expert) const {
    const auto clear = [&](void* gradient, int64_t size) {
      if (gradient == nullptr) return;
      memset(static_cast<S*>(gradient) + expert * size, 0, size * sizeof(S));
    };
    clear(args.dw_in, columns * hidden);
    clear(args.dw_out, hidden * inner);
    clear(args.dbias_in, columns);
    clear(args.dbias_out, hidden);
  }

  void run() const {
    const int32_t* offsets = args.expert_offsets;
    int64_t most_rows = 0;
    for (int64_t e = 0; e < args.experts; ++e) {
      most_rows = max_of(most_rows, offsets[e + 1] - offsets[e]);
      if (offsets[e + 1] == offsets[e]) clear_expert(e);
    }
    const int team = team_size(args.threads, args.rows, hidden, columns);
    // Row pieces run this many experts ahead of weight pieces. One more buffer would let the next
    // expert start while the weight pieces of the oldest end: measured to gain nothing, at 1024
    // tokens and 4 experts of width 1536, for 11 MB.
    const int64_t ahead = 1 + team / 4, slots = min_of(ahead + 1, args.experts);
    const int64_t one_slot = slot_bytes(most_rows);
    const int64_t order_bytes = aligned_bytes<int32_t>(args.experts);
    const int64_t done_bytes = aligned_bytes<int64_t>(2 * args.experts);
    const int64_t dx_bytes = args.dx == nullptr ? 0 : aligned_bytes<A>(args.rows * hidden);
    const Scratch scratch(order_bytes + done_bytes + team * own_bytes + dx_bytes +
                          slots * one_slot);
    char* memory = scratch.as<char>();
    int32_t* order = reinterpret_cast<int32_t*>(memory);
    int64_t* rows_done = reinterpret_cast<int64_t*>(memory + order_bytes);
    int64_t* weights_done = rows_done + args.experts;
    char* owns = memory + order_bytes + done_bytes;
    A* dx_rows = reinterpret_cast<A*>(owns + team * own_bytes);
    char* buffers = owns + team * own_bytes + dx_bytes;
    memset(rows_done, 0, 2 * args.experts * sizeof(int64_t));
    const int64_t active = order_experts(offsets, args.experts, order);
    const int64_t blocks = weight_pieces();
    const auto pieces_of = [&](int64_t i) {
      return cut.count(offsets[order[i] + 1] - offsets[order[i]]);
    };
    const auto slot_at = [&](int64_t i) {
      return slot_of(buffers + i % slots * one_slot, offsets[order[i] + 1] - offsets[order[i]]);
    };

    Counter counter;
#pragma omp parallel num_threads(team) if (team > 1)
    {
      const SingleThread single;
      char* own = owns + thread_number() * own_bytes;
      int64_t mine = counter.next(), first = 0;
      // Step i of the list: row pieces of expert i, then weight pieces of expert i - ahead.
      for (int64_t i = 0; i < active + ahead; ++i) {
        if (i < active) {
          const int64_t rows = offsets[order[i] + 1] - offsets[order[i]], count = pieces_of(i);
          const int64_t size = ceil_div(rows, count);
          for (; mine < first + count; mine = counter.next()) {
            if (i >= slots) {  // until the buffer's former expert is done with
              wait_for(rows_done + (i - slots), pieces_of(i - slots));
              wait_for(weights_done + (i - slots), blocks);
            }
            const int64_t from = (mine - first) * size;
            run_rows(order[i], from, min_of(from + size, rows), slot_at(i), own, dx_rows);
            report(rows_done + i);
          }
          first += count;
        }
        const int64_t behind = i - ahead;
        if (behind < 0 || behind >= active) continue;
        for (; mine < first + blocks; mine = counter.next()) {
          wait_for(rows_done + behind, pieces_of(behind));
          run_weights(order[behind], mine - first, slot_at(behind), own);
          report(weights_done + behind);
        }
        first += blocks;
      }
    }
    if (args.dx != nullptr) {
      sum_rows<A>(dx_rows, static_cast<const A*>(nullptr), args.row_indices, args.row_offsets,
                  static_cast<S*>(args.dx), args.tokens, hidden, args.threads);
    }
  }
};

}  // namespace

void expert_mlp_bwd(const ExpertMlpBwdArgs& args) {
  with_types(args.dtype, args.native_bf16, [&](auto types) {
    with_activation(args.activation,
                    [&](auto tag) { Backward<decltype(types), decltype(tag)::value>{args}.run(); });
  });
}

}  // namespace MOE_ISA
}  // namespace moe
