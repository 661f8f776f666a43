// Random numbers, and stochastic rounding.
#pragma once

#include "../kernels.h"
#include "philox.h"
#include "rows.h"

namespace cosface::COSFACE_ISA {
namespace {

// ln(x) for x in (0, 1]: x = 2^e (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)), then t - t^2/2 + t^3 r(t) with r the
// minimax fit of degree 5 (absolute error 6e-8).
inline float log(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t shifted = bits - bit_cast<uint32_t>(0.70710678f);
  auto e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  float t = bit_cast<float>((shifted & 0x7fffff) + bit_cast<uint32_t>(0.70710678f)) - 1.0f;
  float r = -1.022421047e-1f;
  r = r * t + 1.614119112e-1f;
  r = r * t + -1.716690958e-1f;
  r = r * t + 1.991023719e-1f;
  r = r * t + -2.498057336e-1f;
  r = r * t + 3.333469033e-1f;
  return e * 0.69314718f + (t - 0.5f * t * t + t * t * t * r);
}

// sin and cos of 2 pi (bits / 2^32): the top two bits, rounded, choose a quadrant; the rest is an angle of at most
// pi/4 either side, for which the minimax fits in v^2 have errors 2e-9 and 3e-8.
inline void sin_cos(uint32_t bits, float* sine, float* cosine) {
  uint32_t quadrant = (bits + 0x20000000u) >> 30;
  float v = static_cast<float>(static_cast<int32_t>(bits - (quadrant << 30))) * 0x1p-29f;  // [-1, 1) for pi/4
  float u = v * v;
  float a = v * (7.853981853e-1f + u * (-8.074543625e-2f + u * (2.490007086e-3f + u * -3.595450835e-5f)));
  float b = 1.0f + u * (-3.084242642e-1f + u * (1.584991440e-2f + u * -3.188805131e-4f));
  float si = (quadrant & 1) ? b : a, co = (quadrant & 1) ? a : b;
  *sine = (quadrant & 2) ? -si : si;
  *cosine = ((quadrant + 1) & 2) ? -co : co;
}

// The four words of each counter.
struct Words {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
};

// Philox on a group of counters, key = seed.
inline void philox(uint64_t seed, uint64_t group, uint64_t stream, Words* words) {
  uint32_t *c0 = words->c0, *c1 = words->c1, *c2 = words->c2, *c3 = words->c3;
  for (int64_t l = 0; l < kCounters; ++l) {
    uint64_t counter = group * kCounters + l;
    c0[l] = static_cast<uint32_t>(counter);
    c1[l] = static_cast<uint32_t>(counter >> 32);
    c2[l] = static_cast<uint32_t>(stream);
    c3[l] = static_cast<uint32_t>(stream >> 32);
  }
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxStep0, k1 += kPhiloxStep1) {
#pragma omp simd
    for (int64_t l = 0; l < kCounters; ++l) philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
  }
}

// Box-Muller on the words of stream 0.
void normal(uint64_t seed, uint64_t group, int64_t n, float std, float* to) {
  Words words;
  philox(seed, group, 0, &words);
  float out[4 * kCounters];
  const uint32_t* pairs[2][2] = {{words.c0, words.c1}, {words.c2, words.c3}};
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t *first = pairs[pair][0], *second = pairs[pair][1];
    float *sines = out + 2 * pair * kCounters, *cosines = sines + kCounters;
#pragma omp simd
    for (int64_t l = 0; l < kCounters; ++l) {
      float uniform = static_cast<float>(static_cast<int32_t>(first[l] >> 1)) * 0x1p-31f + 0x1p-32f;  // (0, 1]
      float radius = std * sqrt(-2.0f * log(uniform));
      float sine, cosine;
      sin_cos(second[l], &sine, &cosine);
      sines[l] = radius * sine;
      cosines[l] = radius * cosine;
    }
  }
  __builtin_memcpy(to, out, sizeof(float) * static_cast<size_t>(n < 4 * kCounters ? n : 4 * kCounters));
}

template <typename T, typename Bits, Bits (*kRound)(float, uint16_t)>
void round_row(const T* __restrict from, int64_t d, Bits* __restrict to, uint64_t seed, uint64_t stream,
               int64_t row) {
  const int64_t groups = (d + kNoise - 1) / kNoise;
  for (int64_t group = 0; group < groups; ++group) {
    Words words;
    philox(seed, static_cast<uint64_t>(row * groups + group), stream, &words);
    uint16_t noise[kNoise];
    __builtin_memcpy(noise, &words, sizeof(noise));
    const int64_t first = group * kNoise, count = d - first < kNoise ? d - first : kNoise;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      to[first + k] = kRound(static_cast<float>(from[first + k]), noise[k]);
    }
  }
}

template <typename T>
void store_stochastic(const T* from, int64_t d, void* to, DType dtype, uint64_t seed, uint64_t stream,
                      int64_t row) {
  if (dtype == DType::kFloat8) {
    round_row<T, uint8_t, round_to_float8>(from, d, static_cast<uint8_t*>(to), seed, stream, row);
  } else {
    round_row<T, uint16_t, round_stochastically>(from, d, static_cast<uint16_t*>(to), seed, stream, row);
  }
}

}  // namespace
}  // namespace cosface::COSFACE_ISA
