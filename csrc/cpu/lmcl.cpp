// The driver: threads own ranges of class tiles, and meet only at the end.
//
// A tile is a range of classes, taken up to kTileRows samples at a time and laid out class by class. Forward is
// one matrix product, z = w x_hat^T, and an epilogue; backward is the same product, an epilogue that turns z into
// G, and two more products, dw = G x_hat and dx_hat += G^T w. Each thread keeps partial results of its own, which
// are combined in the order of the threads, so that a result depends on the inputs, the number of threads, the
// size of a tile and the instruction set, and on nothing else.
#include "lmcl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kernels.h"

namespace cosface {
namespace {

// 504 classes x 256 samples x 4 B = 504 KiB of z and, at D = 512, 1 MiB of class rows stay in an L2 of 2 MiB. 504
// is a multiple of every kBlockRows, so that the matrix products have no blocks that are partly empty.
constexpr int64_t kTileClasses = 252;
constexpr int64_t kClassesStep = 84;

// Uninitialised memory, aligned for the widest registers.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(operator new(sizeof(T) * n, kAlign))) {}
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* p) const { operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
};

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <typename T>
bool is(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Runs body(first, last) on even shares of [0, n), one per thread.
template <typename Body>
void share(int64_t n, const Runtime& runtime, Body body) {
  const int64_t parts = std::min<int64_t>(runtime.threads, n);
  runtime.parallel(parts, [&](int64_t part) { body(n * part / parts, n * (part + 1) / parts); });
}

// How the class axis is cut: into tiles, and the tiles into one contiguous part per thread.
struct Partition {
  int64_t classes, tile, tiles, parts;

  Partition(int64_t classes, const Runtime& runtime) : classes(classes) {
    const int64_t fair = round_up((classes + runtime.threads - 1) / runtime.threads, kClassesStep);
    tile = runtime.tile_classes > 0 ? runtime.tile_classes : std::clamp(fair, kClassesStep, kTileClasses);
    tiles = (classes + tile - 1) / tile;
    parts = std::min<int64_t>(runtime.threads, tiles);
  }

  // Calls body(first class, number of classes) for the tiles of one part, in order.
  template <typename Body>
  void each_tile(int64_t part, Body body) const {
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      body(t * tile, std::min(tile, classes - t * tile));
    }
  }
};

// The normalised embeddings, in the two layouts that the products read.
template <typename T>
struct Embeddings {
  const int64_t n, d, width;  // width: d, rounded up to whole panels
  Buffer<T> rows;             // (N, width), zeros beyond d
  Buffer<T> columns;          // blocks of kTileRows rows, each packed as its transpose
  Buffer<T> inv_norm;         // (N)

  // Rows for which active(i) is false become 0, whatever x holds: 0 x nan would be nan in a product.
  template <typename Active>
  Embeddings(const Batch<T>& batch, const Runtime& runtime, Active active)
      : n(batch.n),
        d(batch.d),
        width(round_up(d, kernels<T>().panel)),
        rows(n * width),
        columns(round_up(n, kernels<T>().panel) * d),
        inv_norm(n) {
    share(n, runtime, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        T* row = rows + i * width;
        if (active(i)) {
          kernels<T>().normalize(batch.x + i * d, d, row, inv_norm + i);
        } else {
          std::fill_n(row, d, T(0));
          inv_norm[i] = 0;
        }
        std::fill(row + d, row + width, T(0));
      }
    });
    share((n + kTileRows - 1) / kTileRows, runtime, [&](int64_t first, int64_t last) {
      for (int64_t i = first * kTileRows; i < std::min(last * kTileRows, n); i += kTileRows) {
        kernels<T>().pack_transposed(rows + i * width, std::min(kTileRows, n - i), d, width, columns + i * d);
      }
    });
  }

  // Calls body(first row, number of rows) for blocks of at most kTileRows rows.
  template <typename Body>
  void each_block(Body body) const {
    for (int64_t i = 0; i < n; i += kTileRows) body(i, std::min(kTileRows, n - i));
  }

  int64_t tile_stride() const { return round_up(std::min(n, kTileRows), kernels<T>().panel); }
};

