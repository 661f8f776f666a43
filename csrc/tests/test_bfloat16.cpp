// The kernels of bfloat16 products: those of a unit against its emulation, bit for bit, and either against double.
#include <cmath>
#include <cstdint>
#include <string>

#include "check.h"
#include "cpu/kernels.h"
#include "formats.h"
#include "problem.h"

namespace cosface {
namespace emulated_amx {
const Bfloat16Kernels& bfloat16_table();
}
namespace emulated_avx512_bf16 {
const Bfloat16Kernels& bfloat16_table();
}
}  // namespace cosface

namespace cosface::test {
namespace {

const Bfloat16Kernels& unit() { return *bfloat16_kernels(); }
const Bfloat16Kernels& emulation() {
  const bool amx = std::string(instruction_set()).find("amx") != std::string::npos;
  return (amx ? emulated_amx::bfloat16_table : emulated_avx512_bf16::bfloat16_table)();
}
const int64_t kPanel = 32, kDepthStep = 32;

double value(BFloat16 v) { return kBrain.decode(v.bits); }
BFloat16 rounded(double v) { return {kBrain.encode(v)}; }
int64_t extent(int64_t rows, int64_t cols, int64_t stride) { return rows == 0 ? 0 : (rows - 1) * stride + cols; }

enum class Numbers { kOrdinary, kTiny, kHuge };

double number(Numbers kind) {
  const int exponent = static_cast<int>(engine() % 40);
  if (kind == Numbers::kTiny)
    return std::ldexp(normal(), -60 - exponent);  // whose products are below the normal ones
  if (kind == Numbers::kHuge) return std::ldexp(normal(), 15 + exponent);
  return normal();
}

// What a sum may be off by: a rounding of each partial sum, and what became 0 for being below the normal numbers.
void test_matmul(int64_t rows, int64_t panels, int64_t depth, bool accumulate, bool scaled, Numbers kind) {
  const int64_t a_stride = depth + 3, panel_stride = depth * kPanel + 2, cols = panels * kPanel,
                c_stride = cols + 5;
  Exact<BFloat16> a(extent(rows, depth, a_stride)), b(extent(panels, depth * kPanel, panel_stride));
  Exact<float> c(extent(rows, cols, c_stride)), factor(cols);
  for (BFloat16& v : a) v = rounded(number(kind));
  for (BFloat16& v : b) v = rounded(number(kind));
  for (float& v : factor) v = static_cast<float>(0.5 + std::fabs(normal()));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols && accumulate; ++j) c[i * c_stride + j] = static_cast<float>(number(kind));
  }
  const Exact<float> before(c), emulated(c);
  const Right<BFloat16> right{b, panel_stride, kPanel, scaled ? factor.begin() : nullptr};
  const Ahead ahead{reinterpret_cast<uintptr_t>(b.begin()), reinterpret_cast<uintptr_t>(b.end())};
  unit().products.matmul({a, a_stride, 1}, right, c, c_stride, rows, cols, depth, accumulate,
                         depth > 32 ? ahead : Ahead{});
  emulation().products.matmul({a, a_stride, 1}, right, emulated, c_stride, rows, cols, depth, accumulate, {});
  CHECK(c.same_bits(emulated), rows, cols, depth, accumulate, scaled, static_cast<int>(kind));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double sum = accumulate ? double{before[i * c_stride + j]} : 0, size = std::fabs(sum);
      for (int64_t k = 0; k < depth; ++k) {
        const BFloat16 other = b[j / kPanel * panel_stride + (k / 2 * kPanel + j % kPanel) * 2 + k % 2];
        const double term = value(a[i * a_stride + k]) * value(other);
        sum += term, size += std::fabs(term);
      }
      const double scale = scaled ? double{factor[j]} : 1, got = c[i * c_stride + j];
      const double tolerance = scale * (size * kUlp<float> * std::sqrt(static_cast<double>(depth)) +
                                        static_cast<double>(2 * depth) * 0x1p-126);
      CHECK(close(got, scale * sum, tolerance), rows, cols, depth, accumulate, scaled, i, j, got, scale * sum);
    }
    for (int64_t j = cols; i + 1 < rows && j < c_stride; ++j) CHECK(std::isnan(c[i * c_stride + j]), i, j);
  }
}

