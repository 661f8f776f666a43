// The 16-bit formats, from their definition and slowly: sign, exponent, fraction, and rounding to nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lmcl.h"

namespace cosface::test {

struct Format {
  int exponent_bits, fraction_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint16_t infinity() const { return static_cast<uint16_t>(((1 << exponent_bits) - 1) << fraction_bits); }

  double decode(uint16_t bits) const {
    const int sign = bits >> 15, exponent = (bits & 0x7fff) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    double magnitude;
    if ((bits & 0x7fff) > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if ((bits & 0x7fff) == infinity()) {
      magnitude = std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      magnitude = std::ldexp(fraction, 1 - bias() - fraction_bits);
    } else {
      magnitude = std::ldexp((1 << fraction_bits) + fraction, exponent - bias() - fraction_bits);
    }
    return sign ? -magnitude : magnitude;
  }

  // The quotient by the spacing of the format at |v| is exact in double, so nearbyint rounds the value itself.
  uint16_t encode(double v) const {
    if (std::isnan(v)) return static_cast<uint16_t>(infinity() | 1 << (fraction_bits - 1));
    const auto sign = static_cast<uint16_t>(std::signbit(v) ? 0x8000 : 0);
    const double magnitude = std::fabs(v);
    if (std::isinf(v)) return sign | infinity();
    if (magnitude == 0) return sign;
    const int exponent = std::max(std::ilogb(magnitude), 1 - bias());
    const double steps = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
    // the count of steps continues over the end of a binade, and over the largest number into infinity
    const double bits = std::ldexp(exponent + bias() - 1, fraction_bits) + steps;
    return bits >= infinity() ? sign | infinity() : static_cast<uint16_t>(sign | static_cast<uint16_t>(bits));
  }
};

constexpr Format kHalf{5, 10}, kBrain{8, 7};

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

inline const char* name_of(DType dtype) {
  const char* names[] = {"float64", "float32", "bfloat16", "float16"};
  return names[static_cast<int>(dtype)];
}

// Element k of an array of dtype, as a double.
inline double get(const void* data, DType dtype, int64_t k) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[k];
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[k];
  return (dtype == DType::kFloat16 ? kHalf : kBrain).decode(static_cast<const uint16_t*>(data)[k]);
}

inline void put(double v, void* data, DType dtype, int64_t k) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(data)[k] = v;
  } else if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[k] = static_cast<float>(v);
  } else {
    static_cast<uint16_t*>(data)[k] = (dtype == DType::kFloat16 ? kHalf : kBrain).encode(v);
  }
}

}  // namespace cosface::test
