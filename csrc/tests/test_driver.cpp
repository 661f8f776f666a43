// lmcl_forward and lmcl_backward from end to end against the definition in double, on real threads.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "formats.h"
#include "problem.h"

namespace cosface::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

struct Definition {
  std::vector<double> x_hat, w_hat, x_norm, w_norm, cos;  // (N, D), (C, D), (N), (C), (N, C)
  std::vector<double> loss, lse, target_cos, max_neg;     // (N)
  std::vector<double> dx, dw, dscale;                     // (N, D), (C, D), (N)
  std::vector<double> dx_size, dw_size, dscale_size;      // (N), (C), (N): the sums of the terms' magnitudes
};

// Rows of v over their clamped norms.
void normalize(const std::vector<double>& v, int64_t rows, int64_t d, std::vector<double>* v_hat,
               std::vector<double>* norms) {
  *v_hat = v;
  norms->assign(rows, 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < d; ++k) (*norms)[i] += v[i * d + k] * v[i * d + k];
    (*norms)[i] = std::sqrt((*norms)[i]);
    for (int64_t k = 0; k < d; ++k) (*v_hat)[i * d + k] /= (*norms)[i] < kEps ? kEps : (*norms)[i];
  }
}

// v <- the derivative of v / max(|v|, eps), applied to a gradient.
void through_norm(const double* v_hat, double norm, int64_t d, double* gradient) {
  double dot = 0;
  for (int64_t k = 0; k < d; ++k) dot += gradient[k] * v_hat[k];
  for (int64_t k = 0; k < d; ++k) {
    gradient[k] = norm < kEps ? gradient[k] / kEps : (gradient[k] - dot * v_hat[k]) / norm;
  }
}

template <typename T>
Definition define(const Problem<T>& p) {
  const auto [n, classes, d] = p.shape;
  Definition r;
  std::vector<double> x(p.x.begin(), p.x.end()), w(classes * d);
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < d; ++k) w[j * d + k] = p.weight(j, k);
  }
  normalize(x, n, d, &r.x_hat, &r.x_norm);
  normalize(w, classes, d, &r.w_hat, &r.w_norm);
  r.cos.assign(n * classes, 0);
  r.loss.assign(n, 0), r.lse.assign(n, -kInf), r.target_cos.assign(n, 0), r.max_neg.assign(n, -kInf);
  r.dx.assign(n * d, 0), r.dw.assign(classes * d, 0), r.dscale.assign(n, 0);
  r.dx_size.assign(n, 0), r.dw_size.assign(classes, 0), r.dscale_size.assign(n, 0);
  for (int64_t i = 0; i < n; ++i) {
    double* cos = r.cos.data() + i * classes;
    for (int64_t j = 0; j < classes; ++j) {
      for (int64_t k = 0; k < d; ++k) cos[j] += r.x_hat[i * d + k] * r.w_hat[j * d + k];
      if (j == p.y[i]) {
        r.target_cos[i] = cos[j];
      } else if (!(cos[j] <= r.max_neg[i])) {
        r.max_neg[i] = cos[j];
      }
    }
    double top = -kInf, sum = 0;
    for (int64_t j = 0; j < classes; ++j) {
      const double shaped = p.shaped(i, cos[j]);
      if (j != p.y[i] && !(shaped <= top)) top = shaped;
    }
    for (int64_t j = 0; j < classes; ++j) {
      sum += j == p.y[i] ? 0 : std::exp(p.s[i] * (p.shaped(i, cos[j]) - top));
    }
    if (sum != 0) r.lse[i] = p.s[i] * top + std::log(sum);
    const double z = r.lse[i] - p.s[i] * (r.target_cos[i] - double{p.margin});
    r.loss[i] = p.y[i] < 0 ? 0 : z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));

    if (!p.active(i)) continue;
    const double x_clamped = std::max(r.x_norm[i], kEps);
    for (int64_t j = 0; j < classes; ++j) {
      const bool target = j == p.y[i];
      const double shaped = p.shaped(i, cos[j]);
      const double prob = target ? 0 : p.g_lse[i] * std::exp(p.s[i] * shaped - r.lse[i]);
      const double g = target ? double{p.g_cos[i]} : p.s[i] * prob * p.slope(i, cos[j]);
      for (int64_t k = 0; k < d; ++k) {
        r.dx[i * d + k] += g * r.w_hat[j * d + k];
        r.dw[j * d + k] += g * r.x_hat[i * d + k];
      }
      r.dscale[i] += prob * shaped;
      r.dscale_size[i] += std::fabs(prob) * std::max(1.0, std::fabs(shaped));
      r.dx_size[i] += std::fabs(g) / x_clamped;
      r.dw_size[j] += std::fabs(g) / std::max(r.w_norm[j], kEps);
    }
    through_norm(&r.x_hat[i * d], r.x_norm[i], d, &r.dx[i * d]);
  }
  for (int64_t j = 0; j < classes; ++j) through_norm(&r.w_hat[j * d], r.w_norm[j], d, &r.dw[j * d]);
  return r;
}

