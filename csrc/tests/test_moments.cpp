// What the driver sums up of the negatives, and second targets, from end to end against the definition in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"

namespace cosface::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A problem with what moments need besides.
template <typename T>
struct Moments : Problem<T> {
  using Problem<T>::shape;
  Exact<int64_t> second;
  Exact<T> g_cos, g_moments;  // (2, N) each

  Moments(Shape shape, DType dtype, double scale, bool reshaped)
      : Problem<T>(shape, dtype, shape.d + 3, scale), second(shape.n), g_cos(2 * shape.n), g_moments(2 * shape.n) {
    for (int64_t i = 0; i < shape.n; ++i) {
      const int64_t other = (i * 7 + 5) % std::max<int64_t>(shape.classes, 1);
      second[i] = i % 4 == 3 || other == this->y[i] ? -1 : other;
    }
    for (T& g : g_cos) g = static_cast<T>(normal());
    for (T& g : g_moments) g = static_cast<T>(normal());
    for (int64_t i = 2; i < shape.n; i += 5) {  // no gradient, whatever x holds
      for (int64_t k : {i, shape.n + i}) g_cos[k] = g_moments[k] = 0;
      this->g_lse[i] = 0;
    }
    if (reshaped) this->q = T(1), this->a = T(0.3), this->b = T(0), this->tau.assign(shape.n, T(0.0017));
  }

  Batch<T> batch() const {
    Batch<T> batch = Problem<T>::batch();
    batch.second = second;
    return batch;
  }
  bool is_target(int64_t i, int64_t j) const { return j == this->y[i] || j == second[i]; }
};

template <typename T>
struct Run {
  Exact<T> loss, top, log_sum, target_cos, max_neg, moments, dx, dscale;
  Exact<char> dw;

  Run(const Moments<T>& p, const Runtime& host)
      : loss(p.shape.n),
        top(p.shape.n),
        log_sum(p.shape.n),
        target_cos(2 * p.shape.n),
        max_neg(p.shape.n),
        moments(4 * p.shape.n),
        dx(p.shape.n * p.shape.d),
        dscale(p.shape.n),
        dw(p.shape.classes * p.shape.d * size_of(p.dtype)) {
    lmcl_forward<T>(p.batch(), p.weights(), p.margin, {}, host,
                    {loss, top, log_sum, target_cos, max_neg, moments});
    lmcl_backward<T>(p.batch(), p.weights(), {top, log_sum, p.g_lse, p.g_cos, p.g_moments}, {}, host,
                     {dx.begin(), dw.begin(), dscale.begin()});
  }
  bool same_bits(const Run& other) const {
    return moments.same_bits(other.moments) && target_cos.same_bits(other.target_cos) && dx.same_bits(other.dx) &&
           dw.same_bits(other.dw) && dscale.same_bits(other.dscale) && log_sum.same_bits(other.log_sum);
  }
};

// Takes v_hat from the gradient of v / |v| to that of v.
void through_norm(const double* v_hat, double norm, int64_t d, double* g) {
  double dot = 0;
  for (int64_t k = 0; k < d; ++k) dot += v_hat[k] * g[k];
  for (int64_t k = 0; k < d; ++k) g[k] = (g[k] - dot * v_hat[k]) / norm;
}

template <typename T>
std::vector<double> unit_rows(int64_t rows, int64_t d, T at, std::vector<double>& norms) {
  std::vector<double> hat(rows * d);
  norms.assign(rows, 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < d; ++k) norms[i] += at(i, k) * at(i, k);
    norms[i] = std::sqrt(norms[i]);
    for (int64_t k = 0; k < d; ++k) hat[i * d + k] = at(i, k) / norms[i];
  }
  return hat;
}

