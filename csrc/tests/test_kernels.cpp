// Every kernel of the table in use against a loop in double, over ragged sizes, on memory of the exact size.
//
// Tolerances are in units of eps, the spacing of T at 1, with the reason beside each.
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"

namespace cosface::test {
namespace {

constexpr int64_t kSizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 515};
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

template <typename T>
constexpr double kUlp = std::numeric_limits<T>::epsilon();
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();

std::mt19937_64 engine(20260);

double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine); }

template <typename T>
void fill(const Exact<T>& values, double low = -1, double high = 1) {
  for (T& v : values) v = static_cast<T>(uniform(low, high));
}

bool close(double got, double want, double tolerance) {
  return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
}

// The memory of a strided matrix: nothing after the last element of the last row.
int64_t extent(int64_t rows, int64_t cols, int64_t stride) { return rows == 0 ? 0 : (rows - 1) * stride + cols; }

// What lies between the rows of a matrix is nan still.
template <typename T>
void check_padding(const Exact<T>& z, int64_t rows, int64_t cols, int64_t stride) {
  for (int64_t i = 0; i + 1 < rows; ++i) {
    for (int64_t j = cols; j < stride; ++j) CHECK(std::isnan(z[i * stride + j]), rows, cols, stride, i, j);
  }
}

template <typename T>
double clamped_norm(const T* v, int64_t d) {
  double sum = 0;
  for (int64_t k = 0; k < d; ++k) sum += double{v[k]} * double{v[k]};
  return std::max(std::sqrt(sum), kEps);
}

// A sum of d squares in T carries about sqrt(d) roundings; then a root, a quotient and a product.
template <typename T>
double norm_tolerance(int64_t d) {
  return kUlp<T> * (4 + std::sqrt(static_cast<double>(d)));
}

// Rows of norms 0, below the clamp and far from 1, and the rest random.
template <typename T>
void special_rows(T* v, int64_t rows, int64_t d, int64_t stride) {
  const double factors[] = {1, 0, 1e-14, 1e-9, 1e9, 1};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < d; ++k) v[i * stride + k] *= static_cast<T>(factors[i % 6]);
  }
}

template <typename T>
void test_normalize() {
  for (int64_t rows : {0, 1, 7}) {
    for (int64_t d : kSizes) {
      Exact<T> x(rows * d), x_hat(rows * d), inv_norm(rows);
      fill(x);
      special_rows<T>(x, rows, d, d);
      for (int64_t i = 0; i < rows; ++i) kernels<T>().normalize(x + i * d, d, x_hat + i * d, inv_norm + i);
      for (int64_t i = 0; i < rows; ++i) {
        const double norm = clamped_norm<T>(x + i * d, d), tolerance = norm_tolerance<T>(d);
        CHECK(close(inv_norm[i] * norm, 1, tolerance), rows, d, i, inv_norm[i], 1 / norm);
        for (int64_t k = 0; k < d; ++k) {
          const double want = x[i * d + k] / norm;
          CHECK(close(x_hat[i * d + k], want, tolerance * std::fabs(want)), d, i, k, x_hat[i * d + k], want);
        }
      }
    }
  }
}

template <typename T>
void test_inverse_norms() {
  for (int64_t rows : {0, 1, 7, 17}) {
    for (int64_t d : kSizes) {
      for (int64_t stride : {d, d + 1, 2 * d + 5, int64_t{0}}) {
        Exact<T> w(extent(rows, d, stride)), inv_norm(rows);
        fill(w);
        if (stride) special_rows<T>(w, rows, d, stride);
        kernels<T>().inverse_norms(w, rows, d, stride, inv_norm);
        for (int64_t j = 0; j < rows; ++j) {
          const double norm = clamped_norm<T>(w + j * stride, d);
          CHECK(close(inv_norm[j] * norm, 1, norm_tolerance<T>(d)), rows, d, stride, j, inv_norm[j], 1 / norm);
        }
      }
    }
  }
}

