// The driver: threads own ranges of class tiles, and meet only at the end.
//
// Per tile and thread: one matrix product on this thread, one vectorised epilogue, and in backward two more
// products. Each thread keeps its own partial results, which are combined in the order of the threads, so that a
// result depends on the inputs, the number of threads and the size of a tile, and on nothing else.
#include "lmcl.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace cosface {
namespace {

// A tile of z is at most 256 rows x 512 classes x 4 B = 512 KiB and, at D = 512, its class rows take 1 MiB: both
// stay in an L2 of 2 MiB.
constexpr int64_t kTileRows = 256;
constexpr int64_t kTileClasses = 512;

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

template <typename T>
constexpr bool is(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// How the class axis is cut: into tiles, and the tiles into one contiguous part per thread.
struct Partition {
  int64_t classes, tile, tiles, parts;

  Partition(int64_t classes, int64_t tile_classes, int threads) : classes(classes) {
    const int64_t share = (classes + threads - 1) / threads;
    tile = tile_classes > 0 ? tile_classes : std::clamp<int64_t>((share + 15) / 16 * 16, 16, kTileClasses);
    tiles = (classes + tile - 1) / tile;
    parts = std::min<int64_t>(threads, tiles);
  }

  // Calls body(first class, number of classes) for the tiles of one part, in order.
  template <typename Body>
  void each_tile(int64_t part, Body body) const {
    for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
      body(t * tile, std::min(tile, classes - t * tile));
    }
  }
};

// Calls body(first row, number of rows) for blocks of at most kTileRows rows.
template <typename Body>
void each_block(int64_t rows, Body body) {
  for (int64_t i = 0; i < rows; i += kTileRows) body(i, std::min(kTileRows, rows - i));
}

// The rows of one class tile in T: the weight itself, or a copy that is upcast tile by tile.
template <typename T>
class ClassTile {
 public:
  ClassTile(const Weight& weight, int64_t d, int64_t tile)
      : weight_(weight), d_(d), copy_(is<T>(weight.dtype) ? 0 : tile * d), inv_norm(tile) {}

  void load(int64_t first, int64_t classes) {
    const auto* source = static_cast<const char*>(weight_.data);
    if (is<T>(weight_.dtype)) {
      rows = {reinterpret_cast<const T*>(source) + first * weight_.row_stride, classes, d_, weight_.row_stride, 1};
    } else {
      const int64_t row_bytes = weight_.row_stride * size_of(weight_.dtype);
      for (int64_t j = 0; j < classes; ++j) {
        kernels<T>().load(source + (first + j) * row_bytes, weight_.dtype, d_, copy_ + j * d_);
      }
      rows = {copy_, classes, d_, d_, 1};
    }
    kernels<T>().inverse_norms(rows.data, classes, d_, rows.row_stride, inv_norm);
  }

 private:
  const Weight& weight_;
  const int64_t d_;
  Buffer<T> copy_;

 public:
  View<const T> rows{};
  Buffer<T> inv_norm;  // (classes)
};

template <typename T>
struct NormalizedRows {
  Buffer<T> x_hat;     // (N, D)
  Buffer<T> inv_norm;  // (N)
};

template <typename T>
NormalizedRows<T> normalize(const T* x, int64_t n, int64_t d, const Runtime<T>& runtime) {
  NormalizedRows<T> rows{Buffer<T>(n * d), Buffer<T>(n)};
  const int64_t parts = std::min<int64_t>(runtime.threads, n);
  runtime.parallel(parts, [&](int64_t part) {
    const int64_t first = n * part / parts, last = n * (part + 1) / parts;
    kernels<T>().normalize(x + first * d, last - first, d, rows.x_hat + first * d, rows.inv_norm + first);
  });
  return rows;
}

template <typename T>
T softplus(T z) {
  return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
}

}  // namespace

template <typename T>
void lmcl_forward(const Batch<T>& batch, const Weight& weight, T margin, const Runtime<T>& runtime,
                  const Results<T>& results) {
  const int64_t n = batch.n, d = batch.d;
  const Partition partition(weight.classes, runtime.tile_classes, runtime.threads);
  const NormalizedRows<T> x = normalize(batch.x, n, d, runtime);
  constexpr T kLowest = std::numeric_limits<T>::lowest();  // finite, so that the difference of two is 0
  std::vector<T> row_max(partition.parts * n, kLowest), row_sum(partition.parts * n, 0);
  std::fill_n(results.target_cos, n, T(0));

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassTile<T> tile(weight, d, partition.tile);
    Buffer<T> z(std::min(n, kTileRows) * partition.tile);
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      tile.load(first, classes);
      each_block(n, [&](int64_t i, int64_t rows) {
        runtime.matmul({x.x_hat + i * d, rows, d, d, 1}, tile.rows.t(), {z, rows, classes, classes, 1}, false);
        kernels<T>().forward_tile(z, rows, classes, classes, tile.inv_norm, batch.s + i, batch.y + i, first,
                                  &row_max[part * n + i], &row_sum[part * n + i], results.target_cos + i);
      });
    });
  });

  for (int64_t i = 0; i < n; ++i) {
    T top = kLowest, sum = 0;
    for (int64_t part = 0; part < partition.parts; ++part) top = std::max(top, row_max[part * n + i]);
    for (int64_t part = 0; part < partition.parts; ++part) {
      sum += row_sum[part * n + i] * std::exp(batch.s[i] * (row_max[part * n + i] - top));
    }
    const bool alone = top == kLowest && sum == 0;
    results.max_neg[i] = top == kLowest ? -std::numeric_limits<T>::infinity() : top;
    results.lse[i] = alone ? -std::numeric_limits<T>::infinity() : batch.s[i] * top + std::log(sum);
    const T z = results.lse[i] - batch.s[i] * (results.target_cos[i] - margin);
    results.loss[i] = batch.y[i] < 0 ? 0 : softplus(z);
  }
}

