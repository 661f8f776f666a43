// Products of matrices.
#pragma once

#include "../kernels.h"
#include "arithmetic.h"

namespace cosface::COSFACE_ISA {
namespace {

// A block of kBlockRows x 2 vectors of c stays in registers while a runs down the depth: each step loads two
// vectors of b and as many numbers of a as there are rows. a is read in place, and b is made in panels, once per
// call (x_hat) or per tile (w). With w read in place, one core of a Xeon with AVX-512 did 160 to 166 GFLOP/s on a
// tile's three products, where one library call for each did 125 to 140, because it packs both sides again for
// every tile.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kBlockRows = 14;  // 28 + 2 of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kBlockRows = 6;  // 12 + 3 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kBlockRows = 12;  // 24 + 3 of 32
#else
constexpr int kVectorBytes = 16, kBlockRows = 6;  // 12 + 4 of 16
#endif

// While a block computes, the class rows of the next tile come into L2: a line of 64 bytes every 8 steps is what a
// product with 256 samples needs to fetch one tile during another.
constexpr int64_t kCacheLine = 64, kStepsPerLine = 8;
constexpr int64_t kDepth = 256;  // a panel of b, 256 x 2 vectors, stays in an L1 of 32 KiB

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// c (kRows, kPanel) = a b or c += a b. A row of a is found from the first of its group of four, so that the
// addresses fit into registers; kAdjacent says that its rows are adjacent numbers.
template <typename T, int kRows, bool kAdjacent>
void block(const T* a, int64_t row_stride, int64_t a_step, const T* b, int64_t b_step, int64_t depth, T* c,
           int64_t c_stride, bool accumulate, uintptr_t ahead) {
  constexpr int kGroups = (kRows + 3) / 4;
  if (kAdjacent) row_stride = 1;
  Vector<T> sum[kRows][2] = {};
  const T* groups[kGroups];
  for (int g = 0; g < kGroups; ++g) groups[g] = a + 4 * g * row_stride;
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    if (k % kStepsPerLine == 0) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + k / kStepsPerLine * kCacheLine), 0, 2);
    }
    const auto b0 = *reinterpret_cast<const Vector<T>*>(b);
    const auto b1 = *reinterpret_cast<const Vector<T>*>(b + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T v = groups[r / 4][(r % 4) * row_stride];
      sum[r][0] += v * b0;
      sum[r][1] += v * b1;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) groups[g] += a_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    auto* out = reinterpret_cast<Vector<T>*>(c + r * c_stride);
    auto* out1 = reinterpret_cast<Vector<T>*>(c + r * c_stride + kLanes<T>);
    *out = accumulate ? *out + sum[r][0] : sum[r][0];
    *out1 = accumulate ? *out1 + sum[r][1] : sum[r][1];
  }
}

// block() for the rows that are left over: rows in [1, kRows].
template <typename T, int kRows, bool kAdjacent, typename... Args>
inline void block_of(int64_t rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return block_of<T, kRows - 1, kAdjacent>(rows, args...);
  }
  block<T, kRows, kAdjacent>(args...);
}

template <typename T>
void matmul(Left<T> a, Right<T> b, T* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth,
            bool accumulate, Ahead ahead) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t q = 0; q * kPanel<T> < cols; ++q) {
      const T* panel = b.data + q * b.panel_stride + k * b.depth_stride;
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        const T* first = a.data + i * a.row_stride + k * a.depth_stride;
        T* out = c + i * c_stride + q * kPanel<T>;
        const int64_t left = rows - i;
        const uintptr_t next = ahead.first < ahead.last ? ahead.first : reinterpret_cast<uintptr_t>(out);
        ahead.first += steps / kStepsPerLine * kCacheLine;
        if (a.row_stride == 1) {
          block_of<T, kBlockRows, true>(left, first, 1, a.depth_stride, panel, b.depth_stride, steps, out,
                                        c_stride, accumulate || k > 0, next);
        } else {
          block_of<T, kBlockRows, false>(left, first, a.row_stride, 1, panel, b.depth_stride, steps, out, c_stride,
                                         accumulate || k > 0, next);
        }
      }
    }
  }
}

template <typename T>
void pack_transposed(const T* v, int64_t rows, int64_t d, int64_t stride, T* to) {
  constexpr int64_t kColumns = 8;  // at a time, so that what is read and what is written is in adjacent numbers
  for (int64_t first = 0; first < rows; first += kPanel<T>, to += d * kPanel<T>) {
    const int64_t some = rows - first < kPanel<T> ? rows - first : kPanel<T>;
    for (int64_t k = 0; k < d; k += kColumns) {
      const int64_t columns = d - k < kColumns ? d - k : kColumns;
      for (int64_t l = 0; l < kPanel<T>; ++l) {
        const T* row = v + (first + l) * stride + k;
        T* out = to + k * kPanel<T> + l;
        for (int64_t c = 0; c < columns; ++c) out[c * kPanel<T>] = l < some ? row[c] : T(0);
      }
    }
  }
}

template <typename T>
void pack(const T* v, int64_t rows, int64_t width, int64_t stride, T* to, int64_t panel_stride) {
  for (int64_t k = 0; k < width; k += kPanel<T>, to += panel_stride) {
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t l = 0; l < kPanel<T>; l += kLanes<T>) {
        *reinterpret_cast<Vector<T>*>(to + j * kPanel<T> + l) =
            *reinterpret_cast<const Vector<T>*>(v + j * stride + k + l);
      }
    }
  }
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
