// Moving rows of hidden states: gathering the tokens of rows, and summing the rows of tokens.
//
// A warp has one row, or one token, at a time, and its lanes take units of 16 bytes in turn (single
// numbers where a row does not start at a multiple of 16 bytes). An estimate for an H100: memory at
// its full speed has 20 KiB on their way to each processor (3.35 TB/s, 0.8 us, 132 processors).
// kRowBlocks blocks with 64 bytes a lane on the way have three times that, so that a warp may spend
// two thirds of its time waiting for indices.
#pragma once

#include "block.hpp"
#include "global_memory.hpp"
#include "numbers.hpp"

namespace moe::cuda {

// Many small blocks, so that a few hundred rows reach every processor.
constexpr int kRowThreads = 128;
constexpr int kRowBlocks = 8;  // on a processor, at least: up to 64 registers a thread

template <class Block>
MOE_DEVICE int64_t first_item(const Block& block) {
  return block.team() * block.warps() + block.warp();
}

template <class Block>
MOE_DEVICE int64_t items_at_once(const Block& block) {
  return block.teams() * block.warps();
}

template <class Unit>
MOE_DEVICE const Unit* row_of(const void* rows, int64_t row, int units) {
  return static_cast<const Unit*>(rows) + row * units;
}

template <class Unit>
MOE_DEVICE Unit* row_of(void* rows, int64_t row, int units) {
  return static_cast<Unit*>(rows) + row * units;
}

// A unit as its numbers.
template <class Number, class Unit>
struct Numbers {
  static constexpr int kCount = sizeof(Unit) / sizeof(typename Number::Bits);
  typename Number::Bits bits[kCount];

  MOE_DEVICE static Numbers of(Unit unit) { return bit_cast<Numbers>(unit); }
  MOE_DEVICE Unit unit() const { return bit_cast<Unit>(*this); }
  MOE_DEVICE float operator[](int i) const { return Number::widen(bits[i]); }
  MOE_DEVICE void set(int i, float value) { bits[i] = Number::narrow(value); }
};

struct GatherArgs {
  const void* x;
  const void* values;
  const float* weights;
  const int32_t* token_indices;
  void* rows;
  float* dweights;
  int64_t num_rows;
  int units;  // of a row
};

// Dispatch: rows[r] = x[token_indices[r]], to the bit whatever the numbers are. A row of x is read
// once for each of its experts and stays in the cache, for which the rows written make place.
template <class Unit>
struct CopyRows {
  using Args = GatherArgs;
  static constexpr const char* name = "gather";
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlocks = kRowBlocks;
  static constexpr int kFlight = 5;  // all of a row of 1280 numbers in 16 bits

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const int64_t step = items_at_once(block);
    for (int64_t row = first_item(block); row < args.num_rows; row += step) {
      const int token = load_cached(args.token_indices + row);
      const Unit* from = row_of<Unit>(args.x, token, args.units);
      Unit* to = row_of<Unit>(args.rows, row, args.units);
      for (int first = block.lane(); first < args.units; first += kFlight * 32) {
        Unit units[kFlight] = {};
        MOE_UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i * 32 < args.units) units[i] = load_cached(from + first + i * 32);
        }
        MOE_UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i * 32 < args.units) store_once(to + first + i * 32, units[i]);
        }
      }
    }
  }
};

// Backward of combine: rows[r] = weights[r] * x[token_indices[r]], and where dweights are wanted
// dweights[r] = <x[token_indices[r]], values[r]>.
template <class Number, class Unit>
struct ScaleRows {
  using Args = GatherArgs;
  static constexpr const char* name = "gather with weights";
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlocks = kRowBlocks;
  static constexpr int kFlight = 2;

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const int64_t step = items_at_once(block);
    for (int64_t row = first_item(block); row < args.num_rows; row += step) {
      const int token = load_cached(args.token_indices + row);
      const float weight = args.weights == nullptr ? 1.0f : load_cached(args.weights + row);
      const Unit* from = row_of<Unit>(args.x, token, args.units);
      const Unit* values =
          args.dweights == nullptr ? nullptr : row_of<Unit>(args.values, row, args.units);
      Unit* to = row_of<Unit>(args.rows, row, args.units);
      float product = 0.0f;
      for (int first = block.lane(); first < args.units; first += kFlight * 32) {
        Unit units[kFlight] = {}, others[kFlight] = {};
        MOE_UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i * 32 >= args.units) continue;
          units[i] = load_cached(from + first + i * 32);
          if (args.dweights != nullptr) others[i] = load_once(values + first + i * 32);
        }
        MOE_UNROLL
        for (int i = 0; i < kFlight; ++i) {
          if (first + i * 32 >= args.units) continue;
          product = add_products(product, units[i], others[i]);
          store_once(to + first + i * 32, scaled(weight, units[i]));
        }
      }
      if (args.dweights == nullptr) continue;
      product = sum_lanes(block, product, 32);
      if (block.lane() == 0) args.dweights[row] = product;
    }
  }

 private:
  MOE_DEVICE static float add_products(float total, Unit a, Unit b) {
    const auto left = Numbers<Number, Unit>::of(a), right = Numbers<Number, Unit>::of(b);
    MOE_UNROLL
    for (int i = 0; i < left.kCount; ++i) total = fmaf(left[i], right[i], total);
    return total;
  }

  MOE_DEVICE static Unit scaled(float weight, Unit unit) {
    auto numbers = Numbers<Number, Unit>::of(unit);
    MOE_UNROLL
    for (int i = 0; i < numbers.kCount; ++i) numbers.set(i, weight * numbers[i]);
    return numbers.unit();
  }
};

