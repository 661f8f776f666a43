// Each CUDA kernel, on the SIMT shim, against double loops of its definition.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "float8.h"
#include "formats.h"

namespace cosface::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::mt19937_64 engine(35);

double normal() { return std::normal_distribution<double>()(engine); }

template <typename T>
std::vector<DType> operands() {
  if (sizeof(T) == 8) return {DType::kFloat64};
  return {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
}

// Half the distance from 1 to the next number.
double rounding(DType dtype) {
  const int fraction_bits[] = {52, 23, 7, 10, 3};
  return std::ldexp(0.5, -fraction_bits[static_cast<int>(dtype)]);
}

template <typename T>
constexpr DType kDTypeOf = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

bool close(double got, double want, double tolerance) { return std::fabs(got - want) <= tolerance; }

// Rows with gaps between them, whose memory is nan: a read beyond a row shows.
struct Matrix {
  int64_t n, columns, stride;
  DType dtype;
  Exact<char> memory;
  Exact<int8_t> exponents;  // of float8
  bool has_roots = false;   // in place of squares

  Matrix(int64_t n, int64_t columns, int64_t stride, DType dtype)
      : n(n),
        columns(columns),
        stride(stride),
        dtype(dtype),
        memory(((n - 1) * stride + columns) * size_of(dtype)),
        exponents(dtype == DType::kFloat8 ? n : 0) {
    for (int8_t& e : exponents) e = static_cast<int8_t>(engine() % 7) - 3;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t k = 0; k < columns; ++k) put(normal(), memory, dtype, i * stride + k);
    }
  }

  double unit(int64_t i) const { return exponents.size() == 0 ? 1 : std::ldexp(1, exponents[i]); }
  double operator()(int64_t i, int64_t k) const {
    const double held = unit(i) * get(memory, dtype, i * stride + k);
    return has_roots ? held * held : held;
  }
  void scale_row(int64_t i, double factor) const {
    for (int64_t k = 0; k < columns; ++k)
      put(get(memory, dtype, i * stride + k) * factor, memory, dtype, i * stride + k);
  }
  double norm(int64_t i) const {
    double squares = 0;
    for (int64_t k = 0; k < columns; ++k) squares += (*this)(i, k) * (*this)(i, k);
    return std::max(std::sqrt(squares), kEps);
  }
  cuda::Rows rows() const { return {memory, dtype, n, columns, stride}; }
};

// Widths that one warp reads and that need a block, both aligned to the widest load and not.
constexpr int64_t kWidths[] = {1, 7, 8, 64, 515, 2112};

template <typename Body>
void each_matrix(DType dtype, Body body) {
  for (int64_t columns : kWidths) {
    for (int64_t n : {1, 6}) {
      for (int64_t gap : {0, 3, 8}) body(Matrix(n, columns, columns + gap, dtype));
    }
  }
}

template <typename T>
void normalize_rows(DType dtype) {
  each_matrix(dtype, [&](const Matrix& v) {
    if (v.n > 1) v.scale_row(1, 0);
    Exact<T> factor(v.n), inv_norm(v.n);
    Exact<char> hat(v.n * v.columns * size_of(dtype));
    for (T& f : factor) f = static_cast<T>(std::ldexp(1, static_cast<int>(engine() % 8)));
    if (v.n > 2) {
      factor[2] = 0;
      v.scale_row(2, kNan);
    }
    cuda::row_norms<T>(v.rows(), inv_norm, nullptr);
    cuda::normalize_rows<T>(v.rows(), inv_norm, factor, hat, nullptr);
    for (int64_t i = 0; i < v.n; ++i) {
      const double norm = v.norm(i);
      if (i != 2) CHECK(close(inv_norm[i] * norm, 1, 16 * rounding(kDTypeOf<T>)), i, v.columns, inv_norm[i], norm);
      for (int64_t k = 0; k < v.columns; ++k) {
        const double got = get(hat, dtype, i * v.columns + k), want = i == 2 ? 0 : v(i, k) / norm * factor[i];
        const double tolerance = 2 * rounding(dtype) + 8 * rounding(kDTypeOf<T>);
        CHECK(close(got, want, tolerance * std::fabs(want) + 1e-7), i, k, v.columns, v.stride, got, want);
      }
    }
    const Exact<char> by_none = hat;
    std::fill_n(factor.begin(), v.n, T(1));
    cuda::normalize_rows<T>(v.rows(), inv_norm, factor, hat, nullptr);
    cuda::normalize_rows<T>(v.rows(), inv_norm, nullptr, by_none, nullptr);
    CHECK(by_none.same_bits(hat), v.columns);
  });
}

