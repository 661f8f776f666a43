// The update of rows inside backward, against torch.optim's rules in double: the kernels alone, then the driver.
#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "formats.h"
#include "problem.h"

namespace cosface::test {
namespace {

using Rule = Update::Rule;

Update make_update(Rule rule, int64_t step, bool nesterov = false) {
  Update u{};
  u.rule = rule;
  u.step = step;
  u.seed = 11;
  u.gradient_factor = 1;
  u.max_row_norm = std::numeric_limits<double>::infinity();
  u.lr = 0.3;
  u.weight_decay = 0.02;
  u.momentum = 0.9;
  u.dampening = nesterov ? 0 : 0.25;
  u.nesterov = nesterov;
  u.beta1 = 0.9;
  u.beta2 = 0.99;
  u.eps = 0.1;  // so large that an entry's rounding is not magnified where the mean square is small
  return u;
}

struct Element {
  double w;
  std::array<double, 3> state;
};

// One element by its gradient g, as torch.optim.SGD and AdamW say; `has` tells which states there are.
Element move(const Update& u, double g, Element e, std::array<bool, 3> has) {
  auto& [a, b, largest] = e.state;
  if (u.rule == Rule::kSgd) {
    g += u.weight_decay * e.w;
    if (has[0]) {
      a = u.momentum * a + (1 - u.dampening) * g;
      g = u.nesterov ? g + u.momentum * a : a;
    }
    e.w -= u.lr * g;
    return e;
  }
  const auto step = static_cast<double>(u.step);
  e.w *= 1 - u.lr * u.weight_decay;
  a = u.beta1 * a + (1 - u.beta1) * g;
  b = u.beta2 * b + (1 - u.beta2) * g * g;
  if (has[2]) largest = std::max(largest, b);
  const double square = has[2] ? largest : b;
  e.w -= u.lr / (1 - std::pow(u.beta1, step)) * a /
         (std::sqrt(square) / std::sqrt(1 - std::pow(u.beta2, step)) + u.eps);
  return e;
}

// The row's gradient after the factor and the largest norm.
std::vector<double> shortened(const Update& u, std::vector<double> g) {
  double norm = 0;
  for (double& v : g) {
    v *= u.gradient_factor;
    norm = std::hypot(norm, v);
  }
  for (double& v : g) v *= norm > u.max_row_norm ? u.max_row_norm / norm : 1;
  return g;
}

std::vector<Update> updates() {
  std::vector<Update> all;
  for (int64_t step : {1, 5}) {
    for (bool nesterov : {false, true}) all.push_back(make_update(Rule::kSgd, step, nesterov));
    all.push_back(make_update(Rule::kAdamW, step));
  }
  all.back().gradient_factor = -0.5;
  all.front().max_row_norm = 0.75;
  return all;
}

// -- the driver
// ----------------------------------------------------------------------------------------------------

// A weight and an optimizer's state, on memory of the exact size.
struct Rows {
  Exact<char> w;
  std::vector<Exact<char>> state;

  bool same_bits(const Rows& other) const {
    bool same = w.same_bits(other.w);
    for (size_t k = 0; k < state.size(); ++k) same = same && state[k].same_bits(other.state[k]);
    return same;
  }
};

template <typename T>
struct Step {
  const Problem<T>& p;
  DType state_dtype;
  Update update;
  std::array<bool, 3> has;
  std::vector<int64_t> chosen;  // empty: all classes

  DType dtype_of(int k) const { return k == 1 ? DType::kBFloat16 : state_dtype; }  // each has its own

  int64_t rows() const { return chosen.empty() ? p.shape.classes : static_cast<int64_t>(chosen.size()); }

  Options options() const {
    Options o;
    if (!chosen.empty()) o.classes = chosen.data(), o.count = rows();
    return o;
  }

  Rows begin() const {
    Rows r{p.w, {}};
    for (int k = 0; k < 3; ++k) {
      const int64_t count = has[k] ? p.shape.classes * p.shape.d : 0;
      r.state.emplace_back(count * size_of(dtype_of(k)));
      // before the first step there is nothing in them
      for (int64_t e = 0; e < count; ++e)
        put(update.step == 1 ? 0 : std::fabs(normal()), r.state[k], dtype_of(k), e);
    }
    return r;
  }

  // Moves `r`, and returns dx.
  Exact<T> run(Rows& r, const Runtime& host) const {
    Update u = update;
    u.weight = r.w.begin();
    for (int k = 0; k < 3; ++k) u.state[k] = {has[k] ? r.state[k].begin() : nullptr, dtype_of(k)};
    Exact<T> dx(p.shape.n * p.shape.d), dscale(p.shape.n);
    Weight weight = p.weights();
    weight.data = r.w.begin();
    lmcl_backward<T>(p.batch(), weight, {p.top, p.log_sum, p.g_lse, p.g_cos}, options(), host,
                     {dx, nullptr, dscale, &u});
    return dx;
  }

