// What ends a gradient: projections, steps of optimizers, sums over threads.
#pragma once

#include "../kernels.h"
#include "arithmetic.h"

namespace cosface::COSFACE_ISA {
namespace {

template <typename T>
void project(T* __restrict dw, const T* __restrict w, int64_t d, T projection) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) dw[k] -= projection * w[k];
}

// Where nothing is projected, what w holds is no matter: 0 times infinity is nan.
template <typename T>
inline T projected(T dw, T projection, T w) {
  return projection == 0 ? dw : dw - projection * w;
}

template <typename T>
T gradient_norm(RowGradient<T> g, const T* __restrict w, int64_t d) {
  const T* __restrict dw = g.dw;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * projected(dw[k], g.projection, w[k]);
    sum += v * v;
  }
  return sqrt(sum);
}

template <typename T>
void sgd(RowGradient<T> g, T* __restrict w, T* __restrict momentum, int64_t d, const SgdStep<T>& step) {
  const T* __restrict dw = g.dw;
  const SgdStep<T> s = step;
  if (momentum == nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) {
      w[k] -= s.lr * (g.factor * projected(dw[k], g.projection, w[k]) + s.weight_decay * w[k]);
    }
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * projected(dw[k], g.projection, w[k]) + s.weight_decay * w[k];
    const T mean = s.momentum * momentum[k] + s.fresh * v;
    momentum[k] = mean;
    w[k] -= s.lr * (s.from_g * v + s.from_mean * mean);
  }
}

template <typename T, bool kMax>
void adamw_row(RowGradient<T> g, T* __restrict w, T* __restrict mean, T* __restrict square,
               T* __restrict max_square, int64_t d, const AdamWStep<T>& step) {
  const T* __restrict dw = g.dw;
  const AdamWStep<T> s = step;
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * projected(dw[k], g.projection, w[k]);
    const T m = mean[k] + s.fresh1 * (v - mean[k]);
    T q = s.beta2 * square[k] + s.fresh2 * v * v;
    mean[k] = m;
    square[k] = q;
    if (kMax) max_square[k] = q = max_square[k] > q ? max_square[k] : q;
    w[k] = s.kept * w[k] - s.step_size * m / (sqrt(q) / s.root_correction + s.eps);
  }
}

template <typename T>
void adamw(RowGradient<T> g, T* w, T* mean, T* square, T* max_square, int64_t d, const AdamWStep<T>& step) {
  (max_square ? adamw_row<T, true> : adamw_row<T, false>)(g, w, mean, square, max_square, d, step);
}

template <typename T>
void finish_dx(const T* dx_hat, int64_t parts, int64_t part_stride, const T* x, T row_dot, T inv_norm, int64_t d,
               T* dx) {
  const T dot = inv_norm >= 1 / T(kEps) ? 0 : row_dot;
  for (int64_t k = 0; k < d; ++k) {
    T sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += dx_hat[part * part_stride + k];
    dx[k] = (sum - dot * (x[k] * inv_norm)) * inv_norm;
  }
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