template <typename T>
void project_rows(DType dtype) {
  each_matrix(dtype, [&](const Matrix& v) {
    if (v.n > 1) v.scale_row(1, 0);
    Exact<T> g_rows(v.n * v.columns), factor(v.n), inv_norm(v.n);
    for (T& g : g_rows) g = static_cast<T>(normal());
    for (int64_t i = 0; i < v.n; ++i) {
      factor[i] = static_cast<T>(std::ldexp(1, -2 * static_cast<int>(i)));
      inv_norm[i] = static_cast<T>(1 / v.norm(i));
    }
    if (v.n > 2) {
      factor[2] = 0;
      v.scale_row(2, kNan);
    }
    for (DType out_dtype : {dtype, kDTypeOf<T>}) {
      for (auto [step, divided] : {std::pair<int64_t, bool>{0, false}, {1, false}, {0, true}, {1, true}}) {
        Exact<char> out(v.n * v.columns * size_of(out_dtype));
        cuda::project_rows<T>(g_rows, divided, v.rows(), inv_norm, factor, step, out, out_dtype, nullptr);
        for (int64_t i = 0; i < v.n; ++i) {
          const double by = factor[i * step] * (divided ? 1.0 : double{inv_norm[i]});
          double dot = 0, size = 0;
          for (int64_t k = 0; k < v.columns; ++k) {
            const double term = g_rows[i * v.columns + k] * v(i, k) * inv_norm[i];
            dot += term;
            size += std::fabs(term);
          }
          for (int64_t k = 0; k < v.columns; ++k) {
            if (i == 2 && step == 0) continue;  // nan, as it should be
            const double projection = i == 1 ? 0 : dot * v(i, k) * inv_norm[i], g = g_rows[i * v.columns + k];
            const double want = i == 2 ? 0 : (g - projection) * by, got = get(out, out_dtype, i * v.columns + k);
            const double tolerance = rounding(out_dtype) * std::fabs(want) +
                                     8 * rounding(kDTypeOf<T>) * by * (std::fabs(g) + (i == 2 ? 0 : size)) +
                                     (out_dtype == DType::kFloat16 ? 1e-7 : 0);
            const bool overflows = out_dtype == DType::kFloat16 && std::fabs(want) > 65000;
            CHECK(overflows || close(got, want, tolerance), i, k, v.columns, step, divided, got, want);
          }
        }
      }
    }
  });
}

// Dot products of n embeddings with the classes of several chunks, and what the definition makes of them.
template <typename T>
struct Logits {
  int64_t n, classes, chunk;
  std::vector<double> dot;  // (n, classes)
  Exact<T> x_inv_norm, w_inv_norm, s, tau, coefficients;
  Exact<int64_t> y, second;
  bool reshaped, two;  // two: targets, of most samples

  Logits(int64_t n, int64_t classes, int64_t chunk, double scale, bool reshaped, bool two)
      : n(n),
        classes(classes),
        chunk(chunk),
        dot(n * classes),
        x_inv_norm(n),
        w_inv_norm(classes),
        s(n),
        tau(n),
        coefficients(6),
        y(n),
        second(n, -1),
        reshaped(reshaped),
        two(two) {
    const double values[] = {0.7, -0.4, 0.1, 0.9, 1.3, -0.2};
    for (int64_t k = 0; k < 6; ++k) coefficients[k] = static_cast<T>(values[k]);
    for (int64_t i = 0; i < n; ++i) tau[i] = static_cast<T>(0.3 * i - 0.5);
    for (int64_t i = 0; i < n; ++i) x_inv_norm[i] = static_cast<T>(std::ldexp(1 + 0.3 * normal(), -1));
    for (T& v : w_inv_norm) v = static_cast<T>(1 + std::fabs(normal()));
    for (int64_t i = 0; i < n; ++i) {
      const int64_t targets[] = {0, classes - 1, -1, chunk - 1, chunk};
      y[i] = std::min(targets[i % 5], classes - 1);
      const int64_t other = std::min(targets[(i + 3) % 5], classes - 1);
      if (two && other != y[i]) second[i] = other;
      s[i] = static_cast<T>(i == 5 ? 0 : scale);
      for (int64_t j = 0; j < classes; ++j) {
        const double cos = std::tanh(normal());
        dot[i * classes + j] = static_cast<T>(cos / x_inv_norm[i] / w_inv_norm[j]);
      }
    }
  }

  double cos(int64_t i, int64_t j) const { return dot[i * classes + j] * x_inv_norm[i] * w_inv_norm[j]; }

  bool is_target(int64_t i, int64_t j) const { return j == y[i] || j == second[i]; }

  // Rounding must not put a cosine on the other side of its threshold.
  bool hard(int64_t i, int64_t j) const {
    const T c = static_cast<T>(dot[i * classes + j]) * x_inv_norm[i] * w_inv_norm[j];
    return reshaped && c > tau[i];
  }
  double shaped(int64_t i, int64_t j) const {
    const double c = cos(i, j);
    if (!reshaped) return c;
    return hard(i, j) ? (coefficients[0] * c + coefficients[1]) * c + coefficients[2] : coefficients[3] * c;
  }
  double slope(int64_t i, int64_t j) const {
    if (!reshaped) return 1;
    return hard(i, j) ? coefficients[4] * cos(i, j) + coefficients[5] : coefficients[3];
  }

  // Calls body(a chunk whose dot is this memory).
  template <typename Body>
  void each_chunk(int64_t segments, Body body) const {
    for (int64_t first = 0; first < classes; first += chunk) {
      const int64_t width = std::min(chunk, classes - first);
      Exact<T> part(n * width), inv_norm(width);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < width; ++j) part[i * width + j] = static_cast<T>(dot[i * classes + first + j]);
      }
      std::copy_n(w_inv_norm + first, width, inv_norm.begin());
      body(cuda::Chunk<T>{part, n, width, first, x_inv_norm, inv_norm, y, s, segments,
                          reshaped ? static_cast<const T*>(tau) : nullptr, coefficients, nullptr, 0,
                          two ? second.begin() : nullptr});
    }
  }

  double top(int64_t i) const {
    double top = -std::numeric_limits<double>::infinity();
    for (int64_t j = 0; j < classes; ++j) top = is_target(i, j) ? top : std::max(top, shaped(i, j));
    return std::isinf(top) ? 0 : top;
  }

  double lse(int64_t i) const {
    double sum = 0;
    for (int64_t j = 0; j < classes; ++j) sum += is_target(i, j) ? 0 : std::exp(s[i] * shaped(i, j));
    return std::log(sum);
  }

  // As in cosface_kernels/reference.py; `size`: what their rounding may be relative to.
  struct Moments {
    double below = 0, sum = 0, hard_sum = 0, hard_count = 0, size = 1;
  };
  Moments moments(int64_t i) const {
    const double top = this->top(i), lse = this->lse(i);
    Moments m;
    for (int64_t j = 0; j < classes; ++j) {
      if (is_target(i, j)) continue;
      m.below += std::exp(s[i] * shaped(i, j) - lse) * (top - shaped(i, j));
      m.sum += shaped(i, j);
      m.hard_sum += hard(i, j) ? cos(i, j) : 0;
      m.hard_count += hard(i, j);
      m.size += std::fabs(shaped(i, j)) + std::fabs(cos(i, j));
    }
    return m;
  }
};