// The class rows of one tile in T, in whole panels: the weight itself where it is so, else a copy.
template <typename T>
class ClassRows {
 public:
  ClassRows(const Weight& weight, const Options& options, const Embeddings<T>& x, int64_t tile)
      : inv_norm(tile),
        weight_(weight),
        chosen_(options.classes),
        normalize_(options.normalize_weight),
        d_(x.d),
        width_(x.width),
        in_place_(chosen_ == nullptr && is<T>(weight.dtype) && width_ == d_),
        copy_(in_place_ ? 0 : tile * width_) {}

  void load(int64_t first, int64_t classes) {
    const auto* source = static_cast<const char*>(weight_.data);
    const int64_t row_bytes = weight_.row_stride * size_of(weight_.dtype);
    if (in_place_) {
      rows = reinterpret_cast<const T*>(source + first * row_bytes);
      stride = weight_.row_stride;
    } else {
      for (int64_t j = 0; j < classes; ++j) {
        kernels<T>().load(source + (chosen_ ? chosen_[first + j] : first + j) * row_bytes, weight_.dtype, d_,
                          copy_ + j * width_);
        std::fill(copy_ + j * width_ + d_, copy_ + (j + 1) * width_, T(0));
      }
      rows = copy_;
      stride = width_;
    }
    if (normalize_) {
      kernels<T>().inverse_norms(rows, classes, d_, stride, inv_norm);
    } else {
      std::fill_n(static_cast<T*>(inv_norm), classes, T(1));
    }
  }

  // Where the weight keeps the classes from `first` on; chosen classes lie apart.
  Ahead ahead(int64_t first, int64_t classes) const {
    if (chosen_ != nullptr) return {};
    const auto begin = reinterpret_cast<uintptr_t>(weight_.data);
    const int64_t row_bytes = weight_.row_stride * size_of(weight_.dtype);
    return {begin + first * row_bytes, begin + std::min(first + classes, weight_.classes) * row_bytes};
  }

  // z (classes, rows) = w x_hat^T for the block of embeddings that begins at row i.
  void dot(const Embeddings<T>& x, int64_t i, int64_t classes, T* z, Ahead ahead) const {
    const int64_t panel = kernels<T>().panel;
    kernels<T>().matmul({rows, stride, 1}, {x.columns + i * d_, d_ * panel, panel}, z, x.tile_stride(), classes,
                        round_up(std::min(kTileRows, x.n - i), panel), d_, false, ahead);
  }

  const T* rows = nullptr;
  int64_t stride = 0;
  Buffer<T> inv_norm;  // (classes)

 private:
  const Weight& weight_;
  const int64_t* const chosen_;
  const bool normalize_;
  const int64_t d_, width_;
  const bool in_place_;
  Buffer<T> copy_;
};

// The rows of dw that belong to one tile: in dw itself where it has the dtype and whole panels, else in a buffer
// that save() rounds into dw, or that an update uses up.
template <typename T>
class GradientRows {
 public:
  GradientRows(const Gradients<T>& gradients, DType dtype, const Embeddings<T>& x, int64_t tile)
      : wanted(gradients.dw != nullptr || gradients.update != nullptr),
        stride(x.width),
        dw_(static_cast<char*>(gradients.dw)),
        dtype_(dtype),
        d_(x.d),
        in_place_(dw_ != nullptr && is<T>(dtype) && x.width == x.d),
        copy_(!wanted || in_place_ ? 0 : tile * x.width) {}

  void begin(int64_t first) { rows = in_place_ ? reinterpret_cast<T*>(row(first)) : copy_; }

  void save(int64_t first, int64_t classes) const {
    if (in_place_) return;
    for (int64_t j = 0; j < classes; ++j) kernels<T>().store(copy_ + j * stride, d_, row(first + j), dtype_);
  }

  const bool wanted;
  const int64_t stride;
  T* rows = nullptr;

 private:
  char* row(int64_t j) const { return dw_ + j * d_ * size_of(dtype_); }

  char* const dw_;
  const DType dtype_;
  const int64_t d_;
  const bool in_place_;
  Buffer<T> copy_;
};

