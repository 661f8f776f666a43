// Entries of the softmax that are kept for a sparse backward.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../kernels.h"
#include "products.h"
#include "tiles.h"

namespace cosface::COSFACE_ISA {
namespace {

#if defined(__AVX512F__)
// Keeps the cosines of 16 that are above cut as they are shaped; returns how many that are.
inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, __m512i places, float* kept,
                           Place* to) {
  const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(shaped), _mm512_loadu_ps(cut), _CMP_GT_OQ);
  if (above == 0) return 0;
  const __m512i chosen = _mm512_maskz_compress_epi32(above, places);
  _mm512_storeu_ps(kept, _mm512_maskz_compress_ps(above, _mm512_loadu_ps(cos)));
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, chosen));
  return __builtin_popcount(above);
}

// Their places are place, place + 1, ...
inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, uint32_t place, float* kept,
                           Place* to) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(place)), lanes);
  return keep_vector(cos, shaped, cut, places, kept, to);
}

inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, const Place* places,
                           float* kept, Place* to) {
  const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(places));
  return keep_vector(cos, shaped, cut, _mm512_maskz_cvtepu16_epi32(0xffff, own), kept, to);
}
#endif

template <typename T>
inline int64_t keep_vector(const T* cos, const T* shaped, const T* cut, uint32_t place, T* kept, Place* places) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int l = 0; l < 16; ++l) any |= shaped[l] > cut[l];
  if (any == 0) return 0;
  int64_t count = 0;
  for (uint32_t l = 0; l < 16; ++l) {
    kept[count] = cos[l];
    places[count] = static_cast<Place>(place + l);
    count += shaped[l] > cut[l];
  }
  return count;
}

template <typename T>
inline int64_t keep_vector(const T* cos, const T* shaped, const T* cut, const Place* places, T* kept, Place* to) {
  int64_t count = 0;
  for (int64_t l = 0; l < 16; ++l) {  // kept and `to` may be where the cosines and the places are
    const T value = cos[l];
    const Place place = places[l];
    const bool above = shaped[l] > cut[l];
    kept[count] = value;
    to[count] = place;
    count += above;
  }
  return count;
}

template <typename T, bool kReshaped>
int64_t forward_and_keep(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                         int64_t first_class, const T* s, Negatives<T> negatives, T* row_max, T* max_cos,
                         double* row_sum, T* target_cos, const T* cut, double* tail, T* kept, Place* place) {
  T top[kTileRows], sum[kTileRows] = {}, dropped[kTileRows] = {}, above[kTileRows], shaped_row[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) above[i] = i < n ? cut[i] : T(__builtin_inf());
  cosines_of<T, kReshaped, true>(z, classes, n, stride, inv_norm, y, first_class, negatives, row_max, max_cos,
                                 target_cos, top);
  const int64_t whole = n / 16 * 16;
  int64_t count = 0;
  for (int64_t j = 0; j < classes; ++j) {
    const T *cos = z + j * stride, *shaped = kReshaped ? shaped_row : cos;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T value = reshape<kReshaped>(negatives, i, cos[i]), e = exp(s[i] * (value - top[i]));
      sum[i] += e;
      dropped[i] += value > above[i] ? T(0) : e;  // a nan is not above, and enters
      if constexpr (kReshaped) shaped_row[i] = value;
    }
    const auto first = static_cast<uint32_t>(j << 8);
    for (int64_t i = 0; i < whole; i += 16) {
      count += keep_vector(cos + i, shaped + i, above + i, first + static_cast<uint32_t>(i), kept + count,
                           place + count);
    }
    for (int64_t i = whole; i < n; ++i) {
      kept[count] = cos[i];
      place[count] = static_cast<Place>((j << 8) + i);
      count += shaped[i] > above[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const T shrink = exp(s[i] * (row_max[i] - top[i]));
    row_sum[i] = row_sum[i] * shrink + sum[i];
    tail[i] = tail[i] * shrink + dropped[i];
    row_max[i] = top[i];
  }
  return count;
}

// The loops over entries compute kBatch of them with vectors, which read the samples' numbers by index, and then
// add up one after the other.
constexpr int64_t kBatch = 64;

template <typename T, bool kReshaped>
void tally(const T* kept, const Place* place, int64_t count, const T* s, Negatives<T> negatives, const T* top,
           uint32_t* bins) {
  int32_t bin[kBatch];
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
#pragma omp simd
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T shaped = reshape<kReshaped>(negatives, i, kept[first + k]);
      const T distance = s[i] * (top[i] - shaped) * T(kBinsPerNat);
      const T near = distance < T(kBins - 1) ? distance : T(kBins - 1);  // so that nan is far
      bin[k] = i * static_cast<int32_t>(kBins) + static_cast<int32_t>(near > 0 ? near : T(0));
    }
    for (int64_t k = 0; k < some; ++k) ++bins[bin[k]];
  }
}

