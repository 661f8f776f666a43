// Roots and exponentials that vectorise.
#pragma once

#include <cstdint>

namespace cosface::COSFACE_ISA {
namespace {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float sqrt(float v) { return __builtin_sqrtf(v); }
inline double sqrt(double v) { return __builtin_sqrt(v); }

// e^x for x <= 0, and 1 beyond: the distance of a logit from the largest, or the logarithm of a probability, which
// rounded cosines of a cache could put above 0. Cody-Waite reduction x = k ln 2 + f, then 1 + f + f^2 q(f) with q
// the minimax fit of degree 4 on |f| <= ln(2)/2 (relative error 3e-9), then k into the exponent. Below the
// smallest normal number the result is 0.
inline float exp(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln 2, k * high is exact
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kMin = -87.33654f;     // ln 2^-126
  float clamped = x > 0.0f ? 0.0f : x;   // written so that nan passes
  float shifted = clamped * kLog2E + kRound;
  float k = shifted - kRound;
  float f = (clamped - k * kLn2High) - k * kLn2Low;
  float q = 1.381454058e-3f;
  q = q * f + 8.368745446e-3f;
  q = q * f + 4.166838899e-2f;
  q = q * f + 1.666652113e-1f;
  q = q * f + 4.999999404e-1f;
  float r = 1.0f + (f + f * f * q);
  float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + bit_cast<uint32_t>(1.0f));  // 2^k
  return x < kMin ? 0.0f : r * power;
}
inline double exp(double x) { return __builtin_exp(x > 0 ? 0 : x); }

// log(1 + e) for e in [0, 1]: 2 artanh(t) with t = e / (2 + e) <= 1/3, whose series is cut off at 1e-8 of it.
inline float log1p(float e) {
  const float t = e / (2.0f + e), t2 = t * t;
  float q = 1.0f / 13;
  q = q * t2 + 1.0f / 11;
  q = q * t2 + 1.0f / 9;
  q = q * t2 + 1.0f / 7;
  q = q * t2 + 1.0f / 5;
  q = q * t2 + 1.0f / 3;
  q = q * t2 + 1.0f;
  return 2.0f * t * q;
}
inline double log1p(double e) { return __builtin_log1p(e); }

// arccos c, of c beyond 1 and -1 that of these. arcsin r = r + r^3 q(r^2) for r <= 1/2, with the coefficients of
// Cephes' asinf; beyond, arccos |c| = 2 arcsin sqrt((1 - |c|) / 2).
inline float arccos(float c) {
  constexpr float kPi = 3.14159265f, kHalfPi = 1.57079633f;
  const float clamped = c > 1.0f ? 1.0f : (c < -1.0f ? -1.0f : c);
  const float size = clamped < 0.0f ? -clamped : clamped;
  const bool is_near = size > 0.5f;
  const float square = is_near ? 0.5f * (1.0f - size) : size * size;
  const float root = is_near ? sqrt(square) : size;
  float q = 4.2163199048e-2f;
  q = q * square + 2.4181311049e-2f;
  q = q * square + 4.5470025998e-2f;
  q = q * square + 7.4953002686e-2f;
  q = q * square + 1.6666752422e-1f;
  const float arcsin = root + root * square * q;
  const float of_size = is_near ? 2.0f * arcsin : kHalfPi - arcsin;
  return clamped < 0.0f ? kPi - of_size : of_size;
}
inline double arccos(double c) { return __builtin_acos(c > 1 ? 1 : (c < -1 ? -1 : c)); }

}  // namespace
}  // namespace cosface::COSFACE_ISA