template <typename Body>
void each_logits(Body body) {
  for (int64_t segments : {1, 3}) {
    body(7, 1, 256, segments);
    body(1, 5, 4, segments);
    body(6, 300, 128, segments);    // a warp a row, the last chunk a ragged one
    body(7, 2603, 1301, segments);  // a block a row, not aligned
    body(3, 9000, 5000, segments);  // a block a row, aligned
  }
}

// With moments, each sample has one target or, where several blocks share a row, two.
template <typename T>
void statistics(bool reshaped, bool with_moments) {
  each_logits([=](int64_t n, int64_t classes, int64_t chunk, int64_t segments) {
    const bool two = with_moments && segments > 1;
    const Logits<T> logits(n, classes, chunk, 32, reshaped, two);
    Exact<T> tops(segments * n, std::numeric_limits<T>::lowest());
    Exact<T> max_cos(segments * n, std::numeric_limits<T>::lowest());
    Exact<double> sum_exp(segments * n, 0.0);
    Exact<double> sums(with_moments ? 4 * segments * n : 0, 0.0);
    const cuda::RunningStatistics<T> running{reshaped ? tops : max_cos, max_cos, sum_exp,
                                             with_moments ? sums.begin() : nullptr};
    Exact<T> loss(n), top(n), log_sum(n), target_cos(two ? 2 * n : n, T(0)), max_neg(n), moments(4 * n);
    logits.each_chunk(segments, [&](const cuda::Chunk<T>& part) {
      cuda::class_statistics(part, running, target_cos.begin(), nullptr);
    });
    cuda::merge_statistics<T>(running, segments, n, logits.y, logits.s, T(0.35),
                              {loss, top, log_sum, target_cos, max_neg, with_moments ? moments.begin() : nullptr},
                              nullptr);
    for (int64_t i = 0; i < n; ++i) {
      const double want_lse = logits.lse(i), tolerance = 200 * rounding(kDTypeOf<T>);
      const double want_cos = logits.y[i] < 0 ? 0 : logits.cos(i, logits.y[i]);
      double want_max = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < classes; ++j)
        want_max = logits.is_target(i, j) ? want_max : std::max(want_max, logits.cos(i, j));
      const double z = want_lse - logits.s[i] * (want_cos - T(0.35));
      const double want_loss = logits.y[i] < 0 ? 0 : std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z)));
      const double lse = logits.s[i] * double{top[i]} + log_sum[i];
      CHECK(lse == want_lse || close(lse, want_lse, tolerance * 2), i, classes, segments, lse, want_lse);
      CHECK(close(top[i], logits.top(i), tolerance), i, classes, segments, top[i], logits.top(i));
      CHECK(close(target_cos[i], want_cos, tolerance), i, classes, target_cos[i], want_cos);
      CHECK(max_neg[i] == want_max || close(max_neg[i], want_max, tolerance), i, classes, max_neg[i], want_max);
      CHECK(close(loss[i], want_loss, tolerance * (2 + want_loss)), i, classes, segments, loss[i], want_loss);
      if (two) {
        const double want_second = logits.second[i] < 0 ? 0 : logits.cos(i, logits.second[i]);
        CHECK(close(target_cos[n + i], want_second, tolerance), i, classes, target_cos[n + i], want_second);
      }
      if (!with_moments) continue;
      const auto want = logits.moments(i);
      const double of_sums = 32 * rounding(kDTypeOf<T>) * want.size;
      CHECK(close(moments[i], want.below, tolerance * 2), i, classes, segments, moments[i], want.below);
      CHECK(close(moments[n + i], want.sum, of_sums), i, classes, segments, moments[n + i], want.sum);
      CHECK(close(moments[2 * n + i], want.hard_sum, of_sums), i, classes, moments[2 * n + i], want.hard_sum);
      CHECK(moments[3 * n + i] == want.hard_count, i, classes, segments, moments[3 * n + i], want.hard_count);
    }
  });
}

// A cache, whose rows have gaps between them, and how a chunk sees it.
template <typename T>
struct Cache {
  int64_t stride;
  Exact<cuda::Kept<T>> kept;

  Cache(int64_t n, int64_t stride) : stride(stride), kept(n * stride) {}

  cuda::Chunk<T> seen_by(cuda::Chunk<T> chunk) const {
    chunk.kept = kept + chunk.first_class;
    chunk.kept_stride = stride;
    return chunk;
  }
  double cos(int64_t i, int64_t j) const {
    const auto value = kept[i * stride + j];
    return sizeof(T) == 8 ? static_cast<double>(value) : value / 32767.0;
  }
};