template <typename T>
void check(const Moments<T>& p, const Run<T>& got) {
  const auto [n, classes, d] = p.shape;
  std::vector<double> x_norm, w_norm;
  const auto x_hat = unit_rows(n, d, [&](int64_t i, int64_t k) { return double{p.x[i * d + k]}; }, x_norm);
  const auto w_hat = unit_rows(classes, d, [&](int64_t j, int64_t k) { return p.weight(j, k); }, w_norm);
  std::vector<double> dw(classes * d), dw_size(classes);
  const double tolerance = 4 * p.tolerance(), product_tolerance = tolerance + p.operand_tolerance();
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> cos(classes), dx(d);
    double top = -kInf, max_neg = -kInf, sum = 0, all = 0, below = 0, hard_sum = 0, hard_count = 0;
    for (int64_t j = 0; j < classes; ++j) {
      for (int64_t k = 0; k < d; ++k) cos[j] += x_hat[i * d + k] * w_hat[j * d + k];
      if (p.is_target(i, j)) continue;
      top = std::max(top, p.shaped(i, cos[j])), max_neg = std::max(max_neg, cos[j]);
    }
    for (int64_t j = 0; j < classes; ++j) {
      if (p.is_target(i, j)) continue;
      const double shaped = p.shaped(i, cos[j]), e = std::exp(p.s[i] * (shaped - top));
      sum += e, below += e * (top - shaped), all += shaped;
      if (p.hard(i, cos[j])) hard_sum += cos[j], hard_count += 1;
    }
    const double log_sum = std::log(sum), size = tolerance * static_cast<double>(classes + 1);
    const double mean_below = sum > 0 ? below / sum : 0;
    CHECK(close(got.moments[i], mean_below, size), n, classes, i, got.moments[i], mean_below);
    CHECK(close(got.moments[n + i], all, size), n, classes, i, got.moments[n + i], all);
    CHECK(close(got.moments[2 * n + i], hard_sum, size), n, classes, i, got.moments[2 * n + i], hard_sum);
    CHECK(close(got.moments[3 * n + i], hard_count, 0), n, classes, i, got.moments[3 * n + i], hard_count);
    CHECK(close(got.max_neg[i], max_neg, tolerance), n, classes, i, got.max_neg[i], max_neg);
    const int64_t targets[] = {p.y[i], p.second[i]};
    for (int64_t t = 0; t < 2; ++t) {
      const double want = targets[t] < 0 ? 0 : cos[targets[t]];
      CHECK(close(got.target_cos[t * n + i], want, tolerance), n, classes, i, t, got.target_cos[t * n + i], want);
    }
    double dscale = 0, g_size = 0;
    const double b = p.g_moments[i], c = p.g_moments[n + i];
    for (int64_t j = 0; j < classes; ++j) {
      const double shaped = p.shaped(i, cos[j]), prob = std::exp(p.s[i] * (shaped - top) - log_sum);
      const double t = (p.g_lse[i] + b * (shaped - top)) * prob;
      const double g_neg = (p.s[i] * t + b * prob + c) * p.slope(i, cos[j]);
      const double g = j == p.y[i] ? p.g_cos[i] : j == p.second[i] ? p.g_cos[n + i] : g_neg;
      if (!p.is_target(i, j)) dscale += t * shaped;
      const double magnitude = std::fabs(g) + (std::fabs(p.s[i] * t) + std::fabs(b * prob)) * 4;
      g_size += magnitude, dw_size[j] += magnitude / w_norm[j];
      for (int64_t k = 0; k < d; ++k) {
        dx[k] += g * w_hat[j * d + k];
        dw[j * d + k] += g * x_hat[i * d + k];
      }
    }
    through_norm(&x_hat[i * d], x_norm[i], d, dx.data());
    CHECK(close(got.dscale[i], dscale, tolerance * (1 + g_size)), n, classes, i, got.dscale[i], dscale);
    for (int64_t k = 0; k < d; ++k) {
      CHECK(close(got.dx[i * d + k], dx[k], product_tolerance * (g_size + 1) / x_norm[i]), n, classes, d, i, k,
            got.dx[i * d + k], dx[k]);
    }
  }
  const double ulp = p.dtype == DType::kBFloat16 ? 0x1p-8 : kUlp<T>;
  for (int64_t j = 0; j < classes; ++j) {
    through_norm(&w_hat[j * d], w_norm[j], d, &dw[j * d]);
    for (int64_t k = 0; k < d; ++k) {
      const double want = dw[j * d + k], value = get(got.dw, p.dtype, j * d + k);
      CHECK(close(value, want, product_tolerance * (dw_size[j] + 1) + ulp * std::fabs(want)), n, classes, d, j, k,
            value, want);
    }
  }
}

template <typename T>
void test_shapes(DType dtype) {
  for (const Shape shape :
       {Shape{1, 1, 3}, {5, 2, 4}, {7, 300, 9}, {33, 129, 16}, {260, 90, 8}, {3, 2, 1}, {0, 4, 2}}) {
    for (const bool reshaped : {false, true}) {
      for (const double scale : {1.0, 32.0}) {
        const Moments<T> p(shape, dtype, scale, reshaped);
        const Run<T> got(p, runtime(3, 32));
        check(p, got);
        CHECK(got.same_bits(Run<T>(p, runtime(3, 32, Order::kReversed))), shape.n, shape.classes);
        check(p, Run<T>(p, runtime(1, 0)));
      }
    }
  }
}

void tests() {
  test_shapes<double>(DType::kFloat64);
  test_shapes<float>(DType::kFloat32);
  test_shapes<float>(DType::kBFloat16);
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