struct Polynomial {
  double q, a, b;
};

// Of an inter-class filter, MV-Softmax and CurricularFace, and one that turns the order of cosines round.
constexpr Polynomial kPolynomials[] = {{0, 0, 0}, {0, 1.2, 0.2}, {1, 0.3, 0}, {0.7, -0.4, 0.1}};

// Thresholds below all cosines of a sample, above all, and in gaps between, which no rounding can cross.
template <typename T>
void reshape(Problem<T>& p, Polynomial by) {
  p.q = static_cast<T>(by.q), p.a = static_cast<T>(by.a), p.b = static_cast<T>(by.b);
  std::vector<double> cos = define(p).cos;
  p.tau.resize(p.shape.n);
  for (int64_t i = 0; i < p.shape.n; ++i) {
    const auto begin = cos.begin() + i * p.shape.classes, end = begin + p.shape.classes;
    std::sort(begin, end);
    const double shares[] = {0.5, 0.9, 0.99};
    const auto first = begin + static_cast<int64_t>(shares[i % 3] * static_cast<double>(p.shape.classes));
    double gap = 1e-5, tau = i % 5 == 1 ? -2 : 2;
    for (auto here = first; i % 5 > 1 && here + 1 < std::min(first + 100, end); ++here) {
      if (here[1] - here[0] < gap) continue;
      gap = here[1] - here[0];
      tau = (here[0] + here[1]) / 2;
    }
    p.tau[i] = static_cast<T>(tau);
  }
}

// The definition's gradients against differences of its own values.
void definition_agrees_with_itself(bool reshaped) {
  Problem<double> p({4, 5, 3}, DType::kFloat64, 3, 6);
  if (reshaped) reshape(p, kPolynomials[3]);
  const Definition r = define(p);
  const auto value = [&p] {
    const Definition at = define(p);
    double sum = 0;
    for (int64_t i = 0; i < p.shape.n; ++i) sum += p.g_lse[i] * at.lse[i] + p.g_cos[i] * at.target_cos[i];
    return sum;
  };
  const auto slope = [&value](double& variable) {
    constexpr double kStep = 1e-5;
    const double here = variable;
    variable = here + kStep;
    const double above = value();
    variable = here - kStep;
    const double below = value();
    variable = here;
    return (above - below) / (2 * kStep);
  };
  for (int64_t k = 0; k < p.x.size(); ++k) {
    const double want = slope(p.x[k]);
    CHECK(close(r.dx[k], want, 1e-7), k, r.dx[k], want);
  }
  for (int64_t k = 0; k < p.shape.classes * p.shape.d; ++k) {
    const double want = slope(reinterpret_cast<double*>(p.w.begin())[k]);
    CHECK(close(r.dw[k], want, 1e-7), k, r.dw[k], want);
  }
  for (int64_t i = 0; i < p.shape.n; ++i) {
    const double want = slope(p.s[i]);
    CHECK(close(r.dscale[i], want, 1e-7), i, r.dscale[i], want);
  }
}

