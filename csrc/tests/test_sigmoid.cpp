// Classes that count each on its own, from end to end against the definition in double.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "problem.h"

namespace cosface::test {
namespace {

// A problem whose log_sum is -bias, so that some p_ij are near 0 and some are not.
template <typename T>
struct Sigmoids : Problem<T> {
  using Problem<T>::shape;
  Sigmoid<T> sigmoid;

  Sigmoids(Shape shape, DType dtype, double scale, bool by_angle)
      : Problem<T>(shape, dtype, shape.d + 3, scale), sigmoid{by_angle} {
    const double value[] = {-0.35, 0.75, 0.75, 0.25, 0.1}, slope[] = {0.7, 1.5, 0.8, -0.3, 0.2};
    for (int64_t k = 0; !by_angle && k < 5; ++k) {
      sigmoid.value[k] = static_cast<T>(value[k]), sigmoid.slope[k] = static_cast<T>(slope[k]);
    }
    for (int64_t i = 0; i < shape.n; ++i) {
      const double middle = by_angle ? 1.4 : -0.1,
                   bias = this->s[i] * (middle + 0.01 * static_cast<double>(i % 7));
      this->log_sum[i] = static_cast<T>(-bias);
    }
    for (int64_t i = 2; i < shape.n; i += 5) {  // no gradient, whatever x and its bias hold
      this->g_lse[i] = this->g_cos[i] = 0;
      this->log_sum[i] = std::numeric_limits<T>::quiet_NaN();
      for (int64_t k = 0; k < shape.d; ++k) this->set_x(i * shape.d + k, std::numeric_limits<double>::quiet_NaN());
    }
    for (int64_t i = 3; i < shape.n; i += 5) this->g_lse[i] = 0;  // of the target alone
  }

  Batch<T> batch() const {
    Batch<T> batch = Problem<T>::batch();
    batch.sigmoid = sigmoid;
    return batch;
  }
  Upstream<T> upstream() const { return {this->top, this->log_sum, this->g_lse, this->g_cos}; }
  double value(double c) const {
    return sigmoid.by_angle ? -std::acos(std::clamp(c, -1.0, 1.0)) : at(sigmoid.value, c);
  }
  double slope(double c) const { return at(sigmoid.slope, c); }

 private:
  static double at(const T* k, double c) { return (((k[4] * c + k[3]) * c + k[2]) * c + k[1]) * c + k[0]; }
};

template <typename T>
struct Run {
  Exact<T> sums, dx, dscale;
  Exact<char> dw;

