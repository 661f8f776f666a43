// The epilogues of a tile: of forward, of backward, and of cosines that are kept.
#pragma once

#include "../kernels.h"
#include "arithmetic.h"

namespace cosface::COSFACE_ISA {
namespace {

// Targets as rows of a tile, -1 for those outside; in T, so that comparing them takes a lane as wide as a number.
template <typename T>
void targets_in_tile(const int64_t* y, int64_t n, int64_t first_class, int64_t classes, T* target) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = y[i] - first_class;
    target[i] = y[i] >= 0 && j >= 0 && j < classes ? static_cast<T>(j) : T(-1);
  }
}

// N(cos) and N'(cos) for a negative of sample i.
template <bool kReshaped, typename T>
inline T reshape(const Negatives<T>& by, int64_t i, T cos) {
  if constexpr (!kReshaped) return cos;
  return cos > by.tau[i] ? (by.q * cos + by.a) * cos + by.b : cos;
}
template <bool kReshaped, typename T>
inline T slope(const Negatives<T>& by, int64_t i, T cos) {
  if constexpr (!kReshaped) return 1;
  return cos > by.tau[i] ? 2 * by.q * cos + by.a : T(1);
}

// The first half of a tile's logsumexp: z becomes N(cos), or stays cos for its entries to be kept, and top the
// running maximum of N(cos).
template <typename T, bool kReshaped, bool kKeeps>
inline void cosines_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                       int64_t first_class, Negatives<T> negatives, const T* row_max, T* max_cos, T* target_cos,
                       T* top) {
  T target[kTileRows];
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t i = 0; i < n; ++i) {
    const auto j = static_cast<int64_t>(target[i]);
    if (j >= 0) target_cos[i] = z[j * stride + i] * inv_norm[j];
    top[i] = row_max[i];
  }
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T cos = target[i] == here ? T(-__builtin_inf()) : row[i] * inv;
      if constexpr (kReshaped) max_cos[i] = cos > max_cos[i] ? cos : max_cos[i];
      const T shaped = reshape<kReshaped>(negatives, i, cos);
      row[i] = kKeeps ? cos : shaped;
      top[i] = shaped > top[i] ? shaped : top[i];  // a nan is passed over here and enters through the sum
    }
  }
}

template <typename T, bool kReshaped>
void forward_tile_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                     int64_t first_class, const T* s, Negatives<T> negatives, T* row_max, T* max_cos,
                     double* row_sum, T* target_cos) {
  T top[kTileRows], sum[kTileRows] = {};
  cosines_of<T, kReshaped, false>(z, classes, n, stride, inv_norm, y, first_class, negatives, row_max, max_cos,
                                  target_cos, top);
  for (int64_t j = 0; j < classes; ++j) {
    const T* cos = z + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += exp(s[i] * (cos[i] - top[i]));
  }
  for (int64_t i = 0; i < n; ++i) {
    row_sum[i] = row_sum[i] * exp(s[i] * (row_max[i] - top[i])) + sum[i];
    row_max[i] = top[i];
  }
}

template <typename T>
void forward_tile(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                  int64_t first_class, const T* s, const Negatives<T>& negatives, T* row_max, T* max_cos,
                  double* row_sum, T* target_cos) {
  (negatives.tau ? forward_tile_of<T, true> : forward_tile_of<T, false>)(z, classes, n, stride, inv_norm, y,
                                                                         first_class, s, negatives, row_max,
                                                                         max_cos, row_sum, target_cos);
}

template <typename T>
int64_t exceeding(const T* z, int64_t n, T inv_norm, const T* limit, uint8_t* where) {
  constexpr int64_t kGroup = 64;  // nearly always without any
  int64_t count = 0;
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t last = first + kGroup < n ? first + kGroup : n;
    T some = 0;
#pragma omp simd reduction(+ : some)
    for (int64_t i = first; i < last; ++i) some += z[i] * inv_norm <= limit[i] ? T(0) : T(1);
    if (some == 0) continue;
    for (int64_t i = first; i < last; ++i) {
      where[count] = static_cast<uint8_t>(i);
      count += !(z[i] * inv_norm <= limit[i]);
    }
  }
  return count;
}

template <typename T, bool kReshaped>
void backward_tile_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                      int64_t first_class, const T* s, Negatives<T> negatives, const T* top, const T* log_sum,
                      const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale) {
  T target[kTileRows], dot[kTileRows] = {}, ds[kTileRows] = {};
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
    T col = 0;
#pragma omp simd reduction(+ : col)
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = target[i] == here;
      const T cos = row[i] * inv;  // rounded as in forward: other uses than the difference keep it out of an fma
      const T shaped = reshape<kReshaped>(negatives, i, cos);
      const T g_neg = g_lse[i] * exp(s[i] * (shaped - top[i]) - log_sum[i]);
      const T p = is_target ? T(0) : g_neg;
      const T g = is_target ? g_cos[i] : s[i] * p * slope<kReshaped>(negatives, i, cos);
      ds[i] += p * shaped;
      dot[i] += g * cos;
      col += g * cos;
      row[i] = g * inv;
    }
    col_dot[j] += col;
  }
  for (int64_t i = 0; i < n; ++i) {
    row_dot[i] += dot[i];
    dscale[i] += ds[i];
  }
}

constexpr float kCosineStep = 1.0f / 32767;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer

inline void keep_row(const float* z, int64_t n, float inv_norm, int16_t* kept) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float shifted = z[i] * inv_norm * 32767.0f + kRoundToInteger;
    kept[i] = static_cast<int16_t>(bit_cast<uint32_t>(shifted));
  }
}
inline void recall_row(const int16_t* kept, int64_t n, float inv_norm, float* z) {
  const float step = inv_norm > 0 ? kCosineStep / inv_norm : 0.0f;  // a norm that overflows makes cosines of 0
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = static_cast<float>(kept[i]) * step;
}
inline void keep_row(const double* z, int64_t n, double, double* kept) {
  for (int64_t i = 0; i < n; ++i) kept[i] = z[i];
}
inline void recall_row(const double* kept, int64_t n, double, double* z) {
  for (int64_t i = 0; i < n; ++i) z[i] = kept[i];
}

template <typename T>
struct KeptOf {
  typedef T type;
};
template <>
struct KeptOf<float> {
  typedef int16_t type;
};
template <typename T>
using Kept = typename KeptOf<T>::type;

template <typename T>
void keep_cosines(const T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, void* kept) {
  for (int64_t j = 0; j < classes; ++j)
    keep_row(z + j * stride, n, inv_norm[j], static_cast<Kept<T>*>(kept) + j * n);
}

template <typename T>
void recall_cosines(const void* kept, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, T* z) {
  for (int64_t j = 0; j < classes; ++j) {
    recall_row(static_cast<const Kept<T>*>(kept) + j * n, n, inv_norm[j], z + j * stride);
  }
}

template <typename T>
void backward_tile(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                   int64_t first_class, const T* s, const Negatives<T>& negatives, const T* top, const T* log_sum,
                   const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale) {
  (negatives.tau ? backward_tile_of<T, true> : backward_tile_of<T, false>)(z, classes, n, stride, inv_norm, y,
                                                                           first_class, s, negatives, top, log_sum,
                                                                           g_lse, g_cos, col_dot, row_dot, dscale);
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