// A clamped row must be recognised by the kernels that skip its projection.
template <typename T>
void test_clamp_is_exact() {
  for (double norm : {0.0, 1e-30, 9.9e-13}) {
    Exact<T> w(1, static_cast<T>(norm)), inv_norm(1);
    kernels<T>().inverse_norms(w, 1, 1, 1, inv_norm);
    CHECK(inv_norm[0] == 1 / T(kEps), norm, inv_norm[0]);
  }
  Exact<T> w(1, T(1.1e-12)), inv_norm(1);
  kernels<T>().inverse_norms(w, 1, 1, 1, inv_norm);
  CHECK(inv_norm[0] < 1 / T(kEps), inv_norm[0]);
}

template <typename T>
void test_pack_transposed() {
  const int64_t panel = kernels<T>().products.panel;
  for (int64_t rows : kSizes) {
    for (int64_t d : {1, 3, 16, 33}) {
      for (int64_t stride : {d, d + 7}) {
        const int64_t panels = (rows + panel - 1) / panel;
        Exact<T> v(extent(rows, d, stride)), to(panels * panel * d);
        fill(v);
        kernels<T>().products.pack_transposed(v, rows, d, stride, to);
        for (int64_t i = 0; i < panels * panel; ++i) {
          for (int64_t k = 0; k < d; ++k) {
            const T got = to[i / panel * d * panel + k * panel + i % panel],
                    want = i < rows ? v[i * stride + k] : 0;
            CHECK(got == want, rows, d, stride, i, k, got, want);
          }
        }
      }
    }
  }
}

// As a part of a matrix with more rows, whose places stay as they are.
template <typename T>
void test_pack() {
  const int64_t panel = kernels<T>().products.panel;
  for (int64_t rows : kSizes) {
    for (int64_t panels : {0, 1, 3}) {
      for (int64_t gap : {0, 7}) {
        const int64_t width = panels * panel, stride = width + gap, panel_stride = (rows + gap) * panel;
        Exact<T> v(extent(rows, width, stride)), to(extent(panels, rows * panel, panel_stride));
        fill(v);
        kernels<T>().products.pack(v, rows, width, stride, to, panel_stride);
        check_padding(to, rows == 0 ? 0 : panels, rows * panel, panel_stride);
        for (int64_t j = 0; j < rows; ++j) {
          for (int64_t k = 0; k < width; ++k) {
            const T got = to[k / panel * panel_stride + j * panel + k % panel], want = v[j * stride + k];
            CHECK(got == want, rows, panels, gap, j, k, got, want);
          }
        }
      }
    }
  }
}

// a in rows or in columns, b in the panels of pack_transposed or in rows, with gaps between rows that stay as they
// are.
template <typename T>
void test_matmul(int64_t rows, int64_t panels, int64_t depth, bool a_in_columns, bool b_packed, bool accumulate) {
  const int64_t panel = kernels<T>().products.panel, cols = panels * panel;
  const int64_t a_stride = (a_in_columns ? rows : depth) + 1, c_stride = cols + 3;
  Exact<T> a(a_in_columns ? extent(depth, rows, a_stride) : extent(rows, depth, a_stride));
  const int64_t b_stride = b_packed ? panel : cols + 5;
  Exact<T> b(b_packed ? depth * cols : extent(depth, cols, b_stride)), c(extent(rows, cols, c_stride));
  fill(a), fill(b);
  for (int64_t i = 0; accumulate && i < rows; ++i) std::fill_n(c + i * c_stride, cols, T(i + 1));
  const Left<T> left{a, a_in_columns ? 1 : a_stride, a_in_columns ? a_stride : 1};
  const Right<T> right{b, b_packed ? depth * panel : panel, b_stride};
  // a prefetch is a hint: it may run past the end of the memory that it is for
  const Ahead ahead{reinterpret_cast<uintptr_t>(a.begin()), reinterpret_cast<uintptr_t>(a.end())};
  kernels<T>().products.matmul(left, right, c, c_stride, rows, cols, depth, accumulate,
                               a_in_columns ? ahead : Ahead{});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double want = accumulate ? static_cast<double>(i + 1) : 0, size = want;
      for (int64_t k = 0; k < depth; ++k) {
        const double term = double{a[i * left.row_stride + k * left.depth_stride]} *
                            double{b[j / panel * right.panel_stride + k * b_stride + j % panel]};
        want += term;
        size += std::fabs(term);
      }
      // the errors of a sum of `depth` terms go either way
      const double tolerance = kUlp<T> * (2 + std::sqrt(static_cast<double>(depth))) * size;
      CHECK(close(c[i * c_stride + j], want, tolerance), rows, cols, depth, a_in_columns, b_packed, accumulate, i,
            j, c[i * c_stride + j], want);
    }
  }
  check_padding(c, rows, cols, c_stride);
}