template <typename T, bool kReshaped>
int64_t prune(const T* kept, const Place* place, int64_t count, const T* cut, const T* s, Negatives<T> negatives,
              const T* top, double* tail, uint32_t* row_count, T* to_kept, Place* to_place) {
  T limit[kBatch], e[kBatch], shaped_batch[kBatch];
  int32_t below[kBatch];
  int64_t left = 0;
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
    const T* shaped = kReshaped ? shaped_batch : kept + first;
    int32_t any = 0;
#pragma omp simd reduction(+ : any)
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T value = reshape<kReshaped>(negatives, i, kept[first + k]);
      const T least = cut[i], mass = exp(s[i] * (value - top[i]));
      limit[k] = least;
      e[k] = value > least ? T(0) : mass;
      below[k] = value > least ? 0 : 1;
      any += value > least ? 0 : 1;
      if constexpr (kReshaped) shaped_batch[k] = value;
    }
    for (int64_t k = 0; any != 0 && k < some; ++k) {
      const int64_t i = place[first + k] & 255;
      tail[i] += e[k];
      row_count[i] -= static_cast<uint32_t>(below[k]);
    }
    int64_t k = 0;
    for (; k + 16 <= some; k += 16) {
      left +=
          keep_vector(kept + first + k, shaped + k, limit + k, place + first + k, to_kept + left, to_place + left);
    }
    for (; k < some; ++k) {
      const bool above = shaped[k] > limit[k];
      to_kept[left] = kept[first + k];
      to_place[left] = place[first + k];
      left += above;
    }
  }
  return left;
}

template <typename T, bool kReshaped>
int64_t gradients(const T* kept, const Place* place, int64_t count, const T* inv_norm, const T* s,
                  Negatives<T> negatives, const T* top, const T* log_sum, const T* g_lse, T* col_dot,
                  double* row_dot, double* dscale, T* g, uint8_t* classes, uint8_t* samples) {
  T p[kBatch];
  int64_t left = 0;
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
#pragma omp simd
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T shaped = reshape<kReshaped>(negatives, i, kept[first + k]);
      p[k] = g_lse[i] * exp(s[i] * (shaped - top[i]) - log_sum[i]);
    }
    for (int64_t k = 0; k < some; ++k) {
      const int64_t i = place[first + k] & 255, j = place[first + k] >> 8;
      if (g_lse[i] == 0) continue;
      const T cos = kept[first + k], steep = p[k] * slope<kReshaped>(negatives, i, cos), along = steep * cos;
      dscale[i] += p[k] * reshape<kReshaped>(negatives, i, cos);
      col_dot[j] += s[i] * along;
      if constexpr (kReshaped) row_dot[i] += s[i] * along;
      g[left] = s[i] * steep * inv_norm[j];
      classes[left] = static_cast<uint8_t>(j);
      samples[left++] = static_cast<uint8_t>(i);
    }
  }
  return left;
}

// kVectors of the sum stay in registers while the rows pass by, the next on its way from L2.
template <typename T, int kVectors>
inline void weighted_sum_of(const T* rows, int64_t stride, const uint8_t* index, const T* factor, int64_t count,
                            T* to, bool accumulate) {
  Vector<T> sum[kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* row = rows + index[k] * stride;
    const T* next = rows + index[k + 1 < count ? k + 1 : k] * stride;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(next + v * kLanes<T>);
      sum[v] += factor[k] * *reinterpret_cast<const Vector<T>*>(row + v * kLanes<T>);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    auto* out = reinterpret_cast<Vector<T>*>(to + v * kLanes<T>);
    *out = accumulate ? *out + sum[v] : sum[v];
  }
}

template <typename T>
void weighted_sum(const T* rows, int64_t stride, const uint8_t* index, const T* factor, int64_t count,
                  int64_t width, T* to, bool accumulate) {
  constexpr int kMany = kVectorBytes == 64 ? 16 : 8;
  int64_t k = 0;
  for (; k + kMany * kLanes<T> <= width; k += kMany * kLanes<T>) {
    weighted_sum_of<T, kMany>(rows + k, stride, index, factor, count, to + k, accumulate);
  }
  for (; k < width; k += kPanel<T>) {
    weighted_sum_of<T, 2>(rows + k, stride, index, factor, count, to + k, accumulate);
  }
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
