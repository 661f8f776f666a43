// load and store in every dtype, against the definition of the formats in formats.h.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "check.h"
#include "cpu/kernels.h"
#include "formats.h"

namespace cosface::test {
namespace {

constexpr DType kFewBits[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat8};

int64_t patterns(DType dtype) { return int64_t{1} << 8 * size_of(dtype); }

uint16_t bits_of(const char* data, DType dtype, int64_t k) {
  uint16_t bits = 0;
  std::memcpy(&bits, data + k * size_of(dtype), size_of(dtype));
  return bits;
}

bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// Subnormal floats are 0, as after torch.set_flush_denormal(True), where this knows how.
class Flushing {
 public:
#if defined(__SSE2__)
  explicit Flushing(bool flushes) : before_(_mm_getcsr()) {
    if (flushes) _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  }
  ~Flushing() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#else
  explicit Flushing(bool) {}
  ~Flushing() {}
#endif
};

template <typename T>
void every_pattern_comes_back(bool flushes) {
  for (DType dtype : kFewBits) {
    if (flushes && dtype == DType::kBFloat16) continue;  // whose smallest numbers are subnormal floats
    const Format format = format_of(dtype);
    const int64_t n = patterns(dtype);
    Exact<char> from(n * size_of(dtype)), back(n * size_of(dtype));
    Exact<T> values(n);
    for (int64_t k = 0; k < n; ++k) std::memcpy(from + k * size_of(dtype), &k, size_of(dtype));
    {
      const Flushing flushing(flushes);
      kernels<T>().load(from, dtype, n, values);
      kernels<T>().store(values, n, back, dtype);
    }
    for (int64_t k = 0; k < n; ++k) {
      const double want = format.decode(static_cast<uint16_t>(k));
      const uint16_t got = bits_of(back, dtype, k);
      CHECK(same(values[k], want), name_of(dtype), flushes, k, values[k], want);
      CHECK(std::isnan(want) ? std::isnan(format.decode(got)) : got == k, name_of(dtype), flushes, k, got);
    }
  }
}

// For every number of few bits: itself, the tie between it and the next, and the neighbours of both; the ends of
// float; and a walk over all bit patterns of float.
std::vector<float> interesting_floats() {
  std::vector<float> values;
  for (DType dtype : kFewBits) {
    const Format format = format_of(dtype);
    for (int64_t k = 0; k < patterns(dtype); ++k) {
      const auto here = static_cast<float>(format.decode(static_cast<uint16_t>(k)));
      const auto next = static_cast<float>(format.decode(static_cast<uint16_t>((k + 1) % patterns(dtype))));
      for (float v : {here, here + (next - here) / 2}) {
        for (float w : {std::nextafter(v, -INFINITY), v, std::nextafter(v, INFINITY)}) values.push_back(w);
      }
    }
  }
  for (float v :
       {65504.f, 65519.996f, 65520.f, 65536.f, 3.3895314e38f, 3.3961775e38f, 3.4028235e38f, 0x1p-149f, 0x1p-126f,
        0x1p-24f, 0x1p-25f, 0x1.000002p-25f, 0x1p-134f, 0x1p-14f, 0x1.ffcp-15f, 0.0f, 1e-30f}) {
    values.push_back(v);
    values.push_back(-v);
  }
  constexpr uint32_t kStep = 4271;  // odd: the walk meets every residue of the low bits
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStep) {
    values.push_back(float_of(static_cast<uint32_t>(bits)));
  }
  return values;
}

template <typename T>
void store_rounds_to_nearest_even() {
  const std::vector<float> values = interesting_floats();
  const auto n = static_cast<int64_t>(values.size());
  Exact<T> from(n);
  std::copy(values.begin(), values.end(), from.begin());
  for (DType dtype : kFewBits) {
    const Format format = format_of(dtype);
    Exact<char> to(n * size_of(dtype));
    kernels<T>().store(from, n, to, dtype);
    for (int64_t k = 0; k < n; ++k) {
      const uint16_t want = format.encode(values[k]), got = bits_of(to, dtype, k);
      const bool right = std::isnan(values[k]) ? std::isnan(format.decode(got)) : got == want;
      CHECK(right, name_of(dtype), values[k], got, want);
    }
  }
}

// Any length, and any element as the first.
template <typename T>
void load_and_store_take_any_length() {
  for (DType dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat8}) {
    for (int64_t n : {0, 1, 3, 15, 16, 17, 31, 33, 64, 65, 127, 515}) {
      for (int64_t offset : {0, 1, 3}) {
        const int64_t size = size_of(dtype);
        Exact<char> from((n + offset) * size), to((n + offset) * size);
        for (int64_t k = 0; k < n + offset; ++k) put(0.37 * static_cast<double>(k) - 5.1, from, dtype, k);
        Exact<T> values(n);
        kernels<T>().load(from + offset * size, dtype, n, values);
        for (int64_t k = 0; k < n; ++k) {
          const double want = get(from, dtype, k + offset);
          CHECK(values[k] == static_cast<T>(want), name_of(dtype), n, offset, k, values[k], want);
        }
        for (int64_t k = 0; k < n; ++k) values[k] = static_cast<T>(1.0 / static_cast<double>(k + 3));
        kernels<T>().store(values, n, to + offset * size, dtype);
        for (int64_t k = 0; k < n; ++k) {
          Exact<char> want(size);
          put(dtype == DType::kFloat64 ? values[k] : static_cast<float>(values[k]), want, dtype, 0);
          CHECK(std::memcmp(to + (offset + k) * size, want, size) == 0, name_of(dtype), n, offset, k,
                get(to, dtype, offset + k));
        }
        for (int64_t k = 0; k < offset * size; ++k) CHECK(to[k] == char(0xff), name_of(dtype), n, offset, k);
      }
    }
  }
}

template <typename T>
void all_of() {
  for (bool flushes : {false, true}) every_pattern_comes_back<T>(flushes);
  store_rounds_to_nearest_even<T>();
  load_and_store_take_any_length<T>();
}

void tests() {
  all_of<float>();
  all_of<double>();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