// Fills the cache by the pass that makes statistics, which are those without it, in the same bits if its rows are
// aligned as the chunks are; then the cosines are what it holds.
template <typename T>
void keep_cosines(Logits<T>& logits, int64_t segments, const Cache<T>& cache) {
  const int64_t n = logits.n, classes = logits.classes;
  const auto statistics = [&](auto seen) {
    Exact<T> tops(segments * n, std::numeric_limits<T>::lowest()), target_cos(2 * n, T(0));
    Exact<double> moments(4 * segments * n, 0.0);
    Exact<double> sum_exp(segments * n, 0.0);
    const Exact<T> max_cos = tops;
    logits.each_chunk(segments, [&](const cuda::Chunk<T>& part) {
      cuda::class_statistics<T>(seen(part), {tops, max_cos, sum_exp, logits.two ? moments.begin() : nullptr},
                                target_cos, nullptr);
    });
    return std::tuple(tops, target_cos, sum_exp);
  };
  const auto [tops, target_cos, sum_exp] = statistics([](const auto& part) { return part; });
  const auto keeping = statistics([&](const auto& part) { return cache.seen_by(part); });
  CHECK(std::get<1>(keeping).same_bits(target_cos), classes, segments);
  if (cache.stride % 8 == 0) {
    CHECK(std::get<0>(keeping).same_bits(tops), classes, segments);
    CHECK(std::get<2>(keeping).same_bits(sum_exp), classes, segments);
  }
  const double step = sizeof(T) == 8 ? 4 * rounding(DType::kFloat64) : 0x1p-16 + 4 * rounding(DType::kFloat32);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < classes; ++j) {
      CHECK(close(cache.cos(i, j), logits.cos(i, j), step), i, j, classes, cache.cos(i, j), logits.cos(i, j));
      logits.dot[i * classes + j] = cache.cos(i, j) / logits.x_inv_norm[i] / logits.w_inv_norm[j];
    }
    for (int64_t j = i * cache.stride + classes; j < (i + 1) * cache.stride; ++j) {
      const Exact<cuda::Kept<T>> untouched(1);
      CHECK(std::memcmp(cache.kept + j, untouched, sizeof(untouched[0])) == 0, i, j, classes);
    }
  }
}

// Samples of which one gradient alone is not 0, and others without any, are among those with all.
template <typename T>
void logit_gradients(DType dtype, bool reshaped, bool cached, bool with_moments) {
  each_logits([=](int64_t n, int64_t classes, int64_t chunk, int64_t segments) {
    const bool two = with_moments && segments > 1;
    Logits<T> logits(n, classes, chunk, 16, reshaped, two);
    const Cache<T> cache(n, segments == 1 ? (classes + 7) / 8 * 8 : classes + 1);
    if (cached) keep_cosines(logits, segments, cache);
    Exact<T> top(n), log_sum(n), g_lse(n), g_cos(two ? 2 * n : n), unit(n), moments(2 * n, T(0));
    for (int64_t i = 0; i < n; ++i) {
      top[i] = static_cast<T>(logits.top(i));
      log_sum[i] = static_cast<T>(logits.lse(i) - double{logits.s[i]} * double{top[i]});
      const bool active = i % 3 != 1;
      const auto asked = [&](int64_t alone) {
        return active && (!with_moments || i == 0 || i == 6 || i == alone);
      };
      g_lse[i] = static_cast<T>(asked(-1) ? normal() : 0);
      g_cos[i] = static_cast<T>(asked(-1) && logits.y[i] >= 0 ? 16 * normal() : 0);
      if (with_moments) moments[i] = static_cast<T>(asked(2) ? normal() : 0);
      if (with_moments) moments[n + i] = static_cast<T>(asked(5) ? normal() : 0);
      if (two) g_cos[n + i] = static_cast<T>(asked(3) && logits.second[i] >= 0 ? 16 * normal() : 0);
      unit[i] = static_cast<T>(std::ldexp(1, 7));
      if (!active) log_sum[i] = std::numeric_limits<T>::quiet_NaN();
    }
    const Upstream<T> upstream{top, log_sum, g_lse, g_cos, with_moments ? moments.begin() : nullptr};
    Exact<double> negative_dot(segments * n, 0.0);
    std::vector<double> want_dot(n, 0.0);
    logits.each_chunk(segments, [&](const cuda::Chunk<T>& computed) {
      const cuda::Chunk<T> part = cached ? cache.seen_by(computed) : computed;
      if (cached) std::fill_n(part.dot, n * part.classes, std::numeric_limits<T>::quiet_NaN());
      Exact<char> apart(n * part.classes * size_of(dtype));
      char* g = dtype == kDTypeOf<T> ? reinterpret_cast<char*>(part.dot) : apart;
      cuda::logit_gradients<T>(part, upstream, unit, g, dtype, negative_dot, nullptr);
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < part.classes; ++j) {
          const int64_t global = part.first_class + j;
          const double shaped = logits.shaped(i, global);
          const double p = std::exp(logits.s[i] * (shaped - top[i]) - log_sum[i]);
          const double b = moments[i], c = moments[n + i], g_second = two ? double{g_cos[n + i]} : 0;
          const bool active = g_lse[i] != 0 || g_cos[i] != 0 || g_second != 0 || b != 0 || c != 0;
          const bool is_target = logits.is_target(i, global);
          const double of_target = global == logits.y[i] ? double{g_cos[i]} : g_second;
          const double t = (g_lse[i] + b * (shaped - top[i])) * p, slope = logits.slope(i, global);
          const double of_negative = (logits.s[i] * t + b * p + c) * slope;
          const double gradient = !active ? 0 : is_target ? of_target : of_negative;
          if (active && !is_target) want_dot[i] += t * shaped;
          const double divided = cuda::is_divided(dtype) ? logits.w_inv_norm[global] : 1;
          const double by = divided * cuda::kGradientLift / unit[i], want = gradient * by,
                       got = get(g, dtype, i * part.classes + j);
          const double of_lse = logits.s[i] * (std::fabs(g_lse[i]) + std::fabs(b * (shaped - top[i]))) * p;
          const double parts = (1 + std::fabs(slope)) * (of_lse + std::fabs(b) * p + std::fabs(c));  // may cancel
          const double size = active && !is_target ? parts * by : 0;
          const double tolerance = (rounding(dtype) + 100 * rounding(kDTypeOf<T>)) * std::fabs(want) +
                                   100 * rounding(kDTypeOf<T>) * size + 1e-7;
          CHECK(close(got, want, tolerance), i, global, classes, segments, got, want);
        }
      }
    });
    for (int64_t i = 0; i < n; ++i) {
      double got = 0;
      for (int64_t segment = 0; segment < segments; ++segment) got += negative_dot[segment * n + i];
      const double size = std::fabs(g_lse[i]) + 2 * std::fabs(moments[i]);
      CHECK(close(got, want_dot[i], 200 * rounding(kDTypeOf<T>) * size), i, classes, got, want_dot[i]);
    }
  });
}

