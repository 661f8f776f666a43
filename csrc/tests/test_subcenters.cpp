// lmcl_forward and lmcl_backward with several rows of a class against the definition in double, on real threads.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "formats.h"
#include "problem.h"

namespace cosface::test {
namespace {

struct Definition {
  std::vector<double> lse, target_cos, max_neg;  // (N)
  std::vector<double> dx, dw, dscale;            // (N, D), (C K, D), (N)
  std::vector<double> dx_size, dw_size;          // (N), (C K): the sums of the terms' magnitudes
};

template <typename T>
Definition define(const Problem<T>& p, int64_t subcenters) {
  const auto [n, rows, d] = p.shape;
  constexpr double kInf = std::numeric_limits<double>::infinity();
  std::vector<double> w_hat(rows * d), w_norm(rows);
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t k = 0; k < d; ++k) w_norm[j] += p.weight(j, k) * p.weight(j, k);
    w_norm[j] = std::max(std::sqrt(w_norm[j]), kEps);
    for (int64_t k = 0; k < d; ++k) w_hat[j * d + k] = p.weight(j, k) / w_norm[j];
  }
  const auto zeros = [](int64_t count) { return std::vector<double>(count); };
  Definition r{zeros(n), zeros(n),   std::vector<double>(n, -kInf), zeros(n * d), zeros(rows * d), zeros(n),
               zeros(n), zeros(rows)};
  const auto project = [d = d](double* g, const double* v_hat, double norm) {
    double dot = 0;
    for (int64_t k = 0; k < d; ++k) dot += g[k] * v_hat[k];
    for (int64_t k = 0; k < d; ++k) g[k] = norm > kEps ? (g[k] - dot * v_hat[k]) / norm : g[k] / kEps;
  };
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> x_hat(p.x.begin() + i * d, p.x.begin() + (i + 1) * d), cos(rows / subcenters, -kInf);
    std::vector<int64_t> winner(cos.size());
    double norm = 0, sum = 0;
    for (double v : x_hat) norm += v * v;
    norm = std::max(std::sqrt(norm), kEps);
    for (double& v : x_hat) v /= norm;
    for (int64_t j = 0; j < rows; ++j) {
      double of_row = 0;
      for (int64_t k = 0; k < d; ++k) of_row += x_hat[k] * w_hat[j * d + k];
      if (of_row > cos[j / subcenters]) cos[j / subcenters] = of_row, winner[j / subcenters] = j;
    }
    for (int64_t c = 0; c < static_cast<int64_t>(cos.size()); ++c) {
      if (c == p.y[i]) r.target_cos[i] = cos[c];
      if (c != p.y[i]) r.max_neg[i] = std::max(r.max_neg[i], cos[c]);
    }
    for (int64_t c = 0; c < static_cast<int64_t>(cos.size()); ++c) {
      if (c != p.y[i]) sum += std::exp(p.s[i] * (cos[c] - r.max_neg[i]));
    }
    r.lse[i] = sum > 0 ? p.s[i] * r.max_neg[i] + std::log(sum) : -kInf;
    for (int64_t c = 0; c < static_cast<int64_t>(cos.size()); ++c) {
      const double prob = c == p.y[i] ? 0 : p.g_lse[i] * std::exp(p.s[i] * cos[c] - r.lse[i]);
      const double g = c == p.y[i] ? double{p.g_cos[i]} : p.s[i] * prob;
      const int64_t j = winner[c];
      for (int64_t k = 0; k < d; ++k) {
        r.dx[i * d + k] += g * w_hat[j * d + k];
        r.dw[j * d + k] += g * x_hat[k];
      }
      r.dscale[i] += prob * cos[c];
      r.dx_size[i] += std::fabs(g) / norm;
      r.dw_size[j] += std::fabs(g) / w_norm[j];
    }
    project(&r.dx[i * d], x_hat.data(), norm);
  }
  for (int64_t j = 0; j < rows; ++j) project(&r.dw[j * d], &w_hat[j * d], w_norm[j]);
  return r;
}

template <typename T>
struct Pass {
  Exact<T> loss, top, log_sum, target_cos, max_neg, dx, dscale;
  Exact<char> dw;

  Pass(Problem<T>& p, const Runtime& host, Options options)
      : loss(p.shape.n),
        top(p.shape.n),
        log_sum(p.shape.n),
        target_cos(p.shape.n),
        max_neg(p.shape.n),
        dx(p.shape.n * p.shape.d),
        dscale(p.shape.n),
        dw(p.shape.classes * p.shape.d * size_of(p.dtype)) {
    lmcl_forward<T>(p.batch(), p.weights(), p.margin, options, host, {loss, top, log_sum, target_cos, max_neg});
    std::copy(top.begin(), top.end(), p.top.begin());
    std::copy(log_sum.begin(), log_sum.end(), p.log_sum.begin());
    lmcl_backward<T>(p.batch(), p.weights(), {p.top, p.log_sum, p.g_lse, p.g_cos}, options, host,
                     {dx, dw, dscale});
  }
  bool same_bits(const Pass& other) const {
    return loss.same_bits(other.loss) && max_neg.same_bits(other.max_neg) && dx.same_bits(other.dx) &&
           dscale.same_bits(other.dscale) && dw.same_bits(other.dw);
  }
};

