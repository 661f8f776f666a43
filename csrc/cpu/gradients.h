// What a backward pass writes: G of a tile, rows of dw, and the sums of each sample.
#pragma once

#include <algorithm>
#include <vector>

#include "operands.h"
#include "sparse.h"

namespace cosface {

// A tile of G_ij / |w_j| as the left side of two products: by classes, whose right side are the embeddings, and by
// samples.
template <typename T, typename Operand>
class GradientTile {
 public:
  GradientTile(int64_t classes, int64_t samples)
      : class_stride_(samples),
        sample_stride_(classes),
        by_class_(classes * samples),
        by_sample_(samples * classes) {}

  void load(const T* g, int64_t classes, int64_t rows, int64_t stride, const T* remainder) {
    bfloat16_kernels()->round(g, classes, rows, stride, remainder, by_class_, class_stride_, by_sample_,
                              sample_stride_);
  }
  Left<Operand> by_class(int64_t j) const { return {by_class_ + j * class_stride_, class_stride_, 1}; }
  Left<Operand> by_sample() const { return {by_sample_, sample_stride_, 1}; }

 private:
  const int64_t class_stride_, sample_stride_;
  Buffer<Operand> by_class_, by_sample_;
};

// In place.
template <typename T>
class GradientTile<T, T> {
 public:
  GradientTile(int64_t, int64_t) {}

  void load(const T* g, int64_t, int64_t, int64_t stride, const T*) { g_ = g, stride_ = stride; }
  Left<T> by_class(int64_t j) const { return {g_ + j * stride_, stride_, 1}; }
  Left<T> by_sample() const { return {g_, 1, stride_}; }

 private:
  const T* g_ = nullptr;
  int64_t stride_ = 0;
};

// The rows of dw that belong to one tile: in dw itself where it has the dtype and whole panels, else in a buffer
// of `capacity` rows at a time that save() rounds into dw, or that an update uses up.
template <typename T>
class GradientRows {
 public:
  GradientRows(const Gradients<T>& gradients, DType dtype, int64_t d, int64_t width, int64_t capacity)
      : wanted(gradients.dw != nullptr || gradients.update != nullptr),
        stride(width),
        capacity(capacity),
        dw_(static_cast<char*>(gradients.dw)),
        dtype_(dtype),
        d_(d),
        in_place_(dw_ != nullptr && is<T>(dtype) && width == d),
        copy_(!wanted || in_place_ ? 0 : capacity * width) {}

  void begin(int64_t first) { first_ = first; }

  // Row j of the tile.
  T* row(int64_t j) const { return in_place_ ? reinterpret_cast<T*>(stored(j)) : copy_ + j % capacity * stride; }

  // Less its projection on the row of w.
  template <typename Operand>
  void save(int64_t j, T projection, const ClassRows<T, Operand>& w) const {
    if constexpr (std::is_same_v<Operand, BFloat16>) {
      if (is<Operand>(dtype_)) {
        auto* const to = reinterpret_cast<Operand*>(stored(j));
        return bfloat16_kernels()->project(row(j), w.rows + j * w.stride, d_, projection, to);
      }
    }
    if (projection != 0) kernels<T>().project(row(j), w.row(j), d_, projection);
    if (!in_place_) kernels<T>().store(row(j), d_, stored(j), dtype_);
  }

  const bool wanted;
  const int64_t stride, capacity;

 private:
  char* stored(int64_t j) const { return dw_ + (first_ + j) * d_ * size_of(dtype_); }

  char* const dw_;
  const DType dtype_;
  const int64_t d_;
  const bool in_place_;
  Buffer<T> copy_;
  int64_t first_ = 0;
};

// The samples that backward computes densely, one after the other: all, unless there are kept entries.
template <typename T>
class ExactSamples {
 public:
  ExactSamples(const EntryCache<T>& cache, const Batch<T>& all, const Upstream<T>& up) : batch(all), upstream(up) {
    if (!cache.empty()) {
      for (int64_t i = 0; i < all.n; ++i) {
        if (!cache.exact(i)) continue;
        index_.push_back(i);
        x_.insert(x_.end(), all.x + i * all.d, all.x + (i + 1) * all.d);
        y_.push_back(all.y[i]);
        s_.push_back(all.s[i]);
        top_.push_back(up.top[i]);
        log_sum_.push_back(up.log_sum[i]);
        g_lse_.push_back(up.g_lse[i]);
        g_cos_.push_back(up.g_cos[i]);
        if (all.negatives.tau != nullptr) tau_.push_back(all.negatives.tau[i]);
      }
      batch = {x_.data(), y_.data(), s_.data(), static_cast<int64_t>(index_.size()), all.d, all.negatives};
      if (all.negatives.tau != nullptr) batch.negatives.tau = tau_.data();
      upstream = {top_.data(), log_sum_.data(), g_lse_.data(), g_cos_.data()};
    } else {
      s_.assign(all.s, all.s + all.n);
      top_.assign(up.top, up.top + all.n);
      log_sum_.assign(up.log_sum, up.log_sum + all.n);
    }
    if (batch.second && !upstream.g_moments) zeros_.resize(2 * batch.n);
    for (int64_t i = 0; i < batch.n; ++i) {
      if (!active(i)) top_[i] = log_sum_[i] = s_[i] = 0;
    }
  }

