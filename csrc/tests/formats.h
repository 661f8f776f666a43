// The formats of 16 and 8 bits, from their definition and slowly: sign, exponent, fraction, and rounding to
// nearest even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lmcl.h"

namespace cosface::test {

struct Format {
  int exponent_bits, fraction_bits;
  bool has_infinity = true;  // if not, the largest pattern is nan, and what is too large becomes the one below

  int sign_bit() const { return 1 << (exponent_bits + fraction_bits); }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint16_t infinity() const {
    return static_cast<uint16_t>(has_infinity ? ((1 << exponent_bits) - 1) << fraction_bits : sign_bit() - 2);
  }
  uint16_t nan() const {
    return static_cast<uint16_t>(has_infinity ? infinity() | 1 << (fraction_bits - 1) : sign_bit() - 1);
  }

  double decode(uint16_t bits) const {
    const int sign = bits & sign_bit(), exponent = (bits & (sign_bit() - 1)) >> fraction_bits;
    const int fraction = bits & ((1 << fraction_bits) - 1);
    double magnitude;
    if ((bits & (sign_bit() - 1)) > infinity()) return std::numeric_limits<double>::quiet_NaN();
    if (has_infinity && (bits & (sign_bit() - 1)) == infinity()) {
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
    if (std::isnan(v)) return nan();
    const auto sign = static_cast<uint16_t>(std::signbit(v) ? sign_bit() : 0);
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

constexpr Format kHalf{5, 10}, kBrain{8, 7}, kQuarter{4, 3, false};

inline const Format& format_of(DType dtype) {
  return dtype == DType::kFloat16 ? kHalf : dtype == DType::kBFloat16 ? kBrain : kQuarter;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

inline const char* name_of(DType dtype) {
  const char* names[] = {"float64", "float32", "bfloat16", "float16", "float8"};
  return names[static_cast<int>(dtype)];
}

// Element k of an array of dtype, as a double.
inline double get(const void* data, DType dtype, int64_t k) {
  if (dtype == DType::kFloat64) return static_cast<const double*>(data)[k];
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[k];
  if (dtype == DType::kFloat8) return kQuarter.decode(static_cast<const uint8_t*>(data)[k]);
  return format_of(dtype).decode(static_cast<const uint16_t*>(data)[k]);
}

inline void put(double v, void* data, DType dtype, int64_t k) {
  if (dtype == DType::kFloat64) {
    static_cast<double*>(data)[k] = v;
  } else if (dtype == DType::kFloat32) {
    static_cast<float*>(data)[k] = static_cast<float>(v);
  } else if (dtype == DType::kFloat8) {
    static_cast<uint8_t*>(data)[k] = static_cast<uint8_t>(kQuarter.encode(v));
  } else {
    static_cast<uint16_t*>(data)[k] = format_of(dtype).encode(v);
  }
}

}  // namespace cosface::test
