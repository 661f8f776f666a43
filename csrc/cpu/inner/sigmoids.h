// The epilogue of a tile whose classes count each on its own.
#pragma once

#include "../kernels.h"
#include "arithmetic.h"
#include "tiles.h"

namespace cosface::COSFACE_ISA {
namespace {

template <typename T>
inline T polynomial(const T* k, T c) {
  return (((k[4] * c + k[3]) * c + k[2]) * c + k[1]) * c + k[0];
}

template <typename T, bool kByAngle>
void sigmoid_tile_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                     int64_t first_class, const T* s, const Sigmoid<T> sigmoid, const T* log_sum, const T* g_lse,
                     const T* g_cos, T* col_dot, double* row_dot, double* dscale, double* added, double* mass) {
  T target[kTileRows], dot[kTileRows] = {}, ds[kTileRows] = {}, sum[kTileRows] = {}, p_sum[kTileRows] = {};
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
    T col = 0;
#pragma omp simd reduction(+ : col)
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = target[i] == here;
      const T cos = row[i] * inv;
      const T shaped = kByAngle ? -arccos(cos) : polynomial(sigmoid.value, cos);
      const T logit = s[i] * shaped - log_sum[i], e = exp(logit > 0 ? -logit : logit);
      const T p = (logit > 0 ? T(1) : e) / (1 + e), t = g_lse[i] * p;
      const T g_neg = kByAngle ? t : s[i] * t * polynomial(sigmoid.slope, cos);
      const T g = is_target ? g_cos[i] : g_neg;
      const T adds = kByAngle ? p * cos : (logit > 0 ? logit : T(0)) + log1p(e);
      sum[i] += is_target ? T(0) : adds;
      p_sum[i] += is_target ? T(0) : p;
      if constexpr (!kByAngle) ds[i] += is_target ? T(0) : t * shaped;
      dot[i] += g * cos;
      col += g * cos;
      row[i] = g * inv;
    }
    col_dot[j] += col;
  }
  for (int64_t i = 0; i < n; ++i) {
    row_dot[i] += dot[i];
    dscale[i] += ds[i];
    added[i] += sum[i];
    mass[i] += p_sum[i];
  }
}

template <typename T>
void sigmoid_tile(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                  int64_t first_class, const T* s, const Sigmoid<T>& sigmoid, const T* log_sum, const T* g_lse,
                  const T* g_cos, T* col_dot, double* row_dot, double* dscale, double* added, double* mass) {
  const auto run = sigmoid.by_angle ? sigmoid_tile_of<T, true> : sigmoid_tile_of<T, false>;
  run(z, classes, n, stride, inv_norm, y, first_class, s, sigmoid, log_sum, g_lse, g_cos, col_dot, row_dot, dscale,
      added, mass);
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