template <typename T>
void test_matmul() {
  for (bool a_in_columns : {false, true}) {
    for (bool b_packed : {false, true}) {
      for (bool accumulate : {false, true}) {
        for (int64_t depth : {1, 3, 17, 255, 256, 257, 515}) {
          for (int64_t rows = 0; rows <= 30;
               rows += depth > 20 ? 7 : 1) {  // every number of rows that is left over
            for (int64_t panels : {0, 1, 3}) {
              if (depth > 20 && panels == 3) continue;
              test_matmul<T>(rows, panels, depth, a_in_columns, b_packed, accumulate);
            }
          }
        }
      }
    }
  }
}

// A nan in a row of a, or in a column of b, spoils that row or column of the product alone.
template <typename T>
void test_matmul_isolates() {
  const int64_t rows = 17, cols = 2 * kernels<T>().products.panel, depth = 5;
  Exact<T> a(rows * depth), b(depth * cols), c(rows * cols);
  fill(a), fill(b);
  a[8 * depth + 2] = static_cast<T>(kNan);
  b[3 * cols + 1] = static_cast<T>(kNan);
  kernels<T>().products.matmul({a, depth, 1}, {b, kernels<T>().products.panel, cols}, c, cols, rows, cols, depth,
                               false, {});
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      CHECK(std::isnan(c[i * cols + j]) == (i == 8 || j == 1), i, j, c[i * cols + j]);
  }
}

// Samples (rows) against classes that are cut into tiles of `cols`: dot products, targets in and around every
// tile, scales.
template <typename T>
struct Problem {
  static constexpr int64_t kTiles = 3;

  int64_t rows, cols, classes;
  Exact<T> dots, inv_norm, s;
  Exact<int64_t> y;

  Problem(int64_t rows, int64_t cols, double scale)
      : rows(rows),
        cols(cols),
        classes(kTiles * cols),
        dots(rows * classes),
        inv_norm(classes),
        s(rows, static_cast<T>(scale)),
        y(rows, -1) {
    fill(inv_norm, 0.1, 3);
    const int64_t targets[] = {0, cols, 2 * cols - 1, -1, cols - 1, 2 * cols, classes - 1, cols + cols / 2};
    for (int64_t i = 0; i < rows; ++i) {
      y[i] = classes ? targets[i % 8] : -1;
      s[i] *= static_cast<T>(uniform(0.9, 1));
      for (int64_t j = 0; j < classes; ++j) {
        // the cosines of even rows rise from tile to tile, those of odd rows fall
        const double trend = 0.4 * (static_cast<double>(j / cols) - 1) * (i % 2 ? -1 : 1);
        dots[i * classes + j] = static_cast<T>((uniform(-0.6, 0.6) + trend) / inv_norm[j]);
      }
    }
  }

  double cos(int64_t i, int64_t j) const { return double{dots[i * classes + j]} * double{inv_norm[j]}; }

  double top(int64_t i) const {
    double top = -kInf;
    for (int64_t j = 0; j < classes; ++j) top = j == y[i] ? top : std::max(top, cos(i, j));
    return top;
  }

  double log_sum(int64_t i) const {
    double sum = 0;
    for (int64_t j = 0; j < classes; ++j) sum += j == y[i] ? 0 : std::exp(s[i] * (cos(i, j) - top(i)));
    return std::log(sum);
  }

  double lse(int64_t i) const { return s[i] * top(i) + log_sum(i); }

  // What the roundings of cos, of its product with s and of lse do to e^{s cos - lse}, relatively.
  double exp_tolerance(int64_t i) const { return kUlp<T> * (4 + 4 * double{s[i]}); }

  // The tile's dot products, class by class, in rows `stride` apart; what lies between the rows stays nan.
  Exact<T> tile(int64_t first, int64_t stride) const {
    Exact<T> z(extent(cols, rows, stride));
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t i = 0; i < rows; ++i) z[j * stride + i] = dots[i * classes + first + j];
    }
    return z;
  }
};

