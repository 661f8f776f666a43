// Several rows of a class: the nearest of them counts, and has the gradient.
#pragma once

#include "../kernels.h"

namespace cosface::COSFACE_ISA {
namespace {

// Class c is written to row c after the rows from cK on were read: upward, none is lost.
template <typename T>
void fold(T* z, int64_t rows, int64_t n, int64_t stride, const T* inv_norm, int64_t subcenters, uint8_t* winner) {
  for (int64_t c = 0; c < rows / subcenters; ++c) {
    const T *own = z + c * subcenters * stride, *inv = inv_norm + c * subcenters;
    T best[kTileRows], place[kTileRows];  // in T, so that comparing takes a lane as wide as a number
    for (int64_t i = 0; i < n; ++i) best[i] = own[i] * inv[0], place[i] = 0;
    for (int64_t k = 1; k < subcenters; ++k) {
      const T *row = own + k * stride, here = static_cast<T>(k), factor = inv[k];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T cos = row[i] * factor;
        const bool nearer = (cos > best[i]) | ((cos != cos) & (best[i] == best[i]));
        best[i] = nearer ? cos : best[i];
        place[i] = nearer ? here : place[i];
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      z[c * stride + i] = best[i];
      winner[c * kTileRows + i] = static_cast<uint8_t>(place[i]);
    }
  }
}

// Downward, likewise.
template <typename T>
void unfold(T* g, int64_t rows, int64_t n, int64_t stride, const T* inv_norm, int64_t subcenters,
            const uint8_t* winner, const T* cos, T* col_dot) {
  for (int64_t c = rows / subcenters - 1; c >= 0; --c) {
    T own[kTileRows], along[kTileRows], place[kTileRows];
    for (int64_t i = 0; i < n; ++i) {
      own[i] = g[c * stride + i];
      along[i] = own[i] * cos[c * stride + i];
      place[i] = static_cast<T>(winner[c * kTileRows + i]);
    }
    for (int64_t j = c * subcenters; j < (c + 1) * subcenters; ++j) {
      T *row = g + j * stride, here = static_cast<T>(j - c * subcenters), inv = inv_norm[j], col = 0;
#pragma omp simd reduction(+ : col)
      for (int64_t i = 0; i < n; ++i) {
        const bool won = place[i] == here;
        row[i] = won ? own[i] * inv : T(0);
        col += won ? along[i] : T(0);
      }
      col_dot[j] += col;
    }
  }
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