struct SumArgs {
  const void* rows;
  const float* weights;
  const int32_t* row_indices;
  const int32_t* row_offsets;
  const void* shared;
  const void* residual;
  void* out;
  int64_t tokens;
  int units;  // of a row
};

// Combine: out[t] = sum of weights[r] * rows[r] over the rows of t in ascending order, then
// + shared[t] + residual[t], all in fp32 and rounded once. Two terms are loaded before one is
// added, so that the two rows of a token with two experts wait for memory together.
template <class Number, class Unit>
struct SumRows {
  using Args = SumArgs;
  static constexpr const char* name = "sum_rows";
  static constexpr int kThreads = kRowThreads;
  static constexpr int kBlocks = kRowBlocks;
  static constexpr int kFlight = 2;  // units of a term

  template <class Block>
  MOE_DEVICE static void run(const Block& block, const Args& args) {
    const int64_t step = items_at_once(block);
    for (int64_t token = first_item(block); token < args.tokens; token += step) {
      const int begin = load_cached(args.row_offsets + token);
      const int end = load_cached(args.row_offsets + token + 1);
      for (int first = block.lane(); first < args.units; first += kFlight * 32) {
        Totals totals = {};
        int slot = begin;
        for (; slot + 1 < end; slot += 2) {
          add<2>(totals, {row_term(args, slot), row_term(args, slot + 1)}, first, args.units);
        }
        if (slot < end) add<1>(totals, {row_term(args, slot)}, first, args.units);
        if (args.shared != nullptr && args.residual != nullptr) {
          add<2>(totals, {whole(args, args.shared, token), whole(args, args.residual, token)},
                 first, args.units);
        } else if (args.shared != nullptr) {
          add<1>(totals, {whole(args, args.shared, token)}, first, args.units);
        } else if (args.residual != nullptr) {
          add<1>(totals, {whole(args, args.residual, token)}, first, args.units);
        }
        write(row_of<Unit>(args.out, token, args.units), totals, first, args.units);
      }
    }
  }

 private:
  static constexpr int kNumbers = Numbers<Number, Unit>::kCount;
  using Totals = float[kFlight][kNumbers];

  struct Term {
    const Unit* units;
    float weight;
  };

  MOE_DEVICE static Term row_term(const Args& args, int slot) {
    const int row = load_cached(args.row_indices + slot);
    const float weight = args.weights == nullptr ? 1.0f : load_cached(args.weights + row);
    return {row_of<Unit>(args.rows, row, args.units), weight};
  }

  MOE_DEVICE static Term whole(const Args& args, const void* terms, int64_t token) {
    return {row_of<Unit>(terms, token, args.units), 1.0f};
  }

  template <int kTerms>
  MOE_DEVICE static void add(Totals& totals, const Term (&terms)[kTerms], int first, int count) {
    Unit units[kTerms][kFlight] = {};
    MOE_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      MOE_UNROLL
      for (int i = 0; i < kFlight; ++i) {
        if (first + i * 32 < count) units[t][i] = load_once(terms[t].units + first + i * 32);
      }
    }
    MOE_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      MOE_UNROLL
      for (int i = 0; i < kFlight; ++i) {
        const auto numbers = Numbers<Number, Unit>::of(units[t][i]);
        MOE_UNROLL
        for (int j = 0; j < kNumbers; ++j) {
          totals[i][j] = fmaf(terms[t].weight, numbers[j], totals[i][j]);
        }
      }
    }
  }

  MOE_DEVICE static void write(Unit* to, const Totals& totals, int first, int count) {
    MOE_UNROLL
    for (int i = 0; i < kFlight; ++i) {
      Numbers<Number, Unit> numbers;
      MOE_UNROLL
      for (int j = 0; j < kNumbers; ++j) numbers.set(j, totals[i][j]);
      if (first + i * 32 < count) to[first + i * 32] = numbers.unit();
    }
  }
};

}  // namespace moe::cuda