template <typename T>
void test_forward_tile(const Problem<T>& p, int64_t stride) {
  Exact<T> row_max(p.rows, kLowest<T>), target_cos(p.rows, T(7));
  Exact<double> row_sum(p.rows, 0);
  for (int64_t first = 0; first < p.classes; first += p.cols) {
    Exact<T> z = p.tile(first, stride), inv_norm(p.cols);
    std::copy_n(p.inv_norm + first, p.cols, inv_norm.begin());
    kernels<T>().forward_tile(z, p.cols, p.rows, stride, inv_norm, p.y, first, p.s, {}, row_max, nullptr, row_sum,
                              target_cos);
    check_padding(z, p.cols, p.rows, stride);
  }
  for (int64_t i = 0; i < p.rows; ++i) {
    double top = kLowest<T>;
    for (int64_t j = 0; j < p.classes; ++j) top = j == p.y[i] ? top : std::max(top, p.cos(i, j));
    CHECK(close(row_max[i], top, kUlp<T> * std::fabs(top)), p.rows, p.cols, i, p.y[i], row_max[i], top);
    const double target = p.y[i] < 0 ? 7 : p.cos(i, p.y[i]);
    CHECK(close(target_cos[i], target, kUlp<T> * std::fabs(target)), p.cols, i, target_cos[i], target);
    // lse is off by s times the rounding of cos, and by the relative error of the sum
    const double got = p.s[i] * double{row_max[i]} + std::log(row_sum[i]), want = p.lse(i);
    const double sum_tolerance = kUlp<T> * (std::sqrt(static_cast<double>(p.classes)) + std::fabs(want));
    CHECK(close(got, want, p.exp_tolerance(i) + sum_tolerance), p.rows, p.cols, p.s[i], i, p.y[i], got, want);
  }
}

template <typename T>
void test_forward_tile() {
  for (int64_t rows : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 129, 255, 256}) {
    for (int64_t cols : {0, 1, 2, 3, 16, 33, 65}) {
      if (rows > 33 && cols > 16) continue;
      for (double scale : {1.0, 16.0, 64.0, 128.0}) {
        test_forward_tile(Problem<T>(rows, cols, scale), rows + (rows % 2 ? 3 : 0));
      }
    }
  }
}

// A row whose only class is its target has no negatives: nothing is added, and nothing becomes nan.
template <typename T>
void test_forward_without_negatives() {
  Exact<T> z(1, T(2)), inv_norm(1, T(0.25)), s(1, T(64)), row_max(1, kLowest<T>), target_cos(1);
  Exact<double> row_sum(1, 0);
  Exact<int64_t> y(1, 5);
  kernels<T>().forward_tile(z, 1, 1, 1, inv_norm, y, 5, s, {}, row_max, nullptr, row_sum, target_cos);
  CHECK(row_max[0] == kLowest<T> && row_sum[0] == 0 && target_cos[0] == T(0.5), row_max[0], row_sum[0],
        target_cos[0]);
}

// A nan among the negatives makes lse of its row nan, wherever it stands, in every later tile too; a nan in the
// target makes target_cos nan. The other rows see nothing.
template <typename T>
void test_forward_isolates_rows() {
  constexpr int64_t kRows = 3, kCols = 67;
  for (int64_t bad : {0, 1, 15, 16, 40, 63, 64, 66}) {
    const Problem<T> p(kRows, kCols, 64);
    p.y[1] = kCols + 40;
    Exact<T> row_max(kRows, kLowest<T>), target_cos(kRows, T(0));
    Exact<double> row_sum(kRows, 0);
    for (int64_t first = 0; first < p.classes; first += kCols) {
      Exact<T> z = p.tile(first, kRows), inv_norm(kCols);
      std::copy_n(p.inv_norm + first, kCols, inv_norm.begin());
      if (first == kCols) z[bad * kRows + 1] = static_cast<T>(kNan);
      kernels<T>().forward_tile(z, kCols, kRows, kRows, inv_norm, p.y, first, p.s, {}, row_max, nullptr, row_sum,
                                target_cos);
    }
    const bool in_target = bad == 40;
    CHECK(std::isnan(row_sum[1]) == !in_target, bad, row_sum[1]);
    CHECK(std::isfinite(row_max[1]), bad, row_max[1]);  // the nan is in the sum alone
    CHECK(std::isnan(target_cos[1]) == in_target, bad, target_cos[1]);
    for (int64_t i : {0, 2}) {
      const double got = p.s[i] * double{row_max[i]} + std::log(row_sum[i]);
      CHECK(close(got, p.lse(i), p.exp_tolerance(i)), bad, i, got, p.lse(i));
    }
  }
}

