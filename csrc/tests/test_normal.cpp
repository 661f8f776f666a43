// The normal stream against Philox4x32-10 and Box-Muller written out in double.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "formats.h"

namespace cosface::test {
namespace {

using Words = std::array<uint32_t, 4>;

// Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC11.
Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * counter[0], p1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(p1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(p1),
               static_cast<uint32_t>(p0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(p0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// kat_vectors of Random123, philox4x32 10
void philox_gives_the_published_vectors() {
  constexpr uint32_t kOnes = 0xffffffff;
  const struct {
    Words counter;
    uint32_t key0, key1;
    Words want;
  } vectors[] = {
      {{0, 0, 0, 0}, 0, 0, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
  };
  for (const auto& vector : vectors) {
    const Words got = philox(vector.counter, vector.key0, vector.key1);
    for (int k = 0; k < 4; ++k) CHECK(got[k] == vector.want[k], k, got[k], vector.want[k]);
  }
}

struct Normal {
  double value, radius;
};

// Element k of the stream N(0, 1). A group of 64 counters gives 256 elements: the sines and the cosines of the
// first two words of each counter, then those of the other two.
Normal element(uint64_t seed, uint64_t k) {
  constexpr double kTau = 6.283185307179586;
  const uint64_t counter = k / 256 * 64 + k % 64;
  const auto part = k % 256 / 64;
  const Words words = philox({static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0},
                             static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const uint32_t* pair = &words[part / 2 * 2];
  const double radius = std::sqrt(-2 * std::log(std::ldexp(pair[0] >> 1, -31) + std::ldexp(1.0, -32)));
  const double angle = kTau * std::ldexp(pair[1], -32);
  return {radius * (part % 2 ? std::cos(angle) : std::sin(angle)), radius};
}

// The radius r is the root of -2 ln u. Rounding u and the fit of the logarithm move -2 ln u by 2e-7, and so r by
// 1e-7 / r, up to 3e-4 at u = 1; the rest is a few roundings of r.
double tolerance(double radius) { return 4 * 0x1p-23 * radius + std::min(5e-4, 2e-7 / radius); }

constexpr uint64_t kSeeds[] = {0, 1, 0x9E3779B97F4A7C15, ~uint64_t{0}};

void normal_is_the_stream() {
  for (uint64_t seed : kSeeds) {
    for (uint64_t group :
         {uint64_t{0}, uint64_t{1}, uint64_t{1} << 26, (uint64_t{1} << 26) - 1, uint64_t{1} << 40}) {
      for (int64_t n : {1, 63, 64, 65, 128, 200, 255, 256}) {
        for (float std : {1.0f, 0.01f}) {
          Exact<float> got(n);
          kernels<float>().normal(seed, group, n, std, got);
          for (int64_t k = 0; k < n; ++k) {
            const Normal want = element(seed, group * 256 + k);
            CHECK(std::fabs(got[k] / std - want.value) <= tolerance(want.radius), seed, group, n, k, got[k] / std,
                  want.value);
          }
        }
      }
    }
  }
}

void double_table_has_the_same_stream() {
  Exact<float> single(256), same(256);
  kernels<float>().normal(7, 3, 256, 1.0f, single);
  kernels<double>().normal(7, 3, 256, 1.0f, same);
  CHECK(single.same_bits(same), single[0], same[0]);
}

// A million elements: errors of the fits where they are largest, the smallest and the largest radii, and moments.
void a_million_elements() {
  constexpr int64_t kGroups = 4096;
  double moments[5] = {};
  Exact<float> got(256);
  for (int64_t group = 0; group < kGroups; ++group) {
    kernels<float>().normal(42, group, 256, 1.0f, got);
    for (int64_t k = 0; k < 256; ++k) {
      const Normal want = element(42, group * 256 + k);
      CHECK(std::fabs(got[k] - want.value) <= tolerance(want.radius), group, k, got[k], want.value);
      for (int power = 0; power < 5; ++power) moments[power] += std::pow(got[k], power);
    }
  }
  const double n = moments[0], expected[] = {1, 0, 1, 0, 3}, variance[] = {0, 1, 2, 15, 96};
  for (int power = 1; power < 5; ++power) {
    CHECK(std::fabs(moments[power] / n - expected[power]) < 5 * std::sqrt(variance[power] / n), power,
          moments[power] / n);
  }
}

Runtime runtime(int threads) {
  return {threads,
          [](int64_t parts, const std::function<void(int64_t)>& body) {
            std::vector<std::thread> workers;
            for (int64_t part = 0; part < parts; ++part) workers.emplace_back(body, part);
            for (auto& worker : workers) worker.join();
          },
          0};
}

// An element depends on the seed and its place, not on the length, the dtype or the threads.
void fill_depends_on_place_alone() {
  for (int64_t n : {0, 1, 255, 256, 257, 1023, 5000}) {
    for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      for (int threads = 1; threads <= 4; ++threads) {
        constexpr double kStd = 0.02;
        Exact<char> got(n * size_of(dtype));
        fill_normal(got, dtype, 0, n, 11, kStd, runtime(threads));
        Exact<float> group(256);
        Exact<char> want(n * size_of(dtype));
        for (int64_t k = 0; k < n; ++k) {
          if (k % 256 == 0) kernels<float>().normal(11, k / 256, 256, kStd, group);
          put(group[k % 256], want, dtype, k);
        }
        CHECK(got.same_bits(want), n, name_of(dtype), threads);
        for (int64_t start : {int64_t{1}, n / 3, n - n / 7}) {
          if (start > n) continue;
          const int64_t skipped = start * size_of(dtype), bytes = n * size_of(dtype) - skipped;
          Exact<char> rest(bytes);
          fill_normal(rest, dtype, start, n - start, 11, kStd, runtime(threads));
          CHECK(std::memcmp(rest, want + skipped, bytes) == 0, n, start, name_of(dtype), threads);
        }
      }
    }
  }
}

void tests() {
  philox_gives_the_published_vectors();
  normal_is_the_stream();
  double_table_has_the_same_stream();
  a_million_elements();
  fill_depends_on_place_alone();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
