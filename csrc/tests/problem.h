// A host for the driver, and batches with weights to run on it.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "formats.h"

namespace cosface::test {

template <typename T>
constexpr double kUlp = std::numeric_limits<T>::epsilon();

inline std::mt19937_64 engine(35);

inline double normal() { return std::normal_distribution<double>()(engine); }

inline bool close(double got, double want, double tolerance) {
  return std::isnan(want) ? std::isnan(got) : got == want || std::fabs(got - want) <= tolerance;
}

struct Shape {
  int64_t n, classes, d;
};

enum class Order { kThreads, kReversed };

// The plainest host there can be: a thread per part, or all parts on this thread from last to first.
inline Runtime runtime(int threads, int64_t tile_classes, Order order = Order::kThreads) {
  return {threads,
          [order](int64_t parts, const std::function<void(int64_t)>& body) {
            if (order == Order::kReversed) {
              for (int64_t part = parts; part-- > 0;) body(part);
              return;
            }
            std::vector<std::thread> workers;
            for (int64_t part = 0; part < parts; ++part) workers.emplace_back(body, part);
            for (auto& worker : workers) worker.join();
          },
          tile_classes};
}

template <typename T>
struct Problem {
  Shape shape;
  DType dtype;
  int64_t row_stride;
  Exact<T> x, s, top, log_sum, g_lse, g_cos;
  Exact<char> w;
  Exact<int64_t> y;
  T margin = T(0.35);
  std::vector<T> tau;  // (N), or empty where negatives are not reshaped
  T q = 0, a = 1, b = 0;

  Problem(Shape shape, DType dtype, int64_t row_stride, double scale)
      : shape(shape),
        dtype(dtype),
        row_stride(row_stride),
        x(shape.n * shape.d),
        s(shape.n),
        top(shape.n),
        log_sum(shape.n),
        g_lse(shape.n),
        g_cos(shape.n),
        w(shape.classes ? ((shape.classes - 1) * row_stride + shape.d) * size_of(dtype) : 0),
        y(shape.n) {
    for (int64_t k = 0; k < x.size(); ++k) set_x(k, normal());
    for (int64_t k = 0; k < w.size() / size_of(dtype); ++k) set_weight(k, normal());
    for (int64_t i = 0; i < shape.n; ++i) {
      s[i] = static_cast<T>(scale * (1 - 0.001 * static_cast<double>(i % 50)));
      // the edges of the classes and of the tiles, the middle, and no target
      const int64_t targets[] = {0, shape.classes - 1, -1, 83, 84, 251, 252, shape.classes / 2, i};
      y[i] = std::min(targets[i % 9], shape.classes - 1);
      g_lse[i] = static_cast<T>(normal());
      g_cos[i] = static_cast<T>(y[i] < 0 ? 0 : normal());
    }
  }

  // Products of bfloat16 see the problem as it is, if its numbers are such.
  void set_x(int64_t k, double v) { x[k] = static_cast<T>(in_bfloat16() ? kBrain.decode(kBrain.encode(v)) : v); }
  void set_weight(int64_t k, double v) { put(in_bfloat16() ? kBrain.decode(kBrain.encode(v)) : v, w, dtype, k); }
  bool in_bfloat16() const {
    return sizeof(T) == 4 && multiplies_bfloat16() && (dtype == DType::kFloat32 || dtype == DType::kBFloat16);
  }
  // What rounding the gradients of cosines to the operand of products does to them, relatively.
  double operand_tolerance() const { return in_bfloat16() ? 0x1p-8 : 0; }

  double weight(int64_t j, int64_t k) const { return get(w, dtype, j * row_stride + k); }
  Batch<T> batch() const {
    const Negatives<T> negatives{tau.empty() ? nullptr : tau.data(), q, a, b};
    return {x, y, s, shape.n, shape.d, negatives, in_bfloat16()};
  }
  Weight weights() const { return {w, dtype, shape.classes, row_stride}; }
  bool hard(int64_t i, double cos) const { return !tau.empty() && cos > tau[i]; }
  double shaped(int64_t i, double cos) const { return hard(i, cos) ? (q * cos + a) * cos + b : cos; }
  double slope(int64_t i, double cos) const { return hard(i, cos) ? 2 * q * cos + a : 1; }
  double steepest() const { return std::max(1.0, 2 * std::fabs(double{q}) + std::fabs(double{a})); }
  bool active(int64_t i) const { return g_lse[i] != 0 || g_cos[i] != 0; }
  // What roundings do to e^z, relatively: those of D products, which are then multiplied by s N', and those of a
  // sum over the classes, which may all go the same way.
  double tolerance() const {
    double s_max = 1;
    for (T v : s) s_max = std::max(s_max, double{v});
    return kUlp<T> * (8 + 4 * s_max * steepest() + std::sqrt(static_cast<double>(shape.d)) +
                      static_cast<double>(shape.classes) / 4);
  }
};

}  // namespace cosface::test
