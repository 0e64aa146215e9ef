// The second stage of the losses: columns of a matrix with a row for each block or team.
#pragma once

#include <algorithm>

#include "block.hpp"

namespace moe::cuda {

// Sums over the rows of a (rows, columns) matrix, left in shared[0 ... columns). Several threads
// share a column; which, and in what order their sums are added, depends on the shape alone.
template <class Block, class T>
MOE_DEVICE void sum_columns(const Block& block, const T* matrix, int64_t rows, int columns,
                            T* shared) {
  const int parts = larger(block.threads() / columns, 1);
  for (int i = block.thread(); i < parts * columns; i += block.threads()) {
    const T* from = matrix + i % columns;
    T total = 0;
    MOE_UNROLL_BY(8)  // that many loads on their way
    for (int64_t row = i / columns; row < rows; row += parts) total += from[row * columns];
    shared[i] = total;
  }
  block.sync();
  for (int column = block.thread(); column < columns; column += block.threads()) {
    T total = 0;
    for (int part = 0; part < parts; ++part) total += shared[part * columns + column];
    shared[column] = total;
  }
  block.sync();
}

// The same by all blocks of the team: a column is a warp's, which leaves its sum in `sums`.
template <class Block, class T>
MOE_DEVICE void sum_columns_of_team(const Block& block, const T* matrix, int64_t rows, int columns,
                                    T* sums) {
  const int64_t warps = block.team_blocks() * block.warps();
  for (int64_t column = block.warp() * block.team_blocks() + block.rank(); column < columns;
       column += warps) {
    T total = 0;
    MOE_UNROLL_BY(8)
    for (int64_t row = block.lane(); row < rows; row += 32) total += matrix[row * columns + column];
    total = sum_lanes(block, total, 32);
    if (block.lane() == 0) sums[column] = total;
  }
}

template <class T>
int64_t columns_bytes(int64_t columns, int threads) {
  return static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(columns, threads);
}

}  // namespace moe::cuda