// Entries fall into the bins of their own sample, whatever their distance from the largest is: one that rounding
// puts above it into the first, and a nan, as what is far, into the last.
template <typename T>
void test_tally() {
  constexpr int64_t kSamples = 3, kNear = 1;
  for (bool reshaped : {false, true}) {
    Exact<T> s(kSamples, T(2)), top(kSamples, T(0.5)), tau(kSamples, T(0.25));
    const Negatives<T> negatives{reshaped ? tau.begin() : nullptr, T(1), T(0), T(0.25)};  // N(0.5) = 0.5
    const T values[] = {T(0.5), T(0.75), T(100), T(0.1875), T(-200), static_cast<T>(kNan)};
    const int64_t bins_of[] = {0, 0, 0, 5, kBins - 1, kBins - 1};  // of 8 x 2 (0.5 - c)
    constexpr int64_t kCount = std::size(values);
    Exact<T> kept(kCount);
    std::copy_n(values, kCount, kept.begin());
    Exact<Place> place(kCount, Place(7 << 8 | kNear));
    Exact<uint32_t> bins(kSamples * kBins, 0);
    std::vector<uint32_t> want(kSamples * kBins);
    for (int64_t bin : bins_of) ++want[kNear * kBins + bin];
    kernels<T>().sparse_for(negatives).tally(kept, place, kCount, s, negatives, top, bins);
    for (int64_t k = 0; k < kSamples * kBins; ++k) CHECK(bins[k] == want[k], reshaped, k, bins[k], want[k]);
  }
}

template <typename T>
void test_backward_tile(const Problem<T>& p, int64_t stride) {
  const int64_t first = p.cols;
  Exact<T> top(p.rows), log_sum(p.rows), g_lse(p.rows), g_cos(p.rows), inv_norm(p.cols);
  std::copy_n(p.inv_norm + first, p.cols, inv_norm.begin());
  fill(g_lse);
  fill(g_cos, -5, 5);
  Exact<T> z = p.tile(first, stride);
  for (int64_t i = 0; i < p.rows; ++i) {
    top[i] = static_cast<T>(p.classes ? p.top(i) : 0);
    log_sum[i] = static_cast<T>(p.classes ? p.log_sum(i) : 0);
    if (i % 4 == 1) g_lse[i] = 0;
    if (i % 4 == 2) g_cos[i] = 0;
    if (i % 8 == 7) g_lse[i] = g_cos[i] = 0;  // no gradient
  }
  // the sums start anywhere
  Exact<T> col_dot(p.cols);
  Exact<double> row_dot(p.rows), dscale(p.rows);
  fill(col_dot), fill(row_dot), fill(dscale);
  std::vector<double> col(col_dot.begin(), col_dot.end()), row(row_dot.begin(), row_dot.end()),
      ds(dscale.begin(), dscale.end()), col_size(p.cols, 1), row_size(p.rows, 1), ds_size(p.rows, 1);
  kernels<T>().backward_tile(z, p.cols, p.rows, stride, inv_norm, p.y, first, p.s, {}, top, log_sum, g_lse, g_cos,
                             col_dot, row_dot, dscale);
  check_padding(z, p.cols, p.rows, stride);
  double worst = kUlp<T> * 4;
  for (int64_t i = 0; i < p.rows; ++i) {
    const bool active = g_lse[i] != 0 || g_cos[i] != 0;
    const double tolerance = active ? p.exp_tolerance(i) + kUlp<T> * std::fabs(double{log_sum[i]}) : 0;
    worst = std::max(worst, tolerance);
    for (int64_t j = 0; j < p.cols; ++j) {
      const double cos = p.cos(i, first + j), inv = inv_norm[j];
      const bool target = p.y[i] == first + j;
      const double prob =
          active && !target ? double{g_lse[i]} * std::exp(p.s[i] * (cos - top[i]) - log_sum[i]) : 0;
      const double g = target ? g_cos[i] : p.s[i] * prob;
      const double got = z[j * stride + i], want = g * inv;
      // below the smallest normal number, e^x is 0
      const double floor = std::fabs(p.s[i] * inv) * std::numeric_limits<T>::min();
      CHECK(close(got, want, tolerance * std::fabs(want) + floor), p.rows, p.cols, p.s[i], i, j, target, got,
            want);
      ds[i] += prob * cos, ds_size[i] += std::fabs(prob * cos);
      row[i] += g * cos, row_size[i] += std::fabs(g * cos);
      col[j] += g * cos, col_size[j] += std::fabs(g * cos);
    }
    const double sums = tolerance + kUlp<T> * (2 + std::sqrt(static_cast<double>(p.cols)));
    CHECK(close(row_dot[i], row[i], sums * row_size[i]), p.rows, p.cols, p.s[i], i, row_dot[i], row[i]);
    CHECK(close(dscale[i], ds[i], sums * ds_size[i]), p.rows, p.cols, p.s[i], i, dscale[i], ds[i]);
  }
  for (int64_t j = 0; j < p.cols; ++j) {
    CHECK(close(col_dot[j], col[j], (worst + kUlp<T> * std::sqrt(static_cast<double>(p.rows))) * col_size[j]),
          p.rows, p.cols, j, col_dot[j], col[j]);
  }
}

