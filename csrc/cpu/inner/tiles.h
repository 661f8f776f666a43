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
  const T low = cos > T(-__builtin_inf()) ? by.r * cos : cos;  // of a target, which is to stay out, also by r = 0
  return cos > by.tau[i] ? (by.q * cos + by.a) * cos + by.b : low;
}
template <bool kReshaped, typename T>
inline T slope(const Negatives<T>& by, int64_t i, T cos) {
  if constexpr (!kReshaped) return 1;
  return cos > by.tau[i] ? by.u * cos + by.v : by.r;
}

// Targets of the tile, whose cosines go to target_cos.
template <typename T>
void find_targets(const T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                  int64_t first_class, T* target_cos, T* target) {
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t i = 0; i < n; ++i) {
    const auto j = static_cast<int64_t>(target[i]);
    if (j >= 0) target_cos[i] = z[j * stride + i] * inv_norm[j];
  }
}

// The first half of a tile's logsumexp: z becomes N(cos), or stays cos for its entries to be kept, and top the
// running maximum of N(cos).
template <typename T, bool kReshaped, bool kKeeps>
inline void cosines_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                       int64_t first_class, Negatives<T> negatives, const T* row_max, T* max_cos, T* target_cos,
                       T* top) {
  T target[kTileRows];
  find_targets(z, classes, n, stride, inv_norm, y, first_class, target_cos, target);
  for (int64_t i = 0; i < n; ++i) top[i] = row_max[i];
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

template <typename T, bool kReshaped>
void forward_moments_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                        int64_t first_class, const T* s, Negatives<T> negatives, T* row_max, T* max_cos,
                        double* row_sum, T* target_cos, const MomentSums<T>& moments) {
  T target[kTileRows], second[kTileRows], top[kTileRows];
  find_targets(z, classes, n, stride, inv_norm, y, first_class, target_cos, target);
  if (moments.second != nullptr) {
    find_targets(z, classes, n, stride, inv_norm, moments.second, first_class, moments.second_cos, second);
  } else {
    for (int64_t i = 0; i < n; ++i) second[i] = T(-1);
  }
  T all[kTileRows] = {}, hard_sum[kTileRows] = {}, hard_count[kTileRows] = {};
  for (int64_t i = 0; i < n; ++i) top[i] = row_max[i];
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = (target[i] == here) | (second[i] == here);
      const T given = row[i] * inv, cos = is_target ? T(-__builtin_inf()) : given;
      const T shaped = reshape<kReshaped>(negatives, i, cos);
      if constexpr (kReshaped) {
        max_cos[i] = cos > max_cos[i] ? cos : max_cos[i];
        const bool hard = cos > negatives.tau[i];
        hard_sum[i] += hard ? cos : T(0);
        hard_count[i] += hard ? T(1) : T(0);
      }
      all[i] += is_target ? T(0) : shaped;
      row[i] = shaped;
      top[i] = shaped > top[i] ? shaped : top[i];
    }
  }
  T sum[kTileRows] = {}, below[kTileRows] = {};
  for (int64_t j = 0; j < classes; ++j) {
    const T *cos = z + j * stride, here = static_cast<T>(j);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = (target[i] == here) | (second[i] == here);
      const T under = top[i] - cos[i], e = exp(-s[i] * under);
      sum[i] += e;
      below[i] += is_target ? T(0) : e * under;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const double risen = double{top[i]} - double{row_max[i]}, factor = exp(s[i] * (row_max[i] - top[i]));
    moments.below[i] = factor * (moments.below[i] + row_sum[i] * risen) + below[i];
    moments.sum[i] += all[i];
    moments.hard_sum[i] += hard_sum[i];
    moments.hard_count[i] += hard_count[i];
    row_sum[i] = row_sum[i] * factor + sum[i];
    row_max[i] = top[i];
  }
}

template <typename T>
void forward_moments(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                     int64_t first_class, const T* s, const Negatives<T>& negatives, T* row_max, T* max_cos,
                     double* row_sum, T* target_cos, const MomentSums<T>& moments) {
  const auto run = negatives.tau ? forward_moments_of<T, true> : forward_moments_of<T, false>;
  run(z, classes, n, stride, inv_norm, y, first_class, s, negatives, row_max, max_cos, row_sum, target_cos,
      moments);
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

// With kMoments, as Kernels::backward_moments; without, nothing of `moments` is read.
template <typename T, bool kReshaped, bool kMoments>
void backward_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                 int64_t first_class, const T* s, Negatives<T> negatives, const T* top, const T* log_sum,
                 const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale,
                 const MomentGradients<T>& moments) {
  T target[kTileRows], second[kTileRows], g_second[kTileRows], dot[kTileRows] = {}, ds[kTileRows] = {};
  const T *b = moments.b, *c = moments.c;
  targets_in_tile(y, n, first_class, classes, target);
  if constexpr (kMoments) {
    const bool some = moments.second != nullptr;
    if (some) targets_in_tile(moments.second, n, first_class, classes, second);
    for (int64_t i = 0; i < n; ++i) {
      if (!some) second[i] = T(-1);
      g_second[i] = some ? moments.g_second_cos[i] : T(0);
    }
  }
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
    T col = 0;
#pragma omp simd reduction(+ : col)
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = target[i] == here;
      const T cos = row[i] * inv;  // rounded as in forward: other uses than the difference keep it out of an fma
      const T shaped = reshape<kReshaped>(negatives, i, cos), steep = slope<kReshaped>(negatives, i, cos);
      T t, g;  // what dscale has as a factor, and G
      if constexpr (kMoments) {
        const bool is_second = second[i] == here;
        const T from_top = shaped - top[i], p = exp(s[i] * from_top - log_sum[i]);
        const T t_neg = (g_lse[i] + b[i] * from_top) * p;
        const T g_neg = (s[i] * t_neg + b[i] * p + c[i]) * steep, g_other = is_second ? g_second[i] : g_neg;
        t = (is_target | is_second) ? T(0) : t_neg;
        g = is_target ? g_cos[i] : g_other;
      } else {
        const T g_neg = g_lse[i] * exp(s[i] * (shaped - top[i]) - log_sum[i]);
        t = is_target ? T(0) : g_neg;
        g = is_target ? g_cos[i] : s[i] * t * steep;
      }
      ds[i] += t * shaped;
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

template <typename T>
void backward_moments(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                      int64_t first_class, const T* s, const Negatives<T>& negatives, const T* top,
                      const T* log_sum, const T* g_lse, const T* g_cos, T* col_dot, double* row_dot,
                      double* dscale, const MomentGradients<T>& moments) {
  const auto run = negatives.tau ? backward_of<T, true, true> : backward_of<T, false, true>;
  run(z, classes, n, stride, inv_norm, y, first_class, s, negatives, top, log_sum, g_lse, g_cos, col_dot, row_dot,
      dscale, moments);
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
  const auto run = negatives.tau ? backward_of<T, true, false> : backward_of<T, false, false>;
  run(z, classes, n, stride, inv_norm, y, first_class, s, negatives, top, log_sum, g_lse, g_cos, col_dot, row_dot,
      dscale, {});
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