  bool active(int64_t i) const {
    return upstream.g_lse[i] != 0 || upstream.g_cos[i] != 0 ||
           (batch.second && upstream.g_cos[batch.n + i] != 0) ||
           (upstream.g_moments && (upstream.g_moments[i] != 0 || upstream.g_moments[batch.n + i] != 0));
  }
  bool has_moments() const { return batch.second != nullptr || upstream.g_moments != nullptr; }
  // Of samples from i on.
  MomentGradients<T> moments(int64_t i) const {
    const T* const b = upstream.g_moments ? upstream.g_moments : zeros_.data();
    return {batch.second ? batch.second + i : nullptr, upstream.g_cos + batch.n + i, b + i, b + batch.n + i};
  }
  // z (classes, rows) of samples from i on becomes 0 where forward may have seen nan and backward must not.
  void silence(int64_t i, T* z, int64_t classes, int64_t rows, int64_t stride) const {
    for (int64_t row = 0; row < rows; ++row) {
      if (active(i + row)) continue;
      for (int64_t j = 0; j < classes; ++j) z[j * stride + row] = 0;
    }
  }
  int64_t index(int64_t i) const { return index_.empty() ? i : index_[i]; }  // among all samples
  // 0 without gradient
  const T* s(int64_t i) const { return &s_[i]; }
  const T* top(int64_t i) const { return &top_[i]; }
  const T* log_sum(int64_t i) const { return &log_sum_[i]; }

  Batch<T> batch;
  Upstream<T> upstream;

 private:
  std::vector<int64_t> index_, y_;
  std::vector<T> x_, s_, top_, log_sum_, g_lse_, g_cos_, tau_, zeros_;
};

// What each thread sums up for each sample.
template <typename T>
class Sums {
 public:
  Sums(int64_t n, int64_t stride, int64_t parts, bool need_dx, bool of_sigmoids = false)
      : stride(stride),
        n_(n),
        parts_(parts),
        dx_hat_(need_dx ? std::max<int64_t>(parts, 1) * n_ * stride : 0),
        row_dot_(parts * n_),
        dscale_(parts * n_),
        added_(of_sigmoids ? 2 * parts * n_ : 0) {}

  T* dx_hat_of(int64_t part, int64_t i) { return dx_hat_.empty() ? nullptr : &dx_hat_[(part * n_ + i) * stride]; }
  double* row_dot_of(int64_t part, int64_t i) { return row_dot_.data() + part * n_ + i; }
  double* dscale_of(int64_t part, int64_t i) { return dscale_.data() + part * n_ + i; }
  double* added_of(int64_t part, int64_t i) { return added_.data() + part * n_ + i; }
  double* mass_of(int64_t part, int64_t i) { return added_of(parts_ + part, i); }

  // Writes the gradients of sample i, whose place among all samples is `to`; none if it is not active.
  template <typename Operand>
  void finish(int64_t i, bool active, const Embeddings<T, Operand>& x, int64_t to,
              const Gradients<T>& gradients) const {
    double dot = 0, ds = 0;
    for (int64_t part = 0; part < parts_; ++part) {
      dot += row_dot_[part * n_ + i];
      ds += dscale_[part * n_ + i];
    }
    gradients.dscale[to] = static_cast<T>(ds);
    if (gradients.sums != nullptr) {
      double sums[2] = {};
      for (int64_t k = 0; active && k < 2 * parts_; ++k) sums[k / parts_] += added_[k * n_ + i];
      gradients.sums[to] = static_cast<T>(sums[0]), gradients.sums[n_ + to] = static_cast<T>(sums[1]);
    }
    if (gradients.dx == nullptr) return;
    if (!active) {
      std::fill_n(gradients.dx + to * x.d, x.d, T(0));
      return;
    }
    kernels<T>().finish_dx(&dx_hat_[i * stride], parts_, n_ * stride, x.given + i * x.d, static_cast<T>(dot),
                           x.inv_norm[i], x.d, gradients.dx + to * x.d);
  }

  const int64_t stride;  // of rows of dx_hat

 private:
  const int64_t n_, parts_;
  std::vector<T> dx_hat_;                 // (parts, N, stride)
  std::vector<double> row_dot_, dscale_;  // (parts, N)
  std::vector<double> added_;             // (2, parts, N), with a sigmoid
};

}  // namespace cosface