  Run(const Sigmoids<T>& p, const Runtime& host)
      : sums(2 * p.shape.n),
        dx(p.shape.n * p.shape.d),
        dscale(p.shape.n),
        dw(p.shape.classes * p.shape.d * size_of(p.dtype)) {
    lmcl_backward<T>(p.batch(), p.weights(), p.upstream(), {}, host,
                     {dx.begin(), dw.begin(), dscale.begin(), nullptr, sums.begin()});
  }
  bool same_bits(const Run& other) const {
    return sums.same_bits(other.sums) && dx.same_bits(other.dx) && dw.same_bits(other.dw) &&
           dscale.same_bits(other.dscale);
  }
};

template <typename At>
double norm(int64_t d, At at) {
  double squares = 0;
  for (int64_t k = 0; k < d; ++k) squares += at(k) * at(k);
  return std::sqrt(squares);
}

template <typename T>
void check(const Sigmoids<T>& p, const Run<T>& got) {
  const auto [n, classes, d] = p.shape;
  const bool by_angle = p.sigmoid.by_angle;
  const double tolerance = 4 * p.tolerance(), of_products = p.operand_tolerance();
  std::vector<double> w_norm(classes), dw(classes * d), dw_size(classes);
  for (int64_t j = 0; j < classes; ++j) w_norm[j] = norm(d, [&](int64_t k) { return p.weight(j, k); });
  for (int64_t i = 0; i < n; ++i) {
    const bool active = p.active(i);
    const T* x = p.x + i * d;
    const double x_norm = norm(d, [&](int64_t k) { return double{x[k]}; });
    std::vector<double> dx(d);
    double added = 0, mass = 0, dscale = 0, size = 0, g_size = 0;
    for (int64_t j = 0; active && j < classes; ++j) {
      double cos = 0;
      for (int64_t k = 0; k < d; ++k) cos += x[k] * p.weight(j, k) / (x_norm * w_norm[j]);
      const double shaped = p.value(cos), z = p.s[i] * shaped - p.log_sum[i], prob = 1 / (1 + std::exp(-z));
      const double adds = by_angle ? prob * cos : std::log1p(std::exp(z)), t = p.g_lse[i] * prob;
      const bool is_target = j == p.y[i];
      const double g = is_target ? p.g_cos[i] : by_angle ? t : p.s[i] * t * p.slope(cos);
      // the error of z by one of cos: near |cos| = 1 arccos has no slope
      const double steep = by_angle ? 1 + 1 / std::sqrt(std::fabs(1 - cos * cos) + tolerance) : 4;
      if (!is_target) {
        added += adds, mass += prob, size += (std::fabs(adds) + prob) * steep;
        if (!by_angle) dscale += t * shaped;
      }
      const double error =
          (tolerance * steep + of_products) * (std::fabs(g) + (by_angle ? 1 : p.s[i]) * std::fabs(t));
      g_size += error, dw_size[j] += error / w_norm[j];
      for (int64_t k = 0; k < d; ++k) {
        const double x_hat = x[k] / x_norm, w_hat = p.weight(j, k) / w_norm[j];
        dx[k] += g * (w_hat - cos * x_hat) / x_norm;
        dw[j * d + k] += g * (x_hat - cos * w_hat) / w_norm[j];
      }
    }
    CHECK(close(got.sums[i], added, tolerance * size), n, classes, d, by_angle, i, got.sums[i], added);
    CHECK(close(got.sums[n + i], mass, tolerance * size), n, classes, d, by_angle, i, got.sums[n + i], mass);
    const double of_scale = tolerance * size * 4 * std::fabs(p.g_lse[i]);
    CHECK(close(got.dscale[i], dscale, of_scale), n, classes, d, by_angle, i, got.dscale[i], dscale);
    for (int64_t k = 0; k < d; ++k) {
      const double want = active ? dx[k] : 0;
      CHECK(close(got.dx[i * d + k], want, active ? 2 * g_size / x_norm : 0), n, classes, d, by_angle, i, k,
            got.dx[i * d + k], want);
    }
  }
  const double ulp = p.dtype == DType::kBFloat16 ? 0x1p-8 : kUlp<T>;
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      const double want = dw[j * d + k], value = get(got.dw, p.dtype, j * d + k);
      CHECK(close(value, want, 2 * dw_size[j] + ulp * std::fabs(want)), n, classes, d, by_angle, j, k, value,
            want);
    }
  }
}

// An update moves the rows by what dw would have been, and the rest of the pass is the same.
template <typename T>
void check_moves(const Sigmoids<T>& p, const Run<T>& plain, const Runtime& host) {
  const auto [n, classes, d] = p.shape;
  const Exact<char> w = p.w;
  Update update{};
  update.rule = Update::Rule::kSgd, update.weight = w, update.step = 1, update.gradient_factor = 1;
  update.max_row_norm = std::numeric_limits<double>::infinity(), update.lr = 0.5;
  Exact<T> dx(n * d), dscale(n);
  lmcl_backward<T>(p.batch(), {w, p.dtype, classes, p.row_stride}, p.upstream(), {}, host,
                   {dx.begin(), nullptr, dscale.begin(), &update});
  CHECK(dx.same_bits(plain.dx) && dscale.same_bits(plain.dscale), n, classes, d);
  const double ulp = p.dtype == DType::kBFloat16 ? 0x1p-7 : kUlp<T>;
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      const double before = p.weight(j, k), step = update.lr * get(plain.dw, p.dtype, j * d + k);
      const double moved = get(w, p.dtype, j * p.row_stride + k);
      CHECK(close(moved, before - step, ulp * (std::fabs(before) + 2 * std::fabs(step))), n, classes, d, j, k,
            moved, before, step);
    }
  }
}

template <typename T>
void test_shapes(DType dtype) {
  for (const Shape shape :
       {Shape{1, 1, 3}, {5, 2, 4}, {7, 300, 9}, {33, 129, 16}, {260, 90, 8}, {3, 2, 1}, {0, 4, 2}}) {
    for (const bool by_angle : {false, true}) {
      for (const double scale : {1.0, 32.0}) {
        const Sigmoids<T> p(shape, dtype, scale, by_angle);
        const Run<T> got(p, runtime(3, 32));
        check(p, got);
        CHECK(got.same_bits(Run<T>(p, runtime(3, 32, Order::kReversed))), shape.n, shape.classes);
        check(p, Run<T>(p, runtime(1, 0)));
        check_moves(p, got, runtime(3, 32));
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