// Moves rows of the weight and of the optimizer's state: in place where these are in T, else in copies of a row.
template <typename T>
class RowUpdate {
 public:
  RowUpdate(const Update& update, const Weight& weight, const Options& options, int64_t d)
      : update_(update),
        weight_(weight),
        chosen_(options.classes),
        d_(d),
        sgd_(update),
        adamw_(update, 1 - std::pow(update.beta1, update.step),
               std::sqrt(1 - std::pow(update.beta2, update.step))),
        weight_copy_(is<T>(weight.dtype) ? 0 : d),
        state_copy_(is<T>(update.state_dtype) ? 0 : 3 * d) {}

  // Class j of the call by its gradient dw before the projection; w is its row in T.
  void move(int64_t j, const T* dw, T projection, const T* w) const {
    const int64_t row = chosen_ ? chosen_[j] : j;
    RowGradient<T> g{dw, projection, static_cast<T>(update_.gradient_factor)};
    if (std::isfinite(update_.max_row_norm)) {
      const T norm = kernels<T>().gradient_norm(g, w, d_), most = static_cast<T>(update_.max_row_norm);
      if (norm > most) g.factor *= most / norm;
    }
    auto* stored = static_cast<char*>(update_.weight) + row * weight_.row_stride * size_of(weight_.dtype);
    T* moved = reinterpret_cast<T*>(stored);
    if (!is<T>(weight_.dtype)) moved = std::copy_n(w, d_, static_cast<T*>(weight_copy_)) - d_;
    T* state[3];
    for (int64_t k = 0; k < 3; ++k) state[k] = loaded_state(k, row);
    if (update_.rule == Update::Rule::kSgd) {
      kernels<T>().sgd(g, moved, state[0], d_, sgd_);
    } else {
      kernels<T>().adamw(g, moved, state[0], state[1], state[2], d_, adamw_);
    }
    if (!is<T>(weight_.dtype)) save(moved, stored, weight_.dtype, 3, row);
    if (is<T>(update_.state_dtype)) return;
    for (int64_t k = 0; k < 3; ++k) {
      if (state[k] != nullptr) save(state[k], stored_state(k, row), update_.state_dtype, k, row);
    }
  }

  // Where the first state of these classes is kept, which lie apart if they were chosen.
  Ahead ahead(int64_t first, int64_t classes) const {
    if (chosen_ != nullptr || update_.state[0] == nullptr) return {};
    return {reinterpret_cast<uintptr_t>(stored_state(0, first)),
            reinterpret_cast<uintptr_t>(stored_state(0, first + classes))};
  }

 private:
  char* stored_state(int64_t k, int64_t row) const {
    return static_cast<char*>(update_.state[k]) + row * d_ * size_of(update_.state_dtype);
  }

  T* loaded_state(int64_t k, int64_t row) const {
    if (update_.state[k] == nullptr) return nullptr;
    if (is<T>(update_.state_dtype)) return reinterpret_cast<T*>(stored_state(k, row));
    kernels<T>().load(stored_state(k, row), update_.state_dtype, d_, state_copy_ + k * d_);
    return state_copy_ + k * d_;
  }

  void save(const T* from, void* to, DType dtype, int64_t tensor, int64_t row) const {
    if (dtype == DType::kBFloat16) {
      const auto stream = static_cast<uint64_t>(4 * update_.step + tensor);  // > 0
      kernels<T>().store_stochastic(from, d_, to, update_.seed, stream, row);
    } else {
      kernels<T>().store(from, d_, to, dtype);
    }
  }

  const Update& update_;
  const Weight& weight_;
  const int64_t* const chosen_;
  const int64_t d_;
  const SgdStep<T> sgd_;
  const AdamWStep<T> adamw_;
  Buffer<T> weight_copy_, state_copy_;
};

template <typename T>
T softplus(T z) {
  return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
}

}  // namespace

