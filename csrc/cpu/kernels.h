// The vectorised inner loops. kernels.cpp is compiled once for every instruction set; a table of pointers selects
// one at run time.
#pragma once

#include <cstdint>

#include "lmcl.h"

namespace cosface {

template <typename T>
struct Kernels {
  // x_hat = x / max(|x|, eps) and inv_norm = 1 / max(|x|, eps) for rows x of length d.
  void (*normalize)(const T* x, int64_t rows, int64_t d, T* x_hat, T* inv_norm);

  void (*inverse_norms)(const T* w, int64_t rows, int64_t d, int64_t row_stride, T* inv_norm);

  // Conversion of n elements to T, and back with round-to-nearest-even.
  void (*load)(const void* from, DType dtype, int64_t n, T* to);
  void (*store)(const T* from, int64_t n, void* to, DType dtype);

  // Online logsumexp of one tile. z (rows, cols) holds <x_hat_i, w_j> and is overwritten by cos_ij; y counts from
  // the tile's first class. Updates row_max_i, the running maximum of cos_ij over j != y_i, and row_sum_i, the
  // running sum of e^{s_i (cos_ij - row_max_i)}; writes target_cos_i where y_i lies in the tile.
  void (*forward_tile)(T* z, int64_t rows, int64_t cols, int64_t stride, const T* inv_norm, const T* s,
                       const int64_t* y, int64_t first_class, T* row_max, T* row_sum, T* target_cos);

  // Gradient of one tile. z (rows, cols) holds <x_hat_i, w_j> and is overwritten by G_ij / |w_j|, where
  // G_ij = s_i g_lse_i e^{z_ij - lse_i} for j != y_i and g_cos_i for j = y_i. Adds sum_i G_ij cos_ij to col_dot_j,
  // sum_j G_ij cos_ij to row_dot_i and sum_{j != y_i} g_lse_i p_ij cos_ij to dscale_i.
  void (*backward_tile)(T* z, int64_t rows, int64_t cols, int64_t stride, const T* inv_norm, const T* s,
                        const int64_t* y, int64_t first_class, const T* lse, const T* g_lse, const T* g_cos,
                        T* col_dot, T* row_dot, T* dscale);

  // dw_j -= col_dot_j w_j / |w_j|^2, the projection; none for a row whose norm was clamped.
  void (*project)(T* dw, const T* w, int64_t rows, int64_t d, int64_t w_stride, const T* inv_norm,
                  const T* col_dot);

  // dx = (dx_hat - row_dot x_hat) / |x|, where dx_hat is the sum of `parts` rows that lie part_stride apart.
  void (*finish_dx)(const T* dx_hat, int64_t parts, int64_t part_stride, const T* x_hat, T row_dot, T inv_norm,
                    int64_t d, T* dx);

  // Elements [4 * 64 * group, ...) of the normal stream, at most n of them.
  void (*normal)(uint64_t seed, uint64_t group, int64_t n, float std, float* to);
};

// The best set that this processor has, or the one named in COSFACE_CPU_ISA; chosen at the first call.
template <typename T>
const Kernels<T>& kernels();

}  // namespace cosface
