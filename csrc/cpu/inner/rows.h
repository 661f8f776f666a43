// Norms of rows, and conversions of their numbers.
#pragma once

#include "../kernels.h"
#include "arithmetic.h"
#include "float8.h"
#include "products.h"

namespace cosface::COSFACE_ISA {
namespace {

// Four chains of sums: one would wait for each addition.
template <typename T>
inline T sum_of_squares(const T* v, int64_t d) {
  Vector<T> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes<T> <= d; k += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto part = *reinterpret_cast<const Vector<T>*>(v + k + c * kLanes<T>);
      sums[c] += part * part;
    }
  }
  const Vector<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += total[l];
  for (; k < d; ++k) sum += v[k] * v[k];
  return sum;
}

template <typename T>
inline T inverse_norm(const T* v, int64_t d) {
  T norm = sqrt(sum_of_squares(v, d));
  return 1 / (norm < T(kEps) ? T(kEps) : norm);
}

template <typename T>
void inverse_norms(const T* w, int64_t rows, int64_t d, int64_t stride, T* inv_norm) {
  for (int64_t j = 0; j < rows; ++j) inv_norm[j] = inverse_norm(w + j * stride, d);
}

template <typename T>
void normalize(const T* x, int64_t d, T* x_hat, T* inv_norm) {
  *inv_norm = inverse_norm(x, d);
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) x_hat[k] = x[k] * *inv_norm;
}

inline float from_bfloat16(uint16_t h) { return bit_cast<float>(uint32_t{h} << 16); }

inline uint16_t to_bfloat16(float v) {
  uint32_t bits = bit_cast<uint32_t>(v);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

// The steps below the smallest normal half, 2^-14, are those above it. No number on the way is a subnormal float,
// which a processor may take for 0 (torch.set_flush_denormal).
inline float from_float16(uint16_t h) {
  const uint32_t magnitude = uint32_t{h} & 0x7fff;
  const bool is_normal = magnitude >= 0x400;
  const float shifted = bit_cast<float>((magnitude << 13) + ((is_normal ? 112u : 113u) << 23));
  const float size = is_normal ? shifted : shifted - 0x1p-14f;
  const uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : bit_cast<uint32_t>(size);
  return bit_cast<float>(bits | (uint32_t{h} & 0x8000) << 16);
}

inline uint16_t to_float16(float v) {
  uint32_t sign = bit_cast<uint32_t>(v) >> 16 & 0x8000;
  uint32_t bits = bit_cast<uint32_t>(v) & 0x7fffffff;
  uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  // adding 0.5 puts the last bit of a subnormal half, 2^-24, at the last bit of the float, which rounds
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t h = bits < 0x38800000 ? subnormal : normal;  // 2^-14, the smallest normal half
  h = bits >= 0x477ff000 ? 0x7c00 : h;                  // 65520 and above round to infinity
  h = bits > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(h | sign);
}

inline uint8_t to_float8(float v) {
  const uint32_t sign = bit_cast<uint32_t>(v) >> 24 & 0x80;
  uint32_t bits = bit_cast<uint32_t>(v) & 0x7fffffff;
  const bool is_nan = bits > 0x7f800000;
  bits = bits > 0x43e00000 ? 0x43e00000 : bits;  // 448
  const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120u << 3);
  // adding 2^14 puts the last bit of a subnormal number, 2^-9, at the last bit of the float, which rounds
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
  const uint32_t h = is_nan ? 0x7f : bits < 0x3c800000 ? subnormal : normal;  // 2^-6
  return static_cast<uint8_t>(h | sign);
}

template <typename T>
void load(const void* from, DType dtype, int64_t n, T* __restrict to) {
  if (dtype == DType::kFloat64) {
    const auto* source = static_cast<const double*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = static_cast<T>(source[k]);
  } else if (dtype == DType::kFloat32) {
    const auto* source = static_cast<const float*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = source[k];
  } else if (dtype == DType::kBFloat16) {
    const auto* source = static_cast<const uint16_t*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = from_bfloat16(source[k]);
  } else if (dtype == DType::kFloat8) {
    const auto* source = static_cast<const uint8_t*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = from_float8(source[k]);
  } else {
    const auto* source = static_cast<const uint16_t*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = from_float16(source[k]);
  }
}

template <typename T>
void store(const T* __restrict from, int64_t n, void* to, DType dtype) {
  if (dtype == DType::kFloat64) {
    auto* target = static_cast<double*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = from[k];
  } else if (dtype == DType::kFloat32) {
    auto* target = static_cast<float*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = static_cast<float>(from[k]);
  } else if (dtype == DType::kBFloat16) {
    auto* target = static_cast<uint16_t*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = to_bfloat16(static_cast<float>(from[k]));
  } else if (dtype == DType::kFloat8) {
    auto* target = static_cast<uint8_t*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = to_float8(static_cast<float>(from[k]));
  } else {
    auto* target = static_cast<uint16_t*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = to_float16(static_cast<float>(from[k]));
  }
}

template <typename T>
T largest(const T* __restrict v, int64_t d) {
  T most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < d; ++k) {
    const T size = v[k] < 0 ? -v[k] : v[k];
    most = size > most ? size : most;
  }
  return most;
}

template <typename T>
void times(T* __restrict v, int64_t d, T factor) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) v[k] *= factor;
}

template <typename T>
void roots(T* __restrict v, int64_t d, T least) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T root = sqrt(v[k]);
    v[k] = root < least ? least : root;
  }
}

template <typename T>
void squares(T* __restrict v, int64_t d) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) v[k] *= v[k];
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
