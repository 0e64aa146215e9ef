// A product of bf16 operands with the instruction that multiplies pairs of them (AVX512-BF16), for
// processors without tiles (AMX): the BLAS in PyTorch converts to fp32 there.
//
// c = left · right, row by row. A register tile of 6 rows and 64 columns is summed over the pairs
// of a block of k; the order of a sum depends on k alone, so a row has the same bits in every
// product. `right` is packed as the instruction wants it, two rows interleaved; `left` is read
// where it lies when its pairs lie together, else interleaved likewise. Subnormal operands count as
// zero.
#include "kernels.hpp"
#include "scratch.hpp"

#if defined(MOE_ISA_AVX512) && (defined(__clang__) || __GNUC__ >= 10)
#define MOE_HAS_PAIRS 1
#endif

namespace moe {
namespace MOE_ISA {

#if defined(MOE_HAS_PAIRS)
namespace {

#define MOE_PAIRS __attribute__((target("avx512bf16")))

constexpr int kLanes = 16;
constexpr int kTileRows = 6, kTileVectors = 4;
constexpr int64_t kPanel = kTileVectors * kLanes;  // columns that are packed together
constexpr int64_t kDepth = 512;                    // of a block of k, even
constexpr int64_t kRows = 384;                     // of a block of left, whole tiles

struct Operand {
  const uint16_t* data;
  int64_t stride;
  bool transposed;
  // Of the product's rows (left) or of k (right) along the outer dimension of memory.
  const uint16_t* at(int64_t row, int64_t column) const {
    return transposed ? data + column * stride + row : data + row * stride + column;
  }
};

// Pairs of left: number p of row i is at data + i * row_step + p * pair_step.
struct Pairs {
  const uint16_t* data;
  int64_t row_step, pair_step;
};

MOE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1U << count) - 1);
}

MOE_INLINE __m512i interleave_halves(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

// to[2 i] = low[i], to[2 i + 1] = high[i] or 0; up to the next multiple of 16 with zeros.
MOE_INLINE void interleave_rows(uint16_t* to, const uint16_t* low, const uint16_t* high,
                                int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const __mmask16 mask = first_lanes(count - i);
    const __m256i a = _mm256_maskz_loadu_epi16(mask, low + i);
    const __m256i b = high ? _mm256_maskz_loadu_epi16(mask, high + i) : _mm256_setzero_si256();
    _mm512_store_si512(to + 2 * i, interleave_halves(a, b));
  }
}

MOE_INLINE void transpose_16x16(__m512i (&v)[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

// Rows [k, k + depth) and columns [n, n + columns) of right: for each pair of rows the columns'
// pairs, filled up with zeros to whole vectors.
MOE_INLINE void pack_right(uint16_t* to, const Operand& right, int64_t k, int64_t depth, int64_t n,
                           int64_t columns) {
  const int64_t step = 2 * ceil_div(columns, kLanes) * kLanes;
  if (!right.transposed) {
    for (int64_t row = 0; row < depth; row += 2, to += step) {
      const uint16_t* second = row + 1 < depth ? right.at(k + row + 1, n) : nullptr;
      interleave_rows(to, right.at(k + row, n), second, columns);
    }
    return;
  }
  for (int64_t row = 0; row < depth; row += 2 * kLanes) {
    const int64_t rows = min_of(depth - row, 2 * kLanes);
    const __mmask32 mask = rows == 32 ? 0xFFFFFFFFU : (1U << rows) - 1;
    for (int64_t column = 0; column < columns; column += kLanes) {
      __m512i block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = column + i < columns
                       ? _mm512_maskz_loadu_epi16(mask, right.at(k + row, n + column + i))
                       : _mm512_setzero_si512();
      }
      transpose_16x16(block);
      uint16_t* first = to + row / 2 * step + 2 * column;
      for (int64_t pair = 0; 2 * pair < rows; ++pair) {
        _mm512_store_si512(first + pair * step, block[pair]);
      }
    }
  }
}

// Rows [m, m + rows) and columns [k, k + depth) of left.
MOE_INLINE Pairs pairs_of_left(uint16_t* to, const Operand& left, int64_t m, int64_t rows,
                               int64_t k, int64_t depth) {
  if (left.transposed) {
    const int64_t step = 2 * ceil_div(rows, kLanes) * kLanes;
    for (int64_t column = 0; column < depth; column += 2) {
      const uint16_t* second = column + 1 < depth ? left.at(m, k + column + 1) : nullptr;
      interleave_rows(to + column / 2 * step, left.at(m, k + column), second, rows);
    }
    return {to, 2, step};
  }
  if (depth % 2 == 0) return {left.at(m, k), left.stride, 2};
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * (depth + 1), left.at(m + row, k), depth * sizeof(uint16_t));
    to[row * (depth + 1) + depth] = 0;
  }
  return {to, depth + 1, 2};
}