template <typename T>
struct Forward {
  Exact<T> loss, top, log_sum, target_cos, max_neg;

  Forward(const Problem<T>& p, const Runtime& runtime, const Options& options = {})
      : loss(p.shape.n), top(p.shape.n), log_sum(p.shape.n), target_cos(p.shape.n), max_neg(p.shape.n) {
    lmcl_forward<T>(p.batch(), p.weights(), p.margin, options, runtime, {loss, top, log_sum, target_cos, max_neg});
  }
  double lse(const Problem<T>& p, int64_t i) const { return double{p.s[i]} * double{top[i]} + double{log_sum[i]}; }
  // What backward needs.
  void hand_over(Problem<T>& p) const {
    std::copy(top.begin(), top.end(), p.top.begin());
    std::copy(log_sum.begin(), log_sum.end(), p.log_sum.begin());
  }
  bool same_bits(const Forward& other) const {
    return loss.same_bits(other.loss) && top.same_bits(other.top) && log_sum.same_bits(other.log_sum) &&
           target_cos.same_bits(other.target_cos) && max_neg.same_bits(other.max_neg);
  }
};

struct Wanted {
  bool dx = true, dw = true;
};

template <typename T>
struct Backward {
  Exact<T> dx, dscale;
  Exact<char> dw;

  Backward(const Problem<T>& p, const Runtime& runtime, Wanted wanted = {}, const Options& options = {})
      : dx(wanted.dx ? p.shape.n * p.shape.d : 0),
        dscale(p.shape.n),
        dw(wanted.dw ? p.shape.classes * p.shape.d * size_of(p.dtype) : 0) {
    lmcl_backward<T>(p.batch(), p.weights(), {p.top, p.log_sum, p.g_lse, p.g_cos}, options, runtime,
                     {wanted.dx ? dx.begin() : nullptr, wanted.dw ? dw.begin() : nullptr, dscale});
  }
  bool same_bits(const Backward& other) const {
    return dx.same_bits(other.dx) && dscale.same_bits(other.dscale) && dw.same_bits(other.dw);
  }
};

template <typename T>
void check_forward(const Problem<T>& p, const Definition& want, const Forward<T>& got) {
  const auto [n, classes, d] = p.shape;
  const double tolerance = p.tolerance(), cos_tolerance = kUlp<T> * (4 + std::sqrt(static_cast<double>(d)));
  for (int64_t i = 0; i < n; ++i) {
    CHECK(close(got.target_cos[i], want.target_cos[i], cos_tolerance), n, classes, d, i, got.target_cos[i],
          want.target_cos[i]);
    CHECK(close(got.max_neg[i], want.max_neg[i], cos_tolerance), n, classes, d, i, got.max_neg[i],
          want.max_neg[i]);
    CHECK(close(got.lse(p, i), want.lse[i], tolerance), n, classes, d, i, got.lse(p, i), want.lse[i]);
    // |d softplus| <= softplus, so that the loss is right relatively, however small
    const double floor = std::numeric_limits<T>::min();
    CHECK(close(got.loss[i], want.loss[i], 2 * tolerance * std::max(want.loss[i], floor)), n, classes, d, i,
          got.loss[i], want.loss[i]);
  }
}