// Biases at which p_ij is near 0, near 1 and between; cosines beyond 1 and -1; samples without gradients, and some
// with one alone.
template <typename T>
void sigmoid_gradients(DType dtype, bool by_angle) {
  each_logits([=](int64_t n, int64_t classes, int64_t chunk, int64_t segments) {
    Logits<T> logits(n, classes, chunk, 8, false, false);
    const double coefficients[] = {0.1, 0.5, 0.3, -0.2, 0.4, 0.6, -0.7, 0.8, 1.1, -0.9};
    Exact<T> polynomials(10), log_sum(n), g_added(n), g_cos(n), unit(n, T(128));
    for (int64_t k = 0; k < 10; ++k) polynomials[k] = static_cast<T>(coefficients[k]);
    const auto polynomial = [&](int64_t from, double c) {
      double value = 0;
      for (int64_t k = 5; k-- > 0;) value = value * c + polynomials[from + k];
      return value;
    };
    for (int64_t i = 0; i < n; ++i) {
      const double edges[] = {1.25, -1.25}, biases[] = {-40, -2, 30, 3};
      for (int64_t j = 0; j < std::min<int64_t>(classes, 2); ++j) {
        const double dot = edges[j] / logits.x_inv_norm[i] / logits.w_inv_norm[j];
        logits.dot[i * classes + j] = static_cast<T>(dot);
      }
      const bool active = i % 3 != 1;
      g_added[i] = static_cast<T>(active && i != 2 ? normal() : 0);
      g_cos[i] = static_cast<T>(active && i != 3 ? 16 * normal() : 0);
      log_sum[i] = active ? static_cast<T>(-biases[i % 4]) : std::numeric_limits<T>::quiet_NaN();
    }
    const Upstream<T> upstream{nullptr, log_sum, g_added, g_cos};
    Exact<double> sums(3 * segments * n, 0.0);
    std::vector<double> want_sums(3 * n), sizes(3 * n);
    const double ulps = 100 * rounding(kDTypeOf<T>);
    logits.each_chunk(segments, [&](const cuda::Chunk<T>& part) {
      Exact<char> apart(n * part.classes * size_of(dtype));
      char* g = dtype == kDTypeOf<T> ? reinterpret_cast<char*>(part.dot) : apart;
      cuda::sigmoid_gradients<T>(part, upstream, by_angle ? nullptr : polynomials.begin(), unit, g, dtype, sums,
                                 nullptr);
      for (int64_t i = 0; i < n; ++i) {
        const bool active = g_added[i] != 0 || g_cos[i] != 0;
        for (int64_t j = 0; j < part.classes; ++j) {
          const int64_t global = part.first_class + j;
          const bool is_target = global == logits.y[i];
          const double c = logits.cos(i, global), inside = std::clamp(c, -1.0, 1.0);
          const double shaped = by_angle ? -std::acos(inside) : polynomial(0, c);
          const double z = logits.s[i] * shaped - log_sum[i], e = std::exp(-std::fabs(z));
          const double p = (z > 0 ? 1 : e) / (1 + e), adds = by_angle ? p * c : std::max(z, 0.0) + std::log1p(e);
          const double of_negative = g_added[i] * p * (by_angle ? 1 : logits.s[i] * polynomial(5, c));
          const double gradient = !active ? 0 : is_target ? double{g_cos[i]} : of_negative;
          const double by =
              (cuda::is_divided(dtype) ? logits.w_inv_norm[global] : 1) * cuda::kGradientLift / unit[i];
          const double got = get(g, dtype, i * part.classes + j), want = gradient * by;
          // the slope of z, by angles that of arccos
          const double steep = 1 + logits.s[i] * (by_angle ? 1 / std::sqrt(1e-3 + 1 - inside * inside) : 4);
          const double of_slope = by_angle ? 1 : 4 * logits.s[i];
          const double size = active && !is_target ? std::fabs(g_added[i]) * p * of_slope * by * steep : 0;
          CHECK(close(got, want, rounding(dtype) * std::fabs(want) + ulps * (size + std::fabs(want)) + 1e-7), i,
                global, classes, segments, by_angle, got, want);
          if (!active || is_target) continue;
          const double terms[] = {by_angle ? 0 : g_added[i] * p * shaped, adds, p};
          for (int64_t k = 0; k < 3; ++k) {
            want_sums[k * n + i] += terms[k];
            sizes[k * n + i] += (std::fabs(terms[k]) + p * std::max(1.0, std::fabs(double{g_added[i]}))) * steep;
          }
        }
      }
    });
    for (int64_t k = 0; k < 3 * n; ++k) {
      double got = 0;
      for (int64_t segment = 0; segment < segments; ++segment)
        got += sums[(k / n * segments + segment) * n + k % n];
      const double of_want = static_cast<double>(classes) * rounding(DType::kFloat64);  // its terms may be equal
      CHECK(close(got, want_sums[k], (ulps + of_want) * sizes[k]), k, n, classes, segments, by_angle, got,
            want_sums[k]);
    }
  });
}