  // dw of the same backward without an update, from a weight in T, so that it is not rounded to 16 bits.
  Exact<T> gradient(Exact<T>& dx, const Runtime& host) const {
    const auto [n, classes, d] = p.shape;
    Exact<T> wide(classes * d), dw(rows() * d), dscale(n);
    for (int64_t k = 0; k < classes * d; ++k) wide[k] = static_cast<T>(p.weight(k / d, k % d));
    const DType dtype = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
    lmcl_backward<T>(p.batch(), {wide, dtype, classes, d}, {p.top, p.log_sum, p.g_lse, p.g_cos}, options(), host,
                     {dx, dw, dscale});
    return dw;
  }

  // Every element of `got` against the rule; rows that were not chosen are as they were.
  void check(const Rows& before, const Rows& got, const Exact<T>& dw) const {
    const auto [n, classes, d] = p.shape;
    std::vector<int64_t> at(classes, -1);  // a class's row of dw
    for (int64_t j = 0; j < rows(); ++j) at[chosen.empty() ? j : chosen[j]] = j;
    for (int64_t c = 0; c < classes; ++c) {
      std::vector<double> g(d);
      for (int64_t k = 0; k < d && at[c] >= 0; ++k) g[k] = dw[at[c] * d + k];
      double size = 0;
      for (double& v : g = shortened(update, g)) size = std::max(size, std::fabs(v));
      for (int64_t k = 0; k < d; ++k) {
        Element e{get(before.w, p.dtype, c * p.row_stride + k), {}};
        for (int s = 0; s < 3; ++s) e.state[s] = has[s] ? get(before.state[s], dtype_of(s), c * d + k) : 0;
        const Element want = at[c] < 0 ? e : move(update, g[k], e, has);
        const double tolerance = at[c] < 0 ? 0 : 64 * kUlp<T> * (1 + size * size + std::fabs(e.state[0]));
        check_element(got.w, p.dtype, c * p.row_stride + k, want.w, tolerance, at[c] < 0, c, k);
        for (int s = 0; s < 3; ++s) {
          if (has[s]) {
            check_element(got.state[s], dtype_of(s), c * d + k, want.state[s], tolerance, at[c] < 0, c, k);
          }
        }
      }
    }
  }

