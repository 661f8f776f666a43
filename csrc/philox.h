// Random numbers by counters, and the rounding that uses them: the same bits on the CPU and on a GPU.
//
// Everything here is static, because kernels.cpp is compiled once per instruction set and each copy must stay its
// own.
#pragma once

#include <cstdint>

#include "anywhere.h"

namespace cosface {

// A group of counters: (64 group ... 64 group + 63, stream), enough to fill a CPU's widest registers. Its first
// words come first, then its second ones, and so on; cut into 16 bits, low ones first, they are noise for kNoise
// numbers. So counter l makes the noise of numbers 2 l and 2 l + 1 of each quarter.
constexpr int64_t kCounters = 64, kNoise = 4 * kCounters * 2;

// Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC11): ten of these rounds on the
// words of a counter, with keys that advance by kPhiloxStep from round to round.
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

COSFACE_ANYWHERE static inline void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                                 uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
  c3 = static_cast<uint32_t>(p0);
}

// The bits of v in bfloat16: up or down with the probabilities that keep the expected value, by 16 random bits
// added below those that are kept.
COSFACE_ANYWHERE static inline uint16_t round_stochastically(float v, uint16_t noise) {
  const uint32_t rounded = (__builtin_bit_cast(uint32_t, v) + noise) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

// Likewise in float8_e4m3fn, of |v| <= 448: normal numbers by 20 random bits below the three that are kept, of
// which the lowest four are one half; below 2^-6, in steps of 2^-9, by the fraction of a step.
COSFACE_ANYWHERE static inline uint8_t round_to_float8(float v, uint16_t noise) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, v), magnitude = bits & 0x7fffffff;
  const uint32_t normal = ((magnitude + (uint32_t{noise} << 4) + 8) >> 20) - (120u << 3);
  const float size = __builtin_bit_cast(float, magnitude < 0x3c800000u ? magnitude : 0u);
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(size * 0x1p25f)) + noise) >> 16;
  const uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
  return static_cast<uint8_t>((magnitude > 0x43e00000u ? 0x7fu : code) | (bits >> 24 & 0x80));
}

}  // namespace cosface
