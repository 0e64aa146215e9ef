// Matrix products by the BLAS of `Blas`.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace moe {
namespace MOE_ISA {

// Products of this thread run on it alone. By default a BLAS keeps to the calling thread inside a
// parallel region, but not to the algorithm that it takes for one thread: bits of narrow products
// depended on the team. And shared among threads, small products of a team of one took 24 times as
// long when the other threads had to wake up.
class SingleThread {
 public:
  SingleThread() : before_(blas.set_threads(1)) {}
  ~SingleThread() { blas.set_threads(before_); }
  SingleThread(const SingleThread&) = delete;
  SingleThread& operator=(const SingleThread&) = delete;

 private:
  int before_;
};

// A row-major operand: its rows in memory are `stride` apart.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  bool transposed = false;
};

// A weight (rows, columns) as memory holds it: row by row, or transposed, column by column.
template <class T>
MOE_INLINE Matrix<const T> weight_matrix(const T* data, int64_t rows, int64_t columns,
                                         bool transposed) {
  return {data, transposed ? rows : columns, transposed};
}
template <class T>
MOE_INLINE Matrix<T> transpose_of(Matrix<T> matrix) {
  return {matrix.data, matrix.stride, !matrix.transposed};
}

// Row-major c (m, n) = op(a) (m, k) · op(b) (k, n) + beta c, on the calling thread.
template <class Operand, class A>
MOE_INLINE void gemm(int64_t m, int64_t n, int64_t k, Matrix<const Operand> a,
                     Matrix<const Operand> b, A beta, Matrix<A> c) {
  const char trans_a = a.transposed ? 'T' : 'N', trans_b = b.transposed ? 'T' : 'N';
  const int rows = static_cast<int>(m), columns = static_cast<int>(n), depth = static_cast<int>(k);
  const int lda = static_cast<int>(a.stride), ldb = static_cast<int>(b.stride);
  const int ldc = static_cast<int>(c.stride);
  const A alpha = 1;
  Blas::Gemm run = blas.bf16;
  if constexpr (sizeof(Operand) == 4) run = blas.f32;
  if constexpr (sizeof(Operand) == 8) run = blas.f64;
  // A row-major matrix is the transpose of a column-major one: c^T = op(b)^T op(a)^T.
  run(&trans_b, &trans_a, &columns, &rows, &depth, &alpha, b.data, &ldb, a.data, &lda, &beta,
      c.data, &ldc);
}

}  // namespace MOE_ISA
}  // namespace moe