template <typename T>
void test_backward_tile() {
  for (int64_t rows : {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 129, 255, 256}) {
    for (int64_t cols : {0, 1, 2, 3, 16, 33, 65}) {
      if (rows > 33 && cols > 16) continue;
      for (double scale : {1.0, 16.0, 64.0, 128.0}) {
        test_backward_tile(Problem<T>(rows, cols, scale), rows + (rows % 2 ? 0 : 5));
      }
    }
  }
}

// Both passes round a cosine alike, so that probabilities sum to 1 however large the logits are: an fma in one of
// them would be off by an ulp of z.
template <typename T>
void test_probabilities_of_large_logits() {
  constexpr int64_t kRows = 33, kCols = 65;
  for (double scale : {1e2, 1e5, 1e8, 1e12, 1e18, 1e30}) {
    const Problem<T> p(kRows, kCols, scale);
    Exact<T> top(kRows, kLowest<T>), target_cos(kRows), log_sum(kRows), ones(kRows, T(1)), zeros(kRows, T(0));
    Exact<double> row_sum(kRows, 0), row_dot(kRows, 0), dscale(kRows, 0);
    std::vector<double> sum(kRows, 0);
    const auto each_tile = [&](auto body) {
      for (int64_t first = 0; first < p.classes; first += kCols) {
        Exact<T> z = p.tile(first, kRows), inv_norm(kCols);
        std::copy_n(p.inv_norm + first, kCols, inv_norm.begin());
        body(first, z, inv_norm);
      }
    };
    each_tile([&](int64_t first, Exact<T>& z, Exact<T>& inv_norm) {
      kernels<T>().forward_tile(z, kCols, kRows, kRows, inv_norm, p.y, first, p.s, {}, top, nullptr, row_sum,
                                target_cos);
    });
    for (int64_t i = 0; i < kRows; ++i) log_sum[i] = static_cast<T>(std::log(row_sum[i]));
    each_tile([&](int64_t first, Exact<T>& z, Exact<T>& inv_norm) {
      Exact<T> col_dot(kCols, T(0));
      kernels<T>().backward_tile(z, kCols, kRows, kRows, inv_norm, p.y, first, p.s, {}, top, log_sum, ones, zeros,
                                 col_dot, row_dot, dscale);
      for (int64_t j = 0; j < kCols; ++j) {
        for (int64_t i = 0; i < kRows; ++i) sum[i] += double{z[j * kRows + i]} / inv_norm[j] / p.s[i];
      }
    });
    for (int64_t i = 0; i < kRows; ++i) CHECK(close(sum[i], 1, 64 * kUlp<T>), scale, i, sum[i]);
  }
}