// off: by how much cosines may be off, relative to 1.
template <typename T>
void check_backward(const Problem<T>& p, const Definition& want, const Backward<T>& got, double off = 0) {
  const auto [n, classes, d] = p.shape;
  const double largest_s = n ? double{*std::max_element(p.s.begin(), p.s.end())} : 0;
  const double tolerance = 2 * p.tolerance() + off * (largest_s + 2);  // in e^z, and in the projections
  const double product_tolerance = tolerance + p.operand_tolerance();
  const double floor = 1e6 * std::numeric_limits<T>::min();  // e^z below the smallest normal number is 0
  for (int64_t i = 0; i < n; ++i) {
    CHECK(close(got.dscale[i], want.dscale[i], tolerance * want.dscale_size[i] + floor), n, classes, d, i,
          got.dscale[i], want.dscale[i]);
    for (int64_t k = 0; k < d; ++k) {
      CHECK(close(got.dx[i * d + k], want.dx[i * d + k], product_tolerance * want.dx_size[i] + floor), n, classes,
            d, i, k, got.dx[i * d + k], want.dx[i * d + k]);
    }
  }
  // one rounding to the dtype of the weight, whose numbers below the normal ones stand a fixed step apart
  const double ulps[] = {0x1p-53, 0x1p-24, 0x1p-8, 0x1p-11}, steps[] = {0, 0x1p-149, 0x1p-133, 0x1p-24};
  const double ulp = ulps[static_cast<int>(p.dtype)], step = steps[static_cast<int>(p.dtype)];
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      const double value = want.dw[j * d + k], g = get(got.dw, p.dtype, j * d + k);
      CHECK(close(g, value, product_tolerance * want.dw_size[j] + ulp * std::fabs(value) + step + floor),
            name_of(p.dtype), n, classes, d, j, k, g, value);
    }
  }
}

// Both passes, twice on threads and once in reverse, against the definition.
template <typename T>
void check_all(Problem<T>& p, const Definition& want, int threads, int64_t tile_classes) {
  const Runtime host = runtime(threads, tile_classes);
  const Runtime reversed = runtime(threads, tile_classes, Order::kReversed);
  const Forward<T> forward(p, host);
  check_forward(p, want, forward);
  CHECK(forward.same_bits(Forward<T>(p, host)), p.shape.n, p.shape.classes, threads, tile_classes);
  CHECK(forward.same_bits(Forward<T>(p, reversed)), p.shape.n, p.shape.classes, threads, tile_classes);
  forward.hand_over(p);
  const Backward<T> backward(p, host);
  check_backward(p, want, backward);
  CHECK(backward.same_bits(Backward<T>(p, host)), p.shape.n, p.shape.classes, threads, tile_classes);
  CHECK(backward.same_bits(Backward<T>(p, reversed)), p.shape.n, p.shape.classes, threads, tile_classes);
}

