// The second stage of the losses: columns of a matrix with a row for each block.
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

template <class T>
int64_t columns_bytes(int64_t columns, int threads) {
  return static_cast<int64_t>(sizeof(T)) * std::max<int64_t>(columns, threads);
}

}  // namespace moe::cuda