// A nan of one sample and one class stays with that sample and that class.
template <typename T>
void test_backward_isolates() {
  constexpr int64_t kRows = 19, kCols = 67;
  const Problem<T> p(kRows, kCols, 64);
  Exact<T> z = p.tile(0, kRows), top(kRows), log_sum(kRows), ones(kRows, T(1)), col_dot(kCols, T(0));
  Exact<double> row_dot(kRows, 0), dscale(kRows, 0);
  for (int64_t i = 0; i < kRows; ++i) {
    top[i] = static_cast<T>(p.top(i));
    log_sum[i] = static_cast<T>(p.log_sum(i));
  }
  constexpr int64_t kBadRow = 17, kBadCol = 33;
  z[kBadCol * kRows + kBadRow] = static_cast<T>(kNan);
  kernels<T>().backward_tile(z, kCols, kRows, kRows, p.inv_norm, p.y, 0, p.s, {}, top, log_sum, ones, ones,
                             col_dot, row_dot, dscale);
  for (int64_t i = 0; i < kRows; ++i) {
    CHECK(std::isnan(row_dot[i]) == (i == kBadRow) && std::isnan(dscale[i]) == (i == kBadRow), i, row_dot[i]);
    for (int64_t j = 0; j < kCols; ++j) {
      CHECK(std::isnan(z[j * kRows + i]) == (i == kBadRow && j == kBadCol), i, j, z[j * kRows + i]);
    }
  }
  for (int64_t j = 0; j < kCols; ++j) CHECK(std::isnan(col_dot[j]) == (j == kBadCol), j, col_dot[j]);
}

// With norms, scale and upstream of 1, top = 0 and log_sum = 0, the gradient of a negative is e^z itself; no
// probability is above 1.
template <typename T>
void test_exp() {
  std::vector<T> points;
  const double lowest = std::log(double{std::numeric_limits<T>::min()});
  constexpr int kSteps = 40000;
  for (int k = 0; k <= kSteps; ++k) points.push_back(static_cast<T>(lowest * k / kSteps));
  for (int k = -200; k <= 2; ++k) {  // where the reduction changes its integer
    const T boundary = static_cast<T>((k + 0.5) * std::log(2.0));
    for (T v : {std::nextafter(boundary, kLowest<T>), boundary, std::nextafter(boundary, T(1e30))}) {
      points.push_back(v);
    }
  }
  points.resize((points.size() + kTileRows - 1) / kTileRows * kTileRows, T(0));
  const auto n = static_cast<int64_t>(points.size()), classes = n / kTileRows;
  Exact<T> z(n), ones(n, T(1)), zeros(kTileRows, T(0)), col_dot(classes, T(0));
  Exact<double> row_dot(kTileRows, 0), dscale(kTileRows, 0);
  std::copy(points.begin(), points.end(), z.begin());
  const Exact<int64_t> none(kTileRows, -1);
  kernels<T>().backward_tile(z, classes, kTileRows, kTileRows, ones, none, 0, ones, {}, zeros, zeros, ones, zeros,
                             col_dot, row_dot, dscale);
  for (int64_t k = 0; k < n; ++k) {
    const double want = std::exp(std::min(double{points[k]}, 0.0));
    if (points[k] < lowest + 1e-3) {
      CHECK(z[k] == 0 || close(z[k], want, 2 * kUlp<T> * want), points[k], z[k], want);
    } else {
      CHECK(close(z[k], want, 2 * kUlp<T> * want), points[k], z[k], want, (z[k] - want) / want);
    }
  }

  const double far[] = {-kInf, -1e30, -1000, kLowest<T>, 0, 89, 1e30, kInf, kNan};
  for (double x : far) {
    Exact<T> one(1, static_cast<T>(x)), col(1, T(0));
    Exact<double> row(1, 0), ds(1, 0);
    kernels<T>().backward_tile(one, 1, 1, 1, ones, none, 0, ones, {}, zeros, zeros, ones, zeros, col, row, ds);
    if (x <= -1000) CHECK(one[0] == 0, x, one[0]);
    if (x >= 0) CHECK(one[0] == 1, x, one[0]);
    if (std::isnan(x)) CHECK(std::isnan(one[0]), x, one[0]);
  }
}

