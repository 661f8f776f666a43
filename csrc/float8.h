// What the CPU and a GPU share of rows in float8_e4m3fn. Static for the reason that philox.h has.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "anywhere.h"

namespace cosface {

// A bias of 7, no infinity, and one nan of either sign. The steps below the smallest normal number, 2^-6, are
// those above it.
COSFACE_ANYWHERE static inline float from_float8(uint8_t h) {
  const uint32_t magnitude = uint32_t{h} & 0x7f;
  const bool is_normal = magnitude >= 8;
  const float shifted = __builtin_bit_cast(float, (magnitude << 20) + ((is_normal ? 120u : 121u) << 23));
  const float size = is_normal ? shifted : shifted - 0x1p-6f;
  const uint32_t bits = magnitude == 0x7f ? 0x7fc00000 : __builtin_bit_cast(uint32_t, size);
  return __builtin_bit_cast(float, bits | (uint32_t{h} & 0x80) << 24);
}

constexpr double kLargestDouble = std::numeric_limits<double>::max();

// The exponent e with which a row's largest |v_k| 2^-e is in (224, 448], the upper half of float8's last binade
// but one and the lower of its last; as it was for a row of zeros, or one that is not finite. Within 2^127 of
// floats.
COSFACE_ANYWHERE static inline int8_t float8_exponent(double largest, int8_t before) {
  if (!(largest > 0 && largest <= kLargestDouble)) return before;
  int exponent;
  const double fraction = std::frexp(largest, &exponent);  // in [1/2, 1); 448 = 7/8 2^9
  exponent -= fraction > 0.875 ? 8 : 9;
  return static_cast<int8_t>(exponent < -118 ? -118 : exponent > 118 ? 118 : exponent);
}

}  // namespace cosface