// One number as torch.optim.SGD and AdamW move it, in double; `state` holds what there is of it.
double moved(const Update& u, double g, double w, std::vector<double>& state) {
  if (u.rule == Update::Rule::kSgd) {
    g += u.weight_decay * w;
    if (state.empty()) return w - u.lr * g;
    state[0] = u.momentum * state[0] + (1 - u.dampening) * g;
    return w - u.lr * (u.nesterov ? g + u.momentum * state[0] : state[0]);
  }
  state[0] = u.beta1 * state[0] + (1 - u.beta1) * g;
  state[1] = u.beta2 * state[1] + (1 - u.beta2) * g * g;
  if (state.size() == 3) state[2] = std::max(state[2], state[1]);
  const double step = static_cast<double>(u.step);
  const double mean = state[0] / (1 - std::pow(u.beta1, step)),
               square = state.back() / (1 - std::pow(u.beta2, step));
  return w * (1 - u.lr * u.weight_decay) - u.lr * mean / (std::sqrt(square) + u.eps);
}

struct Variant {
  Update update;
  size_t states;
};

std::vector<Variant> variants() {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  Update sgd{};
  sgd.rule = Update::Rule::kSgd;
  sgd.step = 3, sgd.seed = uint64_t{1} << 40 | 7, sgd.gradient_factor = 1, sgd.max_row_norm = kNone, sgd.lr = 0.1;
  Update decayed = sgd, first = sgd, nesterov = sgd, clipped = sgd, stopped = sgd;
  decayed.weight_decay = 0.2, decayed.gradient_factor = -0.5;
  first.step = 1, first.momentum = 0.9, first.dampening = 0.3;
  nesterov.momentum = 0.9, nesterov.nesterov = true, nesterov.weight_decay = 0.1;
  clipped.momentum = 0.8, clipped.dampening = 0.3, clipped.gradient_factor = 0.5, clipped.max_row_norm = 0.7;
  stopped.max_row_norm = 0;
  Update adamw = sgd;
  adamw.rule = Update::Rule::kAdamW;
  adamw.beta1 = 0.9, adamw.beta2 = 0.99, adamw.eps = 1e-3, adamw.weight_decay = 0.1;
  Update start = adamw, amsgrad = adamw;
  start.step = 1, start.weight_decay = 0;
  amsgrad.gradient_factor = -2, amsgrad.max_row_norm = 1.5;
  return {{sgd, 0},     {decayed, 0}, {first, 1}, {nesterov, 1}, {clipped, 1},
          {stopped, 0}, {adamw, 2},   {start, 2}, {amsgrad, 3}};
}

// What a row makes of an exact value: near it, or in bfloat16 and float8 one of its two neighbours.
bool is_rounded(const Matrix& rows, int64_t i, int64_t k, double want, double size, DType computed) {
  const bool is_float8 = rows.dtype == DType::kFloat8;
  double got = rows(i, k);
  if (rows.has_roots) got = std::sqrt(got), want = std::sqrt(want), size /= want;
  const double steps = is_float8 || rows.dtype == DType::kBFloat16 ? 2 : 1;
  const double subnormal = is_float8 ? std::ldexp(rows.unit(i), -9) : 0;
  return close(got, want,
               steps * rounding(rows.dtype) * std::fabs(want) + 16 * rounding(computed) * size + subnormal);
}

// Whether the largest number of a row is where its exponent puts it, or 0.
bool fills_the_range(const Matrix& rows, int64_t i) {
  double largest = 0;
  for (int64_t k = 0; k < rows.columns; ++k)
    largest = std::max(largest, std::fabs(get(rows.memory, rows.dtype, i * rows.stride + k)));
  return rows.dtype != DType::kFloat8 || largest == 0 || (largest >= 224 && largest <= 448);
}