template <typename T>
std::vector<DType> dtypes() {
  if (sizeof(T) == 4) return {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  return {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};
}

// Every shape with every dtype; threads, tiles, strides and scales go round, so that each meets many of the rest.
template <typename T>
void shapes() {
  const double scales[] = {64, 1, 16, 128, 0};
  const int64_t tiles[] = {0, 1, 5, 16, 84, 252, 2000};
  int64_t turn = 0;
  for (int64_t n : {0, 1, 7, 300}) {
    for (int64_t classes : {0, 1, 2, 15, 513, 1100}) {
      for (int64_t d : {1, 3, 17, 32})  // 32: whole panels of every instruction set
      {
        for (DType dtype : dtypes<T>()) {
          if (n == 300 && classes > 500 && turn % 4) {  // the large ones are slow under a sanitizer: one in four
            ++turn;
            continue;
          }
          const int64_t stride = d + (turn % 2 ? 0 : 5);
          Problem<T> p({n, classes, d}, dtype, stride, scales[turn / 2 % 5]);
          const Definition want = define(p);
          const int runs = n * classes > 10000 ? 1 : 2;
          for (int run = 0; run < runs; ++run, ++turn) {
            const int64_t tile = tiles[turn % 7];
            if (tile == 1 && n * classes > 10000) continue;
            check_all(p, want, static_cast<int>(turn % 4) + 1, tile);
          }
        }
      }
    }
  }
}

// With so many threads that they share tiles, of fewer blocks of samples than of threads in a team, and of more.
template <typename T>
void teams() {
  const std::pair<int, int64_t> hosts[] = {{40, 0}, {64, 7}, {200, 14}};
  int64_t turn = 0;
  for (const Shape shape : {Shape{520, 30, 512}, Shape{520, 60, 300}, Shape{520, 0, 300}}) {
    for (DType dtype : dtypes<T>()) {
      Problem<T> p(shape, dtype, shape.d, 64);
      const auto& [threads, tile] = hosts[turn++ % 3];
      check_all(p, define(p), threads, tile);
    }
  }
}

// What is not wanted is not touched, and leaves the rest as it is, bit for bit.
template <typename T>
void gradients_that_are_not_wanted() {
  for (DType dtype : dtypes<T>()) {
    for (int64_t d : {17, 32}) {
      Problem<T> p({7, 200, d}, dtype, d + 3, 32);
      const Runtime host = runtime(3, 0);
      const Forward<T> forward(p, host);
      forward.hand_over(p);
      const Backward<T> all(p, host);
      const Backward<T> without_dx(p, host, {false, true}), without_dw(p, host, {true, false}),
          neither(p, host, {false, false});
      CHECK(without_dx.dw.same_bits(all.dw) && without_dx.dscale.same_bits(all.dscale), name_of(dtype), d);
      CHECK(without_dw.dx.same_bits(all.dx) && without_dw.dscale.same_bits(all.dscale), name_of(dtype), d);
      CHECK(neither.dscale.same_bits(all.dscale), name_of(dtype), d);
    }
  }
}

// Zero rows and rows below the clamp, in x and in w.
template <typename T>
void clamped_norms() {
  for (DType dtype : dtypes<T>()) {
    Problem<T> p({9, 37, 5}, dtype, 5, 16);
    for (int64_t k = 0; k < 5; ++k) {
      p.x[2 * 5 + k] = 0;
      p.set_x(4 * 5 + k, p.x[4 * 5 + k] * 1e-14);
      for (int64_t j : {0, 15, 16, 36}) p.set_weight(j * 5 + k, 0);
      // too small for a half: it becomes 0 there
      for (int64_t j : {3, 20}) p.set_weight(j * 5 + k, p.weight(j, k) * 1e-14);
    }
    // a gradient over 1e-12 is beyond a half, and infinite there as in the definition
    if (dtype == DType::kFloat16) std::fill_n(p.g_lse.begin(), 9, T(0)), std::fill_n(p.g_cos.begin(), 9, T(0));
    const Definition want = define(p);
    for (int threads = 1; threads <= 3; ++threads) check_all(p, want, threads, 16);
  }
}

// Every row of w the same memory, as an expanded tensor has.
template <typename T>
void expanded_weight() {
  for (int64_t d : {3, 32}) {
    Problem<T> p({7, 37, d}, DType::kFloat32, 0, 16);
    const Definition want = define(p);
    check_all(p, want, 2, 0);
  }
}

// Confident samples: s = 128, the target's row points at its class, so that losses reach 1e-37 and less.
template <typename T>
void confident() {
  constexpr int64_t kClasses = 33, kD = 17;
  for (double scale : {16.0, 40.0, 64.0, 128.0}) {
    Problem<T> p({kClasses, kClasses, kD}, DType::kFloat32, kD, scale);
    for (int64_t i = 0; i < kClasses; ++i) {
      p.y[i] = i;
      for (int64_t k = 0; k < kD; ++k) p.set_x(i * kD + k, p.weight(i, k) * (1 + 0.1 * normal()));
    }
    const Definition want = define(p);
    check_all(p, want, 2, 0);
  }
}

// A sample of nan or inf spoils its own loss and its own dx, and what all samples share, dw; a sample without
// gradient spoils nothing, whatever it holds.
template <typename T>
void bad_samples() {
  for (double bad : {kNan, kInf}) {
    for (DType dtype : dtypes<T>()) {
      for (bool with_gradient : {true, false}) {
        Problem<T> p({7, 40, 17}, dtype, 17, 32);
        constexpr int64_t kBad = 4;
        if (!with_gradient) p.g_lse[kBad] = p.g_cos[kBad] = 0;
        const Definition want = define(p);  // of the sample before it was spoilt
        p.x[kBad * 17 + 9] = static_cast<T>(bad);
        for (int threads = 1; threads <= 3; ++threads) {
          const Runtime host = runtime(threads, 0);
          const Forward<T> forward(p, host);
          for (int64_t i = 0; i < p.shape.n; ++i) {
            if (i == kBad) {
              CHECK(std::isnan(forward.loss[i]) && std::isnan(forward.lse(p, i)), bad, forward.loss[i],
                    forward.lse(p, i));
            } else {
              CHECK(close(forward.lse(p, i), want.lse[i], p.tolerance()), bad, i, forward.lse(p, i), want.lse[i]);
            }
          }
          forward.hand_over(p);
          const Backward<T> backward(p, host);
          if (!with_gradient) {
            check_backward(p, want, backward);
            continue;
          }
          const double tolerance = 2 * p.tolerance() + p.operand_tolerance();
          for (int64_t k = 0; k < 7 * 17; ++k) {
            const int64_t i = k / 17;
            if (i == kBad) {
              CHECK(std::isnan(backward.dx[k]), bad, k, backward.dx[k]);
            } else {
              CHECK(close(backward.dx[k], want.dx[k], tolerance * want.dx_size[i]), bad, k, backward.dx[k],
                    want.dx[k]);
            }
          }
        }
      }
    }
  }
}

// Rows longer than the depth that a matrix product takes at a time.
template <typename T>
void long_rows() {
  for (int64_t d : {256, 257, 544}) {
    Problem<T> p({5, 90, d}, dtypes<T>().front(), d, 16);
    const Definition want = define(p);
    check_all(p, want, 2, 0);
  }
}

// Hard negatives that are reshaped, without a tolerance.
template <typename T>
void reshaped() {
  int64_t turn = 0;
  for (const Polynomial& by : kPolynomials) {
    for (const Shape shape : {Shape{7, 513, 17}, Shape{300, 84, 5}, Shape{1, 1, 3}, Shape{0, 9, 3}}) {
      Problem<T> p(shape, DType::kFloat32, shape.d, 64);
      reshape(p, by);
      const Definition want = define(p);
      check_all(p, want, static_cast<int>(++turn % 3) + 1, 0);
    }
  }
}

// With a tolerance: the loss is as without, the gradients are within the bounds of what was dropped, with the same
// bits in any order and where one of them is not wanted, in caches from too small to ample. Every third sample is
// at its class, as after training.
template <typename T>
void with_a_tolerance(const Polynomial* by) {
  const double tolerance = 0.02;
  double least_kept = 1;
  for (const Shape shape :
       {Shape{7, 1100, 17}, Shape{300, 513, 32}, Shape{1, 2000, 20}, Shape{2, 1, 3}, Shape{0, 300, 8}}) {
    Problem<T> p(shape, DType::kFloat32, shape.d, 128);
    for (int64_t k = 0; k < shape.n * shape.d; ++k) {
      const int64_t i = k / shape.d;
      if (i % 3 == 2 && p.y[i] >= 0) p.set_x(k, p.weight(p.y[i], k % shape.d) + 0.1 * normal());
    }
    if (by) reshape(p, *by);
    const Definition want = define(p);
    for (int64_t bytes : {0, 64 * 300, 64 * 20000, 64 * 200000}) {
      const auto run = [&](const Runtime& host, Exact<char>& cache, Wanted wanted = {}) {
        Options options;
        options.gradient_tolerance = tolerance;
        options.entries = cache.begin();
        options.entry_bytes = bytes;
        const Forward<T> forward(p, host, options);
        check_forward(p, want, forward);
        forward.hand_over(p);
        return Backward<T>(p, host, wanted, options);
      };
      Exact<char> cache(bytes), other_cache(bytes);
      const Backward<T> got = run(runtime(2, 0), cache);
      CHECK(got.same_bits(run(runtime(2, 0, Order::kReversed), other_cache)), shape.n, shape.classes, bytes);
      CHECK(got.dx.same_bits(run(runtime(2, 0), other_cache, {true, false}).dx), shape.n, shape.classes, bytes);
      CHECK(got.dw.same_bits(run(runtime(2, 0), other_cache, {false, true}).dw), shape.n, shape.classes, bytes);
      const auto* dropped = reinterpret_cast<const double*>(cache.begin());
      if (p.in_bfloat16() && multiplies_bfloat16(tolerance)) {
        for (int64_t i = 0; bytes > 0 && i < shape.n; ++i) CHECK(dropped[i] == 0 && dropped[shape.n + i] == 1, i);
        check_backward(p, want, got);
        continue;
      }
      double dw_error = 0, dw_lacks = 0, dw_size = 0;
      for (int64_t i = 0; i < shape.n; ++i) {
        const double mass = bytes == 0 ? 0 : dropped[i];
        if (bytes > 0) least_kept = std::min(least_kept, dropped[shape.n + i]);
        CHECK(mass <= tolerance, shape.n, shape.classes, bytes, i, mass);
        double steepest = 0, largest = 0, error = 0;  // of the negatives: |N'| and |N|
        for (int64_t j = 0; j < shape.classes; ++j) {
          if (j == p.y[i]) continue;
          const double cos = want.cos[i * shape.classes + j];
          steepest = std::max(steepest, std::fabs(p.slope(i, cos)));
          largest = std::max(largest, std::fabs(p.shaped(i, cos)));
        }
        for (int64_t k = 0; k < shape.d; ++k) {
          error = std::hypot(error, double{got.dx[i * shape.d + k]} - want.dx[i * shape.d + k]);
        }
        const double lacks = std::fabs(double{p.s[i]} * p.g_lse[i]) * steepest * mass;
        CHECK(error <= lacks / want.x_norm[i] + 8 * p.tolerance() * want.dx_size[i], shape.n, shape.classes, bytes,
              i, error, lacks);
        dw_lacks += lacks;
        const double off = std::fabs(double{got.dscale[i]} - want.dscale[i]);
        CHECK(off <= std::fabs(double{p.g_lse[i]}) * largest * mass + 8 * p.tolerance() * want.dscale_size[i],
              shape.n, shape.classes, bytes, i, off, mass);
      }
      for (int64_t j = 0; j < shape.classes; ++j) {
        double error = 0;
        for (int64_t k = 0; k < shape.d; ++k) {
          error = std::hypot(error, get(got.dw, p.dtype, j * shape.d + k) - want.dw[j * shape.d + k]);
        }
        dw_error += error * want.w_norm[j];
        dw_size += want.dw_size[j] * want.w_norm[j];
      }
      const double rounding = (8 * p.tolerance() + 0x1p-24) * dw_size;
      CHECK(dw_error <= dw_lacks + rounding, shape.n, shape.classes, bytes, dw_error, dw_lacks, rounding);
    }
  }
  CHECK(least_kept < 0.3 || multiplies_bfloat16(tolerance), least_kept);
}

// With a cache of cosines, from too small for a tile to more than all: the same loss, the gradients of cosines
// that are off by at most 2^-16 in float and by nothing in double or in an exact cache, and the same bits in any
// order.
template <typename T>
void with_a_cache(bool is_exact) {
  const double off = is_exact || sizeof(T) == 8 ? 0 : 0x1p-16;
  for (const Shape shape : {Shape{7, 1100, 17}, Shape{300, 513, 32}, Shape{1, 84, 20}, Shape{0, 9, 3}}) {
    Problem<T> p(shape, dtypes<T>()[1], shape.d + 2, 64);
    const Definition want = define(p);
    const Forward<T> without(p, runtime(2, 100));
    without.hand_over(p);
    const Backward<T> exact(p, runtime(2, 100));
    const int64_t tile = std::min<int64_t>(100, shape.classes) * shape.n * (off > 0 ? 2 : sizeof(T)),
                  all = 64 + 6 * tile;
    for (int64_t bytes : {int64_t{64}, 64 + tile - 1, 64 + 2 * tile, all, all + 1000}) {
      const auto run = [&](const Runtime& host, const Runtime& later) {
        Exact<char> cache(bytes);
        Options options;
        options.cosines = cache.begin();
        options.cosine_bytes = bytes;
        options.exact_cosines = is_exact;
        Forward<T> forward(p, host, options);
        CHECK(forward.same_bits(without), shape.n, shape.classes, bytes);
        return Backward<T>(p, later, {}, options);
      };
      const Backward<T> got = run(runtime(2, 100), runtime(2, 100));
      // backward takes the tiles that forward kept, whatever the host asks for by then
      CHECK(got.same_bits(run(runtime(2, 100, Order::kReversed), runtime(2, 7))), shape.n, shape.classes, bytes);
      const bool keeps = shape.n > 0 && bytes >= 64 + tile;
      CHECK(got.same_bits(exact) == (!keeps || off == 0), shape.n, shape.classes, bytes);
      check_backward(p, want, got, off);
    }
  }
}

// The cosines in falling order, each that of its class; and the same bits whatever the threads and tiles.
template <typename T>
void nearest() {
  for (const Shape shape : {Shape{0, 5, 3}, Shape{3, 1, 2}, Shape{5, 90, 7}, Shape{300, 230, 16}}) {
    for (DType dtype : {sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      const Problem<T> p(shape, dtype, shape.d + 3, 1);
      const Definition want = define(p);
      for (int64_t k : {int64_t{1}, (shape.classes + 1) / 2, shape.classes}) {
        const auto run = [&](const Runtime& host) {
          std::pair<Exact<T>, Exact<int64_t>> found{shape.n * k, shape.n * k};
          nearest_classes<T>(p.batch(), p.weights(), {}, k, host, found.first, found.second);
          return found;
        };
        const auto [cos, classes] = run(runtime(2, 7));
        for (int64_t i = 0; i < shape.n; ++i) {
          std::vector<double> sorted(&want.cos[i * shape.classes], &want.cos[i * shape.classes] + shape.classes);
          std::sort(sorted.begin(), sorted.end(), std::greater<>());
          for (int64_t rank = 0; rank < k; ++rank) {
            const double got = cos[i * k + rank], of_class = want.cos[i * shape.classes + classes[i * k + rank]];
            const double allowed = 16 * kUlp<T>;
            CHECK(close(got, sorted[rank], allowed) && close(got, of_class, allowed), shape.n, k, i, rank, got);
            CHECK(rank == 0 || cos[i * k + rank - 1] >= cos[i * k + rank], shape.n, k, i, rank);
          }
        }
        for (const Runtime& host : {runtime(3, 20), runtime(1, 0), runtime(4, 14, Order::kReversed)}) {
          const auto again = run(host);
          CHECK(again.first.same_bits(cos) && again.second.same_bits(classes), shape.n, shape.classes, k);
        }
      }
    }
  }
}

template <typename T>
void all_of() {
  shapes<T>();
  nearest<T>();
  teams<T>();
  long_rows<T>();
  gradients_that_are_not_wanted<T>();
  clamped_norms<T>();
  expanded_weight<T>();
  confident<T>();
  bad_samples<T>();
  reshaped<T>();
  with_a_tolerance<T>(nullptr);
  for (const Polynomial& by : kPolynomials) with_a_tolerance<T>(&by);
  for (bool is_exact : {false, true}) with_a_cache<T>(is_exact);
}

void tests() {
  for (bool reshaped : {false, true}) definition_agrees_with_itself(reshaped);
  all_of<float>();
  if (!multiplies_bfloat16()) all_of<double>();  // double has nothing to do with it
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