template <typename T>
void lmcl_forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options,
                  const Runtime& runtime, const Results<T>& results) {
  const int64_t n = batch.n;
  const Partition partition(options.classes ? options.count : weight.classes, runtime);
  const Embeddings<T> x(batch, runtime, [](int64_t) { return true; });
  constexpr T kLowest = std::numeric_limits<T>::lowest();  // finite, so that the difference of two is 0
  std::vector<T> row_max(partition.parts * n, kLowest);
  std::vector<T> max_cos(batch.negatives.tau ? row_max.size() : 0, kLowest);  // where row_max is of N(cos)
  std::vector<double> row_sum(partition.parts * n);
  std::fill_n(results.target_cos, n, T(0));
  // With s = 0 the left-out target, s (-inf), would be nan; e^{s cos} is 1 for the smallest s as well.
  std::vector<T> s(batch.s, batch.s + n);
  for (T& scale : s) scale = scale == 0 ? std::numeric_limits<T>::min() : scale;

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassRows<T> w(weight, options, x, partition.tile);
    Buffer<T> z(partition.tile * x.tile_stride());
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      w.load(first, classes);
      x.each_block([&](int64_t i, int64_t rows) {
        w.dot(x, i, classes, z, i == 0 ? w.ahead(first + classes, classes) : Ahead{});
        kernels<T>().forward_tile(z, classes, rows, x.tile_stride(), w.inv_norm, batch.y + i, first, &s[i],
                                  batch.negatives.from(i), &row_max[part * n + i],
                                  max_cos.empty() ? nullptr : &max_cos[part * n + i], &row_sum[part * n + i],
                                  results.target_cos + i);
      });
    });
  });

  for (int64_t i = 0; i < n; ++i) {
    const auto largest = [&](const std::vector<T>& running) {
      T top = kLowest;
      for (int64_t part = 0; part < partition.parts; ++part) top = std::max(top, running[part * n + i]);
      return top;
    };
    const T top = largest(row_max), top_cos = max_cos.empty() ? top : largest(max_cos);
    double sum = 0;
    for (int64_t part = 0; part < partition.parts; ++part) {
      sum += row_sum[part * n + i] * std::exp(s[i] * (row_max[part * n + i] - top));
    }
    results.max_neg[i] = top_cos == kLowest ? -std::numeric_limits<T>::infinity() : top_cos;
    results.lse[i] = static_cast<T>(batch.s[i] * top + std::log(sum));
    const T z = results.lse[i] - batch.s[i] * (results.target_cos[i] - margin);
    results.loss[i] = batch.y[i] < 0 ? 0 : softplus(z);
  }
}

template <typename T>
void lmcl_backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream,
                   const Options& options, const Runtime& runtime, const Gradients<T>& gradients) {
  const int64_t n = batch.n, d = batch.d;
  const Partition partition(options.classes ? options.count : weight.classes, runtime);
  const auto active = [&](int64_t i) { return upstream.g_lse[i] != 0 || upstream.g_cos[i] != 0; };
  const Embeddings<T> x(batch, runtime, active);
  std::vector<T> lse(upstream.lse, upstream.lse + n), s(batch.s, batch.s + n);
  for (int64_t i = 0; i < n; ++i) {
    if (!active(i)) lse[i] = s[i] = 0;
  }
  std::vector<T> dx_hat(gradients.dx ? std::max<int64_t>(partition.parts, 1) * n * x.width : 0);
  std::vector<double> row_dot(partition.parts * n), dscale(partition.parts * n);

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassRows<T> w(weight, options, x, partition.tile);
    GradientRows<T> dw(gradients, weight.dtype, x, partition.tile);
    std::optional<RowUpdate<T>> update;
    if (gradients.update != nullptr) update.emplace(*gradients.update, weight, options, d);
    const int64_t stride = x.tile_stride();
    Buffer<T> g(partition.tile * stride), col_dot(partition.tile);
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      w.load(first, classes);
      if (dw.wanted) dw.begin(first);
      std::fill_n(static_cast<T*>(col_dot), classes, T(0));
      x.each_block([&](int64_t i, int64_t rows) {
        w.dot(x, i, classes, g, {});
        kernels<T>().backward_tile(g, classes, rows, stride, w.inv_norm, batch.y + i, first, &s[i],
                                   batch.negatives.from(i), &lse[i], upstream.g_lse + i, upstream.g_cos + i,
                                   col_dot, &row_dot[part * n + i], &dscale[part * n + i]);
        if (gradients.dx) {
          kernels<T>().matmul({g, 1, stride}, {w.rows, kernels<T>().panel, w.stride},
                              &dx_hat[(part * n + i) * x.width], x.width, rows, x.width, classes, true,
                              i == 0 && update ? update->ahead(first, classes) : Ahead{});
        }
        if (dw.wanted) {
          kernels<T>().matmul({g, stride, 1}, {x.rows + i * x.width, kernels<T>().panel, x.width}, dw.rows,
                              dw.stride, classes, x.width, rows, i > 0,
                              i == 0 ? w.ahead(first + classes, classes) : Ahead{});
        }
      });
      if (!dw.wanted) return;
      if (n == 0) std::fill_n(dw.rows, classes * dw.stride, T(0));
      for (int64_t j = 0; update && j < classes; ++j) {
        const T inv = w.inv_norm[j];
        const bool projects = options.normalize_weight && inv < 1 / T(kEps);
        update->move(first + j, dw.rows + j * dw.stride, projects ? col_dot[j] * inv * inv : 0,
                     w.rows + j * w.stride);
      }
      if (update) return;
      if (options.normalize_weight) {
        kernels<T>().project(dw.rows, dw.stride, w.rows, w.stride, classes, d, w.inv_norm, col_dot);
      }
      dw.save(first, classes);
    });
  });

  share(n, runtime, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double dot = 0, ds = 0;
      for (int64_t part = 0; part < partition.parts; ++part) {
        dot += row_dot[part * n + i];
        ds += dscale[part * n + i];
      }
      gradients.dscale[i] = static_cast<T>(ds);
      if (!gradients.dx) continue;
      kernels<T>().finish_dx(&dx_hat[i * x.width], partition.parts, n * x.width, x.rows + i * x.width,
                             static_cast<T>(dot), x.inv_norm[i], d, gradients.dx + i * d);
    }
  });
}