  // 16 bits are rounded up or down at random, so that a whole step separates them from what they stand for.
  void check_element(const void* data, DType dtype, int64_t place, double want, double tolerance, bool untouched,
                     int64_t c, int64_t k) const {
    const double value = get(data, dtype, place);
    const double step = size_of(dtype) == 2 && !untouched ? 0x1p-7 * std::fabs(want) : 0;
    CHECK(close(value, want, tolerance + step), name_of(p.dtype), name_of(dtype), p.shape.n, p.shape.classes,
          p.shape.d, c, k, value, want);
  }
};

template <typename T>
void rows_move_inside_backward() {
  const std::vector<DType> wide = sizeof(T) == 4 ? std::vector{DType::kFloat32} : std::vector{DType::kFloat64};
  int64_t turn = 0;
  for (const Shape shape :
       {Shape{7, 300, 17}, Shape{300, 190, 32}, Shape{5, 1, 3}, Shape{0, 20, 4}, Shape{520, 60, 400}}) {
    for (const Update& update : updates()) {
      for (DType dtype : {wide[0], DType::kBFloat16}) {
        const bool adamw = update.rule == Rule::kAdamW;
        Problem<T> p(shape, dtype, shape.d + turn % 2 * 3, 16);
        if (shape.classes > 16) {
          for (int64_t k = 0; k < shape.d; ++k) put(0, p.w, dtype, 15 * p.row_stride + k);  // a clamped row
          for (int64_t i = 0; i < shape.n; ++i) p.g_lse[i] = p.y[i] == 15 ? 0 : p.g_lse[i];
        }
        Step<T> step{p,
                     turn % 3 ? wide[0] : DType::kBFloat16,
                     update,
                     {adamw || turn % 4 != 3, adamw, adamw && turn % 2},
                     {}};
        if (turn % 5 == 4 && shape.classes > 100) {  // classes that lie apart; targets are places among them
          for (int64_t c = 3; c < shape.classes; c += 2) step.chosen.push_back(c);
          for (int64_t i = 0; i < shape.n; ++i) p.y[i] = std::min(p.y[i], step.rows() - 1);
        }
        const int64_t tile = turn % 2 ? 0 : 40;
        const int threads = static_cast<int>(turn % 3) + (shape.n > 500 ? 50 : 1);  // so many work in teams
        const Runtime host = runtime(threads, tile), reversed = runtime(threads, tile, Order::kReversed);
        Exact<T> loss(shape.n), target_cos(shape.n), max_neg(shape.n), dx(shape.n * shape.d);
        lmcl_forward<T>(p.batch(), p.weights(), p.margin, step.options(), host,
                        {loss, p.top, p.log_sum, target_cos, max_neg});
        const Exact<T> dw = step.gradient(dx, host);
        const Rows before = step.begin();
        Rows moved = before, again = before;
        const Exact<T> got_dx = step.run(moved, host);
        const Exact<T> again_dx = step.run(again, reversed);
        CHECK(moved.same_bits(again) && got_dx.same_bits(again_dx), shape.n, shape.classes, turn);
        for (int64_t k = 0; k < dx.size(); ++k) {
          CHECK(close(got_dx[k], dx[k], 64 * kUlp<T> * (1 + std::fabs(dx[k]))), k, got_dx[k], dx[k]);
        }
        step.check(before, moved, dw);

        // the same rule by a gradient that exists, for all classes
        if (step.chosen.empty() && dtype == wide[0]) {
          Rows applied = before;
          Update u = update;
          u.weight = applied.w.begin();
          for (int k = 0; k < 3; ++k) {
            u.state[k] = {step.has[k] ? applied.state[k].begin() : nullptr, step.dtype_of(k)};
          }
          apply_update<T>({applied.w, dtype, shape.classes, p.row_stride}, dw, shape.d, u, host);
          step.check(before, applied, dw);
        }
        ++turn;
      }
    }
  }
}

// -- stochastic rounding
// -------------------------------------------------------------------------------------------

// To one of the two neighbours, with the expected value, the same for a seed, another for another stream.
template <typename T>
void stochastic_rounding(DType dtype, double scale) {
  const Format format = format_of(dtype);
  const int least = 1 - format.bias();  // exponent of the smallest normal number
  for (int64_t d : {1, 17, 512, 700}) {
    Exact<T> from(d);
    for (T& v : from) v = static_cast<T>(scale * normal());
    const int64_t bytes = d * size_of(dtype);
    Exact<char> to(bytes), same(bytes), other(bytes);
    const auto round = [&](const Exact<char>& out, uint64_t stream, int64_t row) {
      kernels<T>().store_stochastic(from, d, out, dtype, 3, stream, row);
    };
    round(to, 4, 9);
    round(same, 4, 9);
    CHECK(to.same_bits(same), name_of(dtype), d);
    std::vector<double> sum(d);
    constexpr int64_t kDraws = 2000;
    int64_t differ = 0;
    for (int64_t draw = 0; draw < kDraws; ++draw) {
      round(other, 5 + draw % 7, draw);
      for (int64_t k = 0; k < d; ++k) {
        const double value = get(other, dtype, k);
        const double gap = std::ldexp(1, std::max(std::ilogb(from[k]), least) - format.fraction_bits);
        CHECK(std::fabs(value - double{from[k]}) < gap, name_of(dtype), d, k, value, from[k]);
        sum[k] += (value - static_cast<float>(from[k])) / gap;
        differ += value != get(to, dtype, k);
      }
    }
    CHECK(d < 16 || differ > kDraws * d / 10, name_of(dtype), d, differ);  // one may stand close to a number
    // a share q of the draws goes up: the deviation of a mean is at most 1/2 / sqrt(draws); 6 of them
    for (int64_t k = 0; k < d; ++k) {
      CHECK(std::fabs(sum[k] / kDraws) < 3 / std::sqrt(double{kDraws}), name_of(dtype), d, k, sum[k] / kDraws);
    }
  }
  for (double value : {std::nan(""), 0.0, -0.0, 1.0, -2.0, std::ldexp(1, -9), std::ldexp(1, -6), -448.0,
                       double{std::numeric_limits<float>::infinity()}}) {
    const double held = format.decode(format.encode(value));  // what the format holds stays as it is
    if (std::isinf(value) && !format.has_infinity) value = std::nan("");
    Exact<T> from(1, static_cast<T>(value));
    Exact<char> to(size_of(dtype));
    kernels<T>().store_stochastic(from, 1, to, dtype, 3, 4, 5);
    const double got = get(to, dtype, 0);
    CHECK(std::isnan(value) ? std::isnan(got) : got == held, name_of(dtype), value, got);
  }
}

template <typename T>
void stochastic_roundings() {
  stochastic_rounding<T>(DType::kBFloat16, 1);
  stochastic_rounding<T>(DType::kFloat8, 64);
  stochastic_rounding<T>(DType::kFloat8, 0.01);  // below the smallest normal number
}

void tests() {
  rows_move_inside_backward<float>();
  rows_move_inside_backward<double>();
  stochastic_roundings<float>();
  stochastic_roundings<double>();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