// c (Rows, Vectors * 16), the last vector up to `last`, = left · right + beta c.
template <int Rows, int Vectors>
MOE_PAIRS void tile(const Pairs& left, const uint16_t* right, int64_t pairs, float beta, float* c,
                    int64_t stride, __mmask16 last) {
  __m512 sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm512_setzero_ps();
  }
  const uint16_t* from = left.data;
  for (int64_t p = 0; p < pairs; ++p, from += left.pair_step, right += Vectors * 2 * kLanes) {
    __m512i columns[Vectors];
    for (int v = 0; v < Vectors; ++v) columns[v] = _mm512_load_si512(right + v * 2 * kLanes);
    for (int i = 0; i < Rows; ++i) {
      int32_t pair;
      std::memcpy(&pair, from + i * left.row_step, sizeof(pair));
      const __m512i repeated = _mm512_set1_epi32(pair);
      for (int v = 0; v < Vectors; ++v) {
        sums[i][v] = _mm512_dpbf16_ps(sums[i][v], (__m512bh)repeated, (__m512bh)columns[v]);
      }
    }
  }
  const __m512 factor = _mm512_set1_ps(beta);
  for (int i = 0; i < Rows; ++i) {
    for (int v = 0; v < Vectors; ++v) {
      float* to = c + i * stride + v * kLanes;
      const __mmask16 mask = v == Vectors - 1 ? last : 0xFFFF;
      if (beta != 0) {
        sums[i][v] = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask, to), sums[i][v]);
      }
      _mm512_mask_storeu_ps(to, mask, sums[i][v]);
    }
  }
}

template <int Vectors>
MOE_PAIRS void tiles(Pairs left, const uint16_t* right, int64_t rows, int64_t pairs, float beta,
                     float* c, int64_t stride, __mmask16 last) {
  for (; rows >= kTileRows; rows -= kTileRows) {
    tile<kTileRows, Vectors>(left, right, pairs, beta, c, stride, last);
    left.data += kTileRows * left.row_step;
    c += kTileRows * stride;
  }
  switch (rows) {
    case 5:
      return tile<5, Vectors>(left, right, pairs, beta, c, stride, last);
    case 4:
      return tile<4, Vectors>(left, right, pairs, beta, c, stride, last);
    case 3:
      return tile<3, Vectors>(left, right, pairs, beta, c, stride, last);
    case 2:
      return tile<2, Vectors>(left, right, pairs, beta, c, stride, last);
    case 1:
      return tile<1, Vectors>(left, right, pairs, beta, c, stride, last);
    default:
      return;
  }
}

MOE_PAIRS void panel(const Pairs& left, const uint16_t* right, int64_t rows, int64_t columns,
                     int64_t pairs, float beta, float* c, int64_t stride) {
  const int64_t vectors = ceil_div(columns, kLanes);
  const __mmask16 last = first_lanes(columns - (vectors - 1) * kLanes);
  switch (vectors) {
    case 4:
      return tiles<4>(left, right, rows, pairs, beta, c, stride, last);
    case 3:
      return tiles<3>(left, right, rows, pairs, beta, c, stride, last);
    case 2:
      return tiles<2>(left, right, rows, pairs, beta, c, stride, last);
    default:
      return tiles<1>(left, right, rows, pairs, beta, c, stride, last);
  }
}

// Arguments as those of a BLAS, column-major; `alpha` is 1. A column-major matrix is the transpose
// of a row-major one: c^T = op(b)^T op(a)^T.
void multiply(const char* trans_a, const char* trans_b, const int* m, const int* n, const int* k,
              const void*, const void* a, const int* lda, const void* b, const int* ldb,
              const void* beta, void* c, const int* ldc) {
  const Operand left{static_cast<const uint16_t*>(b), *ldb, *trans_b == 'T'};
  const Operand right{static_cast<const uint16_t*>(a), *lda, *trans_a == 'T'};
  const int64_t rows = *n, columns = *m, inner = *k, stride = *ldc;
  float factor = *static_cast<const float*>(beta);
  float* out = static_cast<float*>(c);
  const int64_t of_left = aligned_bytes<uint16_t>((kRows + kLanes) * (kDepth + 2));
  const Scratch scratch(of_left + aligned_bytes<uint16_t>(kPanel * kDepth));
  uint16_t* packed_left = scratch.as<uint16_t>();
  uint16_t* packed_right = packed_left + of_left / static_cast<int64_t>(sizeof(uint16_t));

  // At least one block: a sum of no terms still writes c.
  for (int64_t from = 0; from == 0 || from < inner; from += kDepth, factor = 1) {
    const int64_t depth = min_of(inner - from, kDepth);
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t height = min_of(rows - row, kRows);
      const Pairs pairs = pairs_of_left(packed_left, left, row, height, from, depth);
      for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t width = min_of(columns - column, kPanel);
        pack_right(packed_right, right, from, depth, column, width);
        panel(pairs, packed_right, height, width, ceil_div(depth, 2), factor,
              out + row * stride + column, stride);
      }
    }
  }
}

}  // namespace

Blas::Gemm gemm_bf16() { return __builtin_cpu_supports("avx512bf16") ? multiply : nullptr; }
#else
Blas::Gemm gemm_bf16() { return nullptr; }
#endif

}  // namespace MOE_ISA
}  // namespace moe
