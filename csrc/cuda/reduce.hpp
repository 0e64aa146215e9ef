// The second stage of the losses: columns of a matrix with a row for each block or team.
#pragma once

#include <algorithm>

#include "block.hpp"

namespace moe::cuda {

// Σ of from[i · stride] for i = begin, begin + step, ... below end. Eight loads at a time wait for
// memory together; a sum that waits for each of them takes eight times as long.
template <class T>
MOE_DEVICE T sum_strided(const T* from, int64_t begin, int64_t end, int64_t step, int64_t stride) {
  constexpr int kFlight = 8;
  const int64_t jump = step * stride;
  T total = 0;
  from += begin * stride;
  for (int64_t i = begin; i < end;) {
    T values[kFlight];
    MOE_UNROLL
    for (int k = 0; k < kFlight; ++k) {
      values[k] = i < end ? *from : T(0);
      i += step;
      from += jump;
    }
    MOE_UNROLL
    for (int k = 0; k < kFlight; ++k) total += values[k];
  }
  return total;
}

// Sums over the rows of a (rows, columns) matrix, left in shared[0 ... columns). Several threads
// share a column; which, and in what order their sums are added, depends on the shape alone.
template <class Block, class T>
MOE_DEVICE void sum_columns(const Block& block, const T* matrix, int64_t rows, int columns,
                            T* shared) {
  const int parts = larger(block.threads() / columns, 1);
  for (int i = block.thread(); i < parts * columns; i += block.threads()) {
    shared[i] = sum_strided(matrix + i % columns, i / columns, rows, parts, columns);
  }
  block.sync();
  for (int column = block.thread(); column < columns; column += block.threads()) {
    T total = 0;
    for (int part = 0; part < parts; ++part) total += shared[part * columns + column];
    shared[column] = total;
  }
  block.sync();
}

// The same by all blocks of the team: a column is a warp's, which leaves its sum in `sums`. The
// last blocks begin, because what does not go round falls to the first ones.
template <class Block, class T>
MOE_DEVICE void sum_columns_of_team(const Block& block, const T* matrix, int64_t rows, int columns,
                                    T* sums) {
  const int64_t blocks = block.team_blocks();
  for (int64_t column = (block.warp() + 1) * blocks - 1 - block.rank(); column < columns;
       column += blocks * block.warps()) {
    T total = sum_strided(matrix + column, block.lane(), rows, 32, columns);
    total = sum_lanes(block, total, 32);
    if (block.lane() == 0) sums[column] = total;
  }
}

template <class T>
int64_t columns_bytes(int64_t columns, int threads) {
  return static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(columns, threads);
}

}  // namespace moe::cuda