template <typename T>
void move_rows_of(const Variant& variant, const Matrix& before, DType state_dtype, bool chosen) {
  constexpr int64_t kMoved = 6;  // rows; one block of warps is ragged
  const int64_t columns = before.columns, first_row = chosen ? 0 : 2;
  Exact<int64_t> index(kMoved);
  for (int64_t j = 0; j < kMoved; ++j) index[j] = chosen ? (before.n - 1) * j / (kMoved - 1) : first_row + j;
  const Matrix w = before;
  const auto dtype_of = [&](size_t t) {  // each has its own
    return t != 1 ? state_dtype : state_dtype == DType::kBFloat16 ? DType::kFloat8 : DType::kBFloat16;
  };
  std::vector<Matrix> states_before;
  for (size_t t = 0; t < variant.states; ++t) {
    states_before.emplace_back(before.n, columns, columns, dtype_of(t));
    states_before.back().has_roots = t > 0 && dtype_of(t) == DType::kFloat8;
    for (int64_t k = 0; t > 0 && k < before.n * columns; ++k) {
      put(0.1 + std::fabs(get(states_before[t].memory, dtype_of(t), k)), states_before[t].memory, dtype_of(t), k);
    }
  }
  const std::vector<Matrix> states = states_before;
  Exact<T> g(kMoved * columns);
  for (int64_t k = 0; k < g.size(); ++k)
    g[k] = static_cast<T>(k < columns ? 0 : normal());  // the first row has none
  Update update = variant.update;
  update.weight = w.memory, update.weight_exponents = w.exponents;
  for (size_t t = 0; t < 3; ++t) {
    update.state[t] = {nullptr, dtype_of(t)};
    if (t < states.size()) update.state[t] = {states[t].memory, dtype_of(t), states[t].exponents};
  }
  cuda::move_rows<T>(g, kMoved, columns, {w.memory, w.dtype, w.n, w.stride}, chosen ? index.begin() : nullptr,
                     first_row, update, nullptr);

  std::vector<bool> moves(before.n);
  for (int64_t j = 0; j < kMoved; ++j) {
    moves[index[j]] = true;
    const double of_stored = update.gradient_factor / before.unit(index[j]);
    double norm = 0;
    for (int64_t k = 0; k < columns; ++k) norm += std::pow(of_stored * g[j * columns + k], 2);
    norm = std::sqrt(norm);
    const double factor = of_stored * (norm > update.max_row_norm ? update.max_row_norm / norm : 1);
    CHECK(fills_the_range(w, index[j]), j, columns);
    for (int64_t k = 0; k < columns; ++k) {
      std::vector<double> state;
      for (const Matrix& values : states_before) state.push_back(values(index[j], k));
      const std::vector<double> old = state;
      const double v = before(index[j], k), gradient = factor * g[j * columns + k];
      const double want = moved(update, gradient, v, state), size = std::fabs(v) + std::fabs(gradient) + 1;
      CHECK(is_rounded(w, index[j], k, want, size, kDTypeOf<T>), j, k, columns, w.stride, v, gradient,
            w(index[j], k), want, name_of(w.dtype), name_of(state_dtype), variant.states);
      for (size_t t = 0; t < states.size(); ++t) {
        const double of_state = std::fabs(old[t]) + gradient * gradient +
                                (states[t].has_roots ? 0 : size);  // whose terms are positive
        CHECK(is_rounded(states[t], index[j], k, state[t], of_state, kDTypeOf<T>), j, k, t, columns,
              states[t](index[j], k), state[t], name_of(w.dtype), name_of(dtype_of(t)));
        CHECK(k > 0 || fills_the_range(states[t], index[j]), j, t, columns);
      }
    }
  }
  const auto stays = [&](const Matrix& now, const Matrix& then, int64_t row) {
    const int64_t bytes = size_of(now.dtype), offset = row * now.stride * bytes;
    return std::memcmp(now.memory + offset, then.memory + offset, columns * bytes) == 0 &&
           now.unit(row) == then.unit(row);
  };
  for (int64_t row = 0; row < before.n; ++row) {
    if (moves[row]) continue;
    CHECK(stays(w, before, row), row, columns);
    for (size_t t = 0; t < states.size(); ++t) CHECK(stays(states[t], states_before[t], row), row, t, columns);
  }
}

template <typename T>
std::vector<DType> movable() {
  if (sizeof(T) == 8) return {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat8};
  return {DType::kFloat32, DType::kBFloat16, DType::kFloat8};
}

template <typename T>
void move_rows() {
  for (DType dtype : movable<T>()) {
    for (DType state_dtype : {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat8}) {
      for (int64_t columns : kWidths) {
        for (int64_t gap : {0, 3}) {
          const Matrix w(9, columns, columns + gap, dtype);
          bool chosen = false;
          for (const Variant& variant : variants()) {
            move_rows_of<T>(variant, w, state_dtype, chosen);
            chosen = !chosen;
          }
        }
      }
    }
  }
}

// On numbers whose step is exact, momentum and weight have the bits that backend `cpu` gives them.
template <typename T>
void rounding_is_the_cpus(DType dtype) {
  constexpr int64_t kRows = 5, kFirst = 3;
  const auto number = [](int range, int exponent) {
    return std::ldexp(static_cast<int>(engine() % (2 * range)) - range, exponent);
  };
  for (int64_t columns : {1, 3, 130, 515, 1028, 1031, 2112}) {
    const Matrix w(kFirst + kRows, columns, columns, dtype), momentum = w;
    Exact<T> g(kRows * columns);
    for (T& v : g) v = static_cast<T>(number(1 << 15, -12));
    for (int64_t k = 0; k < w.n * columns; ++k) {
      put(number(128, -5), w.memory, dtype, k);
      put(number(128, -6), momentum.memory, dtype, k);
    }
    Update update{};
    update.rule = Update::Rule::kSgd;
    update.weight = w.memory, update.weight_exponents = w.exponents;
    update.state[0] = {momentum.memory, dtype, momentum.exponents};
    update.step = 5, update.seed = uint64_t{9} << 33 | 1, update.gradient_factor = update.lr = 1;
    update.max_row_norm = std::numeric_limits<double>::infinity(), update.momentum = 0.5;
    std::vector<T> want_w, want_momentum;
    for (int64_t j = 0; j < kRows; ++j) {
      for (int64_t k = 0; k < columns; ++k) {
        const double gradient = g[j * columns + k] / w.unit(kFirst + j);
        want_momentum.push_back(static_cast<T>(0.5 * momentum(kFirst + j, k) + gradient));
        want_w.push_back(static_cast<T>(w(kFirst + j, k) - want_momentum.back()));
      }
    }
    cuda::move_rows<T>(g, kRows, columns, {w.memory, w.dtype, w.n, w.stride}, nullptr, kFirst, update, nullptr);
    for (int64_t j = 0; j < kRows; ++j) {
      const auto is_the_cpus = [&](std::vector<T>& exact, const Matrix& got, int tensor) {
        const int64_t row = kFirst + j, bytes = columns * size_of(dtype);
        T* const from = &exact[j * columns];
        if (dtype == DType::kFloat8) {
          const int8_t exponent = float8_exponent(kernels<T>().largest(from, columns), 0);
          if (exponent != got.exponents[row]) return false;
          kernels<T>().times(from, columns, std::ldexp(T(1), -exponent));
        }
        Exact<char> want(bytes);
        kernels<T>().store_stochastic(from, columns, want, dtype, update.seed,
                                      rounding_stream(update.step, tensor), row);
        return std::memcmp(want, got.memory + row * bytes, bytes) == 0;
      };
      CHECK(is_the_cpus(want_w, w, kWeightTensor), j, columns);
      CHECK(is_the_cpus(want_momentum, momentum, 0), j, columns);
    }
  }
}