template <typename T>
void lmcl_backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream,
                   const Runtime<T>& runtime, const Gradients<T>& gradients) {
  const int64_t n = batch.n, d = batch.d;
  const Partition partition(weight.classes, runtime.tile_classes, runtime.threads);
  const NormalizedRows<T> x = normalize(batch.x, n, d, runtime);
  for (int64_t i = 0; i < n; ++i) {
    // 0 x nan is nan in a matrix product: a row without gradient must hold numbers
    if (upstream.g_lse[i] == 0 && upstream.g_cos[i] == 0) std::fill_n(x.x_hat + i * d, d, T(0));
  }
  std::vector<T> dx_hat(gradients.dx ? partition.parts * n * d : 0);
  std::vector<T> row_dot(partition.parts * n), dscale(partition.parts * n);
  const bool in_place = is<T>(weight.dtype);  // dw tiles are computed where they belong
  const int64_t dw_row_bytes = d * size_of(weight.dtype);

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassTile<T> tile(weight, d, partition.tile);
    Buffer<T> g(std::min(n, kTileRows) * partition.tile), col_dot(partition.tile);
    Buffer<T> dw_copy(gradients.dw && !in_place ? partition.tile * d : 0);
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      tile.load(first, classes);
      char* dw_out = static_cast<char*>(gradients.dw) + first * dw_row_bytes;
      T* dw = in_place ? reinterpret_cast<T*>(dw_out) : dw_copy;
      std::fill_n(static_cast<T*>(col_dot), classes, T(0));
      each_block(n, [&](int64_t i, int64_t rows) {
        const View<const T> x_hat{x.x_hat + i * d, rows, d, d, 1};
        const View<const T> g_view{g, rows, classes, classes, 1};
        runtime.matmul(x_hat, tile.rows.t(), {g, rows, classes, classes, 1}, false);
        kernels<T>().backward_tile(g, rows, classes, classes, tile.inv_norm, batch.s + i, batch.y + i, first,
                                   upstream.lse + i, upstream.g_lse + i, upstream.g_cos + i, col_dot,
                                   &row_dot[part * n + i], &dscale[part * n + i]);
        if (gradients.dx) {
          runtime.matmul(g_view, tile.rows, {&dx_hat[(part * n + i) * d], rows, d, d, 1}, true);
        }
        if (gradients.dw) runtime.matmul(g_view.t(), x_hat, {dw, classes, d, d, 1}, i > 0);
      });
      if (!gradients.dw) return;
      if (n == 0) std::fill_n(dw, classes * d, T(0));
      kernels<T>().project(dw, tile.rows.data, classes, d, tile.rows.row_stride, tile.inv_norm, col_dot);
      if (!in_place) kernels<T>().store(dw, classes * d, dw_out, weight.dtype);
    });
  });

  const int64_t parts = std::min<int64_t>(runtime.threads, n);
  runtime.parallel(parts, [&](int64_t share) {
    for (int64_t i = n * share / parts; i < n * (share + 1) / parts; ++i) {
      T dot = 0, ds = 0;
      for (int64_t part = 0; part < partition.parts; ++part) {
        dot += row_dot[part * n + i];
        ds += dscale[part * n + i];
      }
      gradients.dscale[i] = ds;
      if (!gradients.dx) continue;
      const bool active = upstream.g_lse[i] != 0 || upstream.g_cos[i] != 0;
      kernels<T>().finish_dx(&dx_hat[i * d], partition.parts, n * d, x.x_hat + i * d, dot,
                             active ? x.inv_norm[i] : 0, d, gradients.dx + i * d);
    }
  });
}

template void lmcl_forward(const Batch<float>&, const Weight&, float, const Runtime<float>&,
                           const Results<float>&);
template void lmcl_forward(const Batch<double>&, const Weight&, double, const Runtime<double>&,
                           const Results<double>&);
template void lmcl_backward(const Batch<float>&, const Weight&, const Upstream<float>&, const Runtime<float>&,
                            const Gradients<float>&);
template void lmcl_backward(const Batch<double>&, const Weight&, const Upstream<double>&, const Runtime<double>&,
                            const Gradients<double>&);

void fill_normal(void* data, DType dtype, int64_t n, uint64_t seed, double std, const Runtime<float>& runtime) {
  constexpr int64_t kGroup = 256;  // elements that one call of the kernel makes
  const int64_t groups = (n + kGroup - 1) / kGroup;
  const int64_t parts = std::min<int64_t>(runtime.threads, groups);
  runtime.parallel(parts, [&](int64_t part) {
    float values[kGroup];
    for (int64_t group = groups * part / parts; group < groups * (part + 1) / parts; ++group) {
      const int64_t first = group * kGroup, count = std::min(kGroup, n - first);
      kernels<float>().normal(seed, group, count, static_cast<float>(std), values);
      kernels<float>().store(values, count, static_cast<char*>(data) + first * size_of(dtype), dtype);
    }
  });
}

}  // namespace cosface