template <typename T>
void apply_update(const Weight& weight, const void* dw, int64_t d, const Update& update, const Runtime& runtime) {
  const int64_t row_bytes = d * size_of(weight.dtype);
  share(weight.classes, runtime, [&](int64_t first, int64_t last) {
    const RowUpdate<T> rows(update, weight, {}, d);
    Buffer<T> w(d), g(d);
    for (int64_t j = first; j < last; ++j) {
      kernels<T>().load(static_cast<const char*>(weight.data) + j * weight.row_stride * size_of(weight.dtype),
                        weight.dtype, d, w);
      kernels<T>().load(static_cast<const char*>(dw) + j * row_bytes, weight.dtype, d, g);
      rows.move(j, g, 0, w);
    }
  });
}

template void apply_update<float>(const Weight&, const void*, int64_t, const Update&, const Runtime&);
template void apply_update<double>(const Weight&, const void*, int64_t, const Update&, const Runtime&);
template void lmcl_forward(const Batch<float>&, const Weight&, float, const Options&, const Runtime&,
                           const Results<float>&);
template void lmcl_forward(const Batch<double>&, const Weight&, double, const Options&, const Runtime&,
                           const Results<double>&);
template void lmcl_backward(const Batch<float>&, const Weight&, const Upstream<float>&, const Options&,
                            const Runtime&, const Gradients<float>&);
template void lmcl_backward(const Batch<double>&, const Weight&, const Upstream<double>&, const Options&,
                            const Runtime&, const Gradients<double>&);

void fill_normal(void* data, DType dtype, int64_t start, int64_t n, uint64_t seed, double std,
                 const Runtime& runtime) {
  constexpr int64_t kGroup = 256;  // elements that one call of the kernel makes
  const int64_t skipped = start / kGroup;
  share((start + n + kGroup - 1) / kGroup - skipped, runtime, [&](int64_t first, int64_t last) {
    float values[kGroup];
    for (int64_t group = skipped + first; group < skipped + last; ++group) {
      const int64_t from = std::max(start, group * kGroup), to = std::min(start + n, (group + 1) * kGroup);
      kernels<float>().normal(seed, group, to - group * kGroup, static_cast<float>(std), values);
      kernels<float>().store(values + (from - group * kGroup), to - from,
                             static_cast<char*>(data) + (from - start) * size_of(dtype), dtype);
    }
  });
}

}  // namespace cosface
