// Dispatch and combine: which kernel of rows.hpp serves a call.
#include "rows.hpp"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels.hpp"
#include "launch.hpp"

namespace moe::cuda {

namespace {

// Units of a row, and those that its last lanes would have beyond it, are counted in 32 bits.
constexpr int64_t kLargestHidden = 1 << 30;

// A warp for each item, as many as the GPU holds at once; these take the items in turn.
template <class Kernel>
void launch_warps(const Device& device, const typename Kernel::Args& args, int64_t items) {
  constexpr int64_t kWarps = Kernel::kThreads / 32;
  const int64_t most = blocks_at_once<Kernel, Team::cluster>(device.index, Kernel::kThreads, 0);
  const int64_t blocks = std::min((items + kWarps - 1) / kWarps, most);
  launch<Kernel, Team::cluster>(device, {blocks, 1, Kernel::kThreads, 0}, args);
}

// Calls body with the type of the numbers.
template <class Body>
void with_number(Dtype dtype, const char* op, Body body) {
  switch (dtype) {
    case Dtype::f32:
      return body(Float32());
    case Dtype::bf16:
      return body(BFloat16());
    case Dtype::f16:
      return body(Float16());
    default:
      throw std::invalid_argument(std::string(op) + " got dtype number " +
                                  std::to_string(static_cast<int>(dtype)) +
                                  "; the CUDA kernel takes float32, bfloat16 and float16. Use "
                                  "backend 'reference' for others.");
  }
}

// Calls body with the type of a row's units, and their number: 16 bytes where every row starts at a
// multiple of that.
template <class Bits, class Body>
void with_unit(int64_t hidden, std::initializer_list<const void*> buffers, Body body) {
  if (hidden > kLargestHidden) {
    throw std::invalid_argument("rows have " + std::to_string(hidden) + " numbers; at most " +
                                std::to_string(kLargestHidden) +
                                " are possible; use backend 'reference'.");
  }
  const auto is_aligned = [](const void* buffer) {
    return reinterpret_cast<uintptr_t>(buffer) % sizeof(Vector) == 0;
  };
  const int64_t row_bytes = hidden * static_cast<int64_t>(sizeof(Bits));
  if (row_bytes % static_cast<int64_t>(sizeof(Vector)) == 0 &&
      std::all_of(buffers.begin(), buffers.end(), is_aligned)) {
    body(Vector(), static_cast<int>(row_bytes / static_cast<int64_t>(sizeof(Vector))));
  } else {
    body(Bits(), static_cast<int>(hidden));
  }
}

}  // namespace

void gather(const Device& device, const GatherCall& call) {
  if (call.num_rows == 0) return;
  with_number(call.dtype, "gather", [&](auto number) {
    using Number = decltype(number);
    const auto start = [&](auto unit, int units) {
      using Unit = decltype(unit);
      const GatherArgs args = {call.x,    call.values,   call.weights,  call.token_indices,
                               call.rows, call.dweights, call.num_rows, units};
      if (call.weights == nullptr && call.dweights == nullptr) {
        launch_warps<CopyRows<Unit>>(device, args, call.num_rows);
      } else {
        launch_warps<ScaleRows<Number, Unit>>(device, args, call.num_rows);
      }
    };
    with_unit<typename Number::Bits>(call.hidden, {call.x, call.values, call.rows}, start);
  });
}

void sum_rows(const Device& device, const SumRowsCall& call) {
  if (call.tokens == 0) return;
  with_number(call.dtype, "sum_rows", [&](auto number) {
    using Number = decltype(number);
    const auto start = [&](auto unit, int units) {
      const SumArgs args = {call.rows,        call.weights, call.row_indices,
                            call.row_offsets, call.shared,  call.residual,
                            call.out,         call.tokens,  units};
      launch_warps<SumRows<Number, decltype(unit)>>(device, args, call.tokens);
    };
    with_unit<typename Number::Bits>(call.hidden, {call.rows, call.shared, call.residual, call.out},
                                     start);
  });
}

}  // namespace moe::cuda