void test_matmul() {
  for (int64_t rows : {0, 1, 13, 14, 15, 16, 17, 31, 32, 33, 49, 64, 67}) {
    for (int64_t panels : {1, 3}) {
      for (int64_t depth : {32, 64, 320}) {
        for (bool accumulate : {false, true}) {
          for (Numbers kind : {Numbers::kOrdinary, Numbers::kTiny, Numbers::kHuge}) {
            if (panels == 3 && depth == 320) continue;
            test_matmul(rows, panels, depth, accumulate, !accumulate && rows % 2, kind);
          }
        }
      }
    }
  }
}

// A nan or an infinity spoils its own row and its own column.
void test_matmul_isolates() {
  const int64_t rows = 35, depth = 32;
  Exact<BFloat16> a(rows * depth, rounded(1)), b(depth * kPanel, rounded(1));
  Exact<float> c(rows * kPanel);
  a[20 * depth + 7] = rounded(std::numeric_limits<double>::quiet_NaN());
  b[(3 * kPanel + 9) * 2 + 1] = rounded(std::numeric_limits<double>::infinity());
  unit().products.matmul({a, depth, 1}, {b, depth * kPanel, kPanel}, c, kPanel, rows, kPanel, depth, false, {});
  for (int64_t k = 0; k < c.size(); ++k) {
    const bool in_row = k / kPanel == 20, in_column = k % kPanel == 9;
    CHECK(in_row ? std::isnan(c[k]) : in_column ? std::isinf(c[k]) : c[k] == depth, k, c[k]);
  }
}

// A sum of a million alike: its rounding goes one way each time, so that how often it is rounded counts. Once a
// product; AMX, once an instruction.
void test_matmul_adds_at_the_end() {
  const int64_t depth = 256, products = 4096;
  const int roundings = std::string(instruction_set()).find("amx") == std::string::npos ? 1 : depth / kDepthStep;
  const double term = value(rounded(0.7)) * value(rounded(0.9));
  Exact<BFloat16> a(depth, rounded(0.7)), b(depth * kPanel, rounded(0.9));
  Exact<float> c(kPanel, 0.0f);
  for (int64_t k = 0; k < products; ++k) {
    unit().products.matmul({a, depth, 1}, {b, depth * kPanel, kPanel}, c, kPanel, 1, kPanel, depth, true, {});
  }
  const double want = term * static_cast<double>(products * depth);
  CHECK(close(c[0], want, want * kUlp<float> * (products * roundings / 2 + depth)), c[0], want);
}

void test_pack() {
  for (int64_t rows : {0, 1, 2, 31, 32, 33, 70}) {
    for (int64_t panels : {1, 3}) {
      const int64_t width = panels * kPanel, stride = width + 3,
                    depth = (rows + kDepthStep - 1) / kDepthStep * kDepthStep;
      const int64_t panel_stride = (depth + 2) * kPanel;
      Exact<BFloat16> v(extent(rows, width, stride)), to(extent(panels, depth * kPanel, panel_stride));
      for (BFloat16& number : v) number.bits = static_cast<uint16_t>(engine());
      unit().products.pack(v, rows, width, stride, to, panel_stride);
      for (int64_t j = 0; j < depth; ++j) {
        for (int64_t k = 0; k < width; ++k) {
          const uint16_t got = to[k / kPanel * panel_stride + (j / 2 * kPanel + k % kPanel) * 2 + j % 2].bits;
          CHECK(got == (j < rows ? v[j * stride + k].bits : 0), rows, panels, j, k);
        }
      }
    }
  }
}

void test_pack_transposed() {
  for (int64_t rows : {0, 1, 31, 32, 33, 70}) {
    for (int64_t d : {32, 96}) {
      const int64_t stride = d + 5, padded = (rows + kPanel - 1) / kPanel * kPanel;
      Exact<BFloat16> v(extent(rows, d, stride)), to(padded * d);
      for (BFloat16& number : v) number.bits = static_cast<uint16_t>(engine());
      unit().products.pack_transposed(v, rows, d, stride, to);
      for (int64_t i = 0; i < padded; ++i) {
        for (int64_t k = 0; k < d; ++k) {
          const uint16_t got = to[i / kPanel * d * kPanel + (k / 2 * kPanel + i % kPanel) * 2 + k % 2].bits;
          CHECK(got == (i < rows ? v[i * stride + k].bits : 0), rows, d, i, k);
        }
      }
    }
  }
}