template <typename T>
void test_project() {
  for (int64_t d : kSizes) {
    Exact<T> dw(d), w(d);
    fill(dw), fill(w);
    const Exact<T> before(dw);
    const T projection = static_cast<T>(uniform(-2, 2));
    kernels<T>().project(dw, w, d, projection);
    for (int64_t k = 0; k < d; ++k) {
      const double term = double{projection} * double{w[k]}, want = before[k] - term;
      const double tolerance = kUlp<T> * (std::fabs(double{before[k]}) + std::fabs(term));
      CHECK(close(dw[k], want, tolerance), d, k, dw[k], want);
    }
  }
}

// A product z comes back as a cosine's nearest step of 1/32767 (float), or as it was (double).
template <typename T>
void test_cosine_cache() {
  constexpr bool kRounds = sizeof(T) == 4;
  for (int64_t classes : {1, 3}) {
    for (int64_t n : kSizes) {
      const int64_t stride = n + 5;
      Exact<T> z(extent(classes, n, stride)), back(extent(classes, n, stride)), inv_norm(classes);
      Exact<char> kept(classes * n * (kRounds ? 2 : 8));
      const double norms[] = {1, 1e-9, 1e9};
      for (int64_t j = 0; j < classes; ++j) {
        inv_norm[j] = static_cast<T>(1 / norms[j]);
        for (int64_t i = 0; i < n; ++i) {
          const double cos = i == 0 ? 1 : i == 1 ? -1 : i == 2 ? 0 : uniform(-1, 1);
          z[j * stride + i] = static_cast<T>(cos * norms[j]);
        }
      }
      kernels<T>().keep_cosines(z, classes, n, stride, inv_norm, kept);
      kernels<T>().recall_cosines(kept, classes, n, stride, inv_norm, back);
      check_padding(back, classes, n, stride);
      for (int64_t j = 0; j < classes; ++j) {
        for (int64_t i = 0; i < n; ++i) {
          const double want = z[j * stride + i] / norms[j], got = back[j * stride + i] / norms[j];
          CHECK(close(got, want, kRounds ? 0.5 / 32767 + 4 * kUlp<T> : 0), classes, n, j, i, got, want);
        }
      }
    }
  }
}

template <typename T>
void test_finish_dx() {
  for (int64_t d : kSizes) {
    for (int64_t parts : {0, 1, 2, 4}) {
      for (T inv_norm : {T(0), T(0.3), T(1 / T(kEps))}) {
        const int64_t part_stride = d + 11;
        Exact<T> dx_hat(extent(parts, d, part_stride)), x(d), dx(d);
        fill(dx_hat), fill(x);
        const T row_dot = static_cast<T>(uniform(-3, 3));
        kernels<T>().finish_dx(dx_hat, parts, part_stride, x, row_dot, inv_norm, d, dx);
        for (int64_t k = 0; k < d; ++k) {
          const double dot = inv_norm >= 1 / T(kEps) ? 0 : row_dot;
          double sum = 0, size = std::fabs(dot);
          for (int64_t part = 0; part < parts; ++part) {
            sum += dx_hat[part * part_stride + k];
            size += std::fabs(double{dx_hat[part * part_stride + k]});
          }
          const double want = (sum - dot * x[k] * inv_norm) * inv_norm;
          CHECK(close(dx[k], want, 4 * kUlp<T> * size * inv_norm), d, parts, inv_norm, k, dx[k], want);
        }
      }
    }
  }
}

template <typename T>
void all_of() {
  test_normalize<T>();
  test_inverse_norms<T>();
  test_clamp_is_exact<T>();
  test_pack_transposed<T>();
  test_pack<T>();
  test_matmul<T>();
  test_matmul_isolates<T>();
  test_forward_tile<T>();
  test_forward_without_negatives<T>();
  test_tally<T>();
  test_forward_isolates_rows<T>();
  test_backward_tile<T>();
  test_probabilities_of_large_logits<T>();
  test_backward_isolates<T>();
  test_exp<T>();
  test_project<T>();
  test_cosine_cache<T>();
  test_finish_dx<T>();
}

void tests() {
  all_of<float>();
  all_of<double>();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