template <typename T>
void check_pass(const Problem<T>& p, const Definition& want, const Pass<T>& got, int64_t subcenters) {
  const auto [n, rows, d] = p.shape;
  const double tolerance = 2 * p.tolerance(), products = tolerance + p.operand_tolerance();
  for (int64_t i = 0; i < n; ++i) {
    const double lse = double{p.s[i]} * double{got.top[i]} + double{got.log_sum[i]};
    CHECK(close(lse, want.lse[i], tolerance), n, rows, subcenters, i, lse, want.lse[i]);
    CHECK(close(got.target_cos[i], want.target_cos[i], tolerance), n, rows, subcenters, i, got.target_cos[i]);
    CHECK(close(got.max_neg[i], want.max_neg[i], tolerance), n, rows, subcenters, i, got.max_neg[i]);
    CHECK(close(got.dscale[i], want.dscale[i], tolerance * (1 + std::fabs(double{p.g_lse[i]}))), n, rows, i);
    for (int64_t k = 0; k < d; ++k) {
      CHECK(close(got.dx[i * d + k], want.dx[i * d + k], products * want.dx_size[i]), n, rows, subcenters, i, k,
            got.dx[i * d + k], want.dx[i * d + k]);
    }
  }
  const double ulp = p.dtype == DType::kBFloat16 ? 0x1p-8 : kUlp<T>;
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t k = 0; k < d; ++k) {
      const double value = want.dw[j * d + k], g = get(got.dw, p.dtype, j * d + k);
      CHECK(close(g, value, products * want.dw_size[j] + ulp * std::fabs(value)), name_of(p.dtype), n, rows,
            subcenters, j, k, g, value);
    }
  }
}

// The tiles of any runtime hold whole classes; a cache changes no bit.
template <typename T>
void all_of() {
  for (int64_t subcenters : {1, 2, 3, 7, 64}) {
    for (const Shape shape : {Shape{0, 5, 3}, Shape{1, 1, 5}, Shape{5, 90, 7}, Shape{261, 40, 16}}) {
      for (DType dtype : {sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32, DType::kBFloat16}) {
        const int64_t rows = shape.classes * subcenters;
        Problem<T> p({shape.n, rows, shape.d}, dtype, shape.d + 3, 8);
        for (int64_t i = 0; i < shape.n; ++i) {
          p.y[i] = i % 5 == 2 ? -1 : i * i % shape.classes;
          if (p.y[i] < 0) p.g_cos[i] = 0;
        }
        const Definition want = define(p, subcenters);
        Options options{.subcenters = subcenters};
        for (const auto& [threads, tile] : {std::pair{1, 0}, {2, 1}, {3, 20}, {4, 100}}) {
          options.cosines = nullptr, options.cosine_bytes = 0;
          const Pass<T> pass(p, runtime(threads, tile), options);
          check_pass(p, want, pass, subcenters);
          CHECK(pass.same_bits(Pass<T>(p, runtime(threads, tile, Order::kReversed), options)), threads, tile);
          Exact<char> memory(64 + 64 + static_cast<int64_t>(sizeof(T)) * shape.n * (rows + 256));
          const int64_t skip = -reinterpret_cast<intptr_t>(memory.begin()) & 63;
          options.cosines = memory + skip, options.cosine_bytes = (memory.size() - skip) / 64 * 64;
          options.exact_cosines = true;
          CHECK(pass.same_bits(Pass<T>(p, runtime(threads, tile), options)), threads, tile, subcenters);
        }
      }
    }
  }
}

// Of equal rows the first has the gradient, also where there is no number among them.
template <typename T>
void equal_rows() {
  Problem<T> p({9, 12, 6}, DType::kFloat32, 6, 8);
  for (int64_t i = 0; i < 9; ++i) p.y[i] = i % 4;
  for (int64_t j : {1, 2, 4, 5}) {
    for (int64_t k = 0; k < 6; ++k) p.set_weight(j * 6 + k, p.weight(j / 3 * 3, k));
  }
  const Pass<T> pass(p, runtime(1, 0), Options{.subcenters = 3});
  for (int64_t k = 0; k < 6 * 12; ++k) {
    const int64_t j = k / 6;
    if (j == 1 || j == 2 || j == 4 || j == 5) CHECK(get(pass.dw, p.dtype, k) == 0, j, k);
  }
}

void tests() {
  all_of<float>();
  equal_rows<float>();
  if (multiplies_bfloat16()) return;  // with which double has nothing to do
  all_of<double>();
  equal_rows<double>();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::tests); }