void test_scale() {
  for (int64_t d : {0, 1, 15, 16, 17, 63, 515}) {
    Exact<float> x(d);
    Exact<BFloat16> to(d);
    for (float& v : x) v = static_cast<float>(normal());
    if (d > 15) x[3] = std::numeric_limits<float>::quiet_NaN(), x[4] = std::numeric_limits<float>::infinity();
    unit().scale(x, d, 0.25f, to);
    for (int64_t k = 0; k < d; ++k) CHECK(to[k].bits == rounded(0.25 * double{x[k]}).bits, d, k, x[k], to[k].bits);
  }
}

void test_round() {
  for (int64_t classes : {1, 2, 31, 32, 33, 77}) {
    for (int64_t n : {1, 15, 16, 17, 32, 47, 70}) {
      const int64_t stride = n + 3, samples = (n + kDepthStep - 1) / kDepthStep * kDepthStep + 2,
                    padded = (classes + kDepthStep - 1) / kDepthStep * kDepthStep + 4;
      Exact<float> g(extent(classes, n, stride)), factor(n);
      Exact<BFloat16> by_class(extent(classes, samples - 2, samples)), by_sample(extent(n, padded - 4, padded));
      for (float& v : g) v = static_cast<float>(normal());
      for (float& v : factor) v = static_cast<float>(normal());
      g[0] = std::numeric_limits<float>::infinity();
      unit().round(g, classes, n, stride, factor, by_class, samples, by_sample, padded);
      for (int64_t j = 0; j < classes; ++j) {
        for (int64_t i = 0; i < samples - 2; ++i) {
          const uint16_t want = i < n ? rounded(g[j * stride + i] * factor[i]).bits : 0;
          CHECK(by_class[j * samples + i].bits == want, classes, n, j, i, by_class[j * samples + i].bits, want);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < padded - 4; ++j) {
          const uint16_t want = j < classes ? rounded(double{g[j * stride + i]}).bits : 0;
          CHECK(by_sample[i * padded + j].bits == want, classes, n, i, j, by_sample[i * padded + j].bits, want);
        }
      }
    }
  }
}

void test_rows() {
  for (int64_t d : {1, 2, 3, 16, 31, 33, 64, 515}) {
    const int64_t rows = 5, stride = d + 3;
    Exact<BFloat16> w(extent(rows, d, stride)), to(d);
    Exact<float> inv_norm(rows), dw(d);
    for (BFloat16& v : w) v = rounded(normal());
    for (int64_t k = 0; k < d; ++k) w[stride + k] = rounded(0), w[2 * stride + k] = rounded(1e-14);
    unit().inverse_norms(w, rows, d, stride, inv_norm);
    const double roundings = kUlp<float> * (4 + std::sqrt(static_cast<double>(d)));
    for (int64_t j = 0; j < rows; ++j) {
      double squares = 0;
      for (int64_t k = 0; k < d; ++k) squares += value(w[j * stride + k]) * value(w[j * stride + k]);
      const double norm = std::max(std::sqrt(squares), kEps);
      CHECK(close(inv_norm[j] * norm, 1, roundings), d, j, inv_norm[j], 1 / norm);
      CHECK((inv_norm[j] == 1 / static_cast<float>(kEps)) == (norm == kEps), d, j, inv_norm[j]);
    }
    for (float& v : dw) v = static_cast<float>(normal());
    unit().project(dw, w, d, 0.3f, to);
    for (int64_t k = 0; k < d; ++k) {
      const double term = double{0.3f} * value(w[k]), want = dw[k] - term;
      const double tolerance =
          std::fabs(want) * 0x1p-8 + kUlp<float> * (std::fabs(double{dw[k]}) + std::fabs(term));
      CHECK(close(value(to[k]), want, tolerance), d, k, value(to[k]), want);
    }
  }
}

void tests() {
  CHECK(unit().products.panel == kPanel && unit().products.depth_step == kDepthStep);
  test_matmul();
  test_matmul_isolates();
  test_matmul_adds_at_the_end();
  test_pack();
  test_pack_transposed();
  test_scale();
  test_round();
  test_rows();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