// Steps of 1/32 of the distance to the next number are lost in rounding to nearest; here a 32nd of the numbers
// move.
template <typename T>
void rounding_keeps_the_mean(DType dtype) {
  constexpr int64_t kRows = 40, kColumns = 512;
  const double distance = rounding(dtype), size = kRows * kColumns;  // to the number below 1
  const Matrix w(kRows, kColumns, kColumns, dtype);
  for (int64_t k = 0; k < kRows * kColumns; ++k) put(1, w.memory, dtype, k);
  std::fill(w.exponents.begin(), w.exponents.end(), 0);
  Exact<T> g(kRows * kColumns, static_cast<T>(distance / 32));
  Update update{};
  update.rule = Update::Rule::kSgd;
  update.weight = w.memory, update.weight_exponents = w.exponents;
  update.step = 1, update.gradient_factor = update.lr = 1;
  update.max_row_norm = std::numeric_limits<double>::infinity();
  cuda::move_rows<T>(g, kRows, kColumns, {w.memory, dtype, kRows, kColumns}, nullptr, 0, update, nullptr);
  int64_t count = 0;
  for (int64_t k = 0; k < kRows * kColumns; ++k) {
    const double v = w(k / kColumns, k % kColumns);
    CHECK(v == 1 || v == 1 - distance, v, name_of(dtype));
    count += v != 1;
  }
  CHECK(close(count / size, 1.0 / 32, 4 * std::sqrt(1.0 / 32 * 31 / 32 / size)), count, name_of(dtype));
}

// Rows of float8 by AdamW: of zeros, with a nan, with an infinity, and with gradients of many magnitudes, of whose
// squares no root becomes 0.
template <typename T>
void rows_of_float8_at_the_edges() {
  for (int64_t columns : kWidths) {
    const Matrix w(4, columns, columns, DType::kFloat8);
    const Matrix states[] = {w, w, w};
    for (const Matrix* rows : {&w, &states[0], &states[1], &states[2]}) {
      for (int64_t i = 0; i < 4; ++i) rows->scale_row(i, 0);
    }
    Exact<T> g(4 * columns, T(0));
    for (int64_t k = 0; k < columns; ++k) {
      g[columns + k] = static_cast<T>(k == 1 ? kNan : 1);
      g[2 * columns + k] = k == columns - 1 ? std::numeric_limits<T>::infinity() : T(1);
      g[3 * columns + k] = static_cast<T>(std::ldexp(k % 2 ? 1 : -1, -static_cast<int>(k % 40)));
    }
    Update update{};
    update.rule = Update::Rule::kAdamW;
    update.weight = w.memory, update.weight_exponents = w.exponents;
    for (int t = 0; t < 3; ++t) update.state[t] = {states[t].memory, DType::kFloat8, states[t].exponents};
    update.step = 1, update.gradient_factor = 1, update.lr = 0.5, update.beta1 = update.beta2 = 0.5;
    update.eps = 1e-3, update.max_row_norm = std::numeric_limits<double>::infinity();
    const Exact<int8_t> before = w.exponents;
    cuda::move_rows<T>(g, 4, columns, {w.memory, w.dtype, 4, columns}, nullptr, 0, update, nullptr);
    for (const Matrix* rows : {&w, &states[0], &states[1], &states[2]}) {
      const bool has_roots = rows == &states[1] || rows == &states[2];
      const auto stored = [&](int64_t i, int64_t k) { return get(rows->memory, rows->dtype, i * columns + k); };
      for (int64_t k = 0; k < columns; ++k) {
        CHECK(stored(0, k) == 0, columns, k, has_roots);
        CHECK(std::isnan(stored(1, k)) == (k == 1), columns, k, has_roots);
        CHECK(std::isnan(stored(2, k)) == (k == columns - 1), columns, k, has_roots);
        CHECK(!has_roots || stored(3, k) > 0, columns, k);
      }
      CHECK(rows->exponents[0] == before[0], columns);
      CHECK(rows == &w || rows->exponents[2] == before[2], columns);  // w moves by inf / inf there
      CHECK(fills_the_range(*rows, 3), columns, has_roots);
    }
  }
}

void float16_is_refused() {
  Exact<float> g(1, 0.0f);
  Exact<uint16_t> w(1, kHalf.encode(1));
  Update update{};
  update.weight = w;
  bool refused = false;
  try {
    cuda::move_rows<float>(g, 1, 1, {w, DType::kFloat16, 1, 1}, nullptr, 0, update, nullptr);
  } catch (const std::logic_error&) {
    refused = true;
  }
  CHECK(refused);
}

template <typename T>
void all() {
  for (DType dtype : operands<T>()) {
    normalize_rows<T>(dtype);
    project_rows<T>(dtype);
    for (bool by_angle : {false, true}) sigmoid_gradients<T>(dtype, by_angle);
    for (bool reshaped : {false, true}) {
      for (bool cached : {false, true}) {
        for (bool with_moments : {false, true}) logit_gradients<T>(dtype, reshaped, cached, with_moments);
      }
    }
  }
  for (bool reshaped : {false, true}) {
    for (bool with_moments : {false, true}) statistics<T>(reshaped, with_moments);
  }
  move_rows<T>();
  for (DType dtype : {DType::kBFloat16, DType::kFloat8}) {
    rounding_is_the_cpus<T>(dtype);
    rounding_keeps_the_mean<T>(dtype);
  }
  rows_of_float8_at_the_edges<T>();
}

}  // namespace
}  // namespace cosface::test

int main() {
  using namespace cosface::test;
  all<float>();
  all<double>();
  float16_is_refused();
  std::cout << checks << " checks, " << failures << " failures\n";
  return failures || !checks;
}
