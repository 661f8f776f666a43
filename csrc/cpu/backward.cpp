#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cosines.h"
#include "gradients.h"
#include "row_update.h"
#include "subcenters.h"

namespace cosface {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // of dw, of bfloat16 products with one block of samples

// Bytes of dx_hat, of which every thread or, beyond that, every team of threads has its own; a sparse backward,
// whose entries one thread walks, has one a thread in any case.
constexpr int64_t kCopies = 32 << 20;

// G of a tile for the samples of one block.
template <typename T, typename Operand>
struct GradientBlock {
  Buffer<T> numbers;
  GradientTile<T, Operand> tile;
};

// What one thread has for the classes of a tile.
template <typename T, typename Operand>
struct TileWorker {
  ClassRows<T, Operand> w;
  GradientRows<T> dw;
  std::optional<RowUpdate<T>> update;
  Buffer<T> col_dot;  // (classes), sum_i G_ij cos_ij
  Subcenters<T> subcenters;
};

// The dense part of a backward pass, one tile of classes at a time.
template <typename T, typename Operand>
class TileGradients {
 public:
  using X = Embeddings<T, Operand>;
  using Worker = TileWorker<T, Operand>;
  using Block = GradientBlock<T, Operand>;

  TileGradients(const X& x, const ExactSamples<T>& exact, const CosineCache<T>& cosines, const Weight& weight,
                const Options& options, const Gradients<T>& gradients, const Partition& partition, Sums<T>& sums)
      : x_(x),
        exact_(exact),
        cosines_(cosines),
        weight_(weight),
        options_(options),
        gradients_(gradients),
        partition_(partition),
        sums_(sums) {}

  // Who writes `rows` rows of dw before they are finished.
  Worker worker(int64_t rows) const {
    const bool packs = gradients_.dx != nullptr && (x_.n >= kPackedRows || !X::kNormalized);
    Worker worker{{weight_, options_, x_, partition_.tile, packs},
                  {gradients_, weight_.dtype, x_.d, x_.width, rows},
                  std::nullopt,
                  Buffer<T>(partition_.tile),
                  {options_.subcenters, partition_.tile, x_.tile_stride()}};
    if (gradients_.update != nullptr) worker.update.emplace(*gradients_.update, weight_, options_, x_.d);
    return worker;
  }

  Block block() const {
    return {Buffer<T>(partition_.tile * x_.tile_stride()),
            {x_.padded(partition_.tile), x_.padded(std::min(x_.n, kTileRows))}};
  }

  void begin(Worker& worker, int64_t first, int64_t classes) const {
    worker.w.load(first, classes);
    worker.dw.begin(first);
    std::fill_n(static_cast<T*>(worker.col_dot), classes, T(0));
  }

  // G of the tile for the samples from i on, and what it adds to their dx_hat.
  void samples(Worker& worker, Block& block, int64_t part, int64_t first, int64_t classes, int64_t i,
               int64_t rows) const {
    T* const g = block.numbers;
    const int64_t stride = x_.tile_stride();
    if (cosines_.recall(first, i, g, classes, rows, stride, worker.w.inv_norm)) {
      exact_.silence(i, g, classes, rows, stride);
    } else {
      worker.w.dot(x_, i, classes, g, {});
    }
    const auto epilogue = [&](int64_t classes, int64_t first, const T* inv_norm, T* col_dot) {
      const auto fill = [&](auto kernel, const auto&... moments) {
        kernel(g, classes, rows, stride, inv_norm, exact_.batch.y + i, first, exact_.s(i),
               exact_.batch.negatives.from(i), exact_.top(i), exact_.log_sum(i), exact_.upstream.g_lse + i,
               exact_.upstream.g_cos + i, col_dot, sums_.row_dot_of(part, i), sums_.dscale_of(part, i),
               moments...);
      };
      if (const auto& sigmoid = exact_.batch.sigmoid) {
        kernels<T>().sigmoid_tile(g, classes, rows, stride, inv_norm, exact_.batch.y + i, first, exact_.s(i),
                                  *sigmoid, exact_.log_sum(i), exact_.upstream.g_lse + i,
                                  exact_.upstream.g_cos + i, col_dot, sums_.row_dot_of(part, i),
                                  sums_.dscale_of(part, i), sums_.added_of(part, i), sums_.mass_of(part, i));
      } else if (exact_.has_moments()) {
        fill(kernels<T>().backward_moments, exact_.moments(i));
      } else {
        fill(kernels<T>().backward_tile);
      }
    };
    worker.subcenters.backward(g, first, classes, rows, stride, worker.w.inv_norm, worker.col_dot, epilogue);
    block.tile.load(g, classes, rows, stride, x_.remainder + i);
    if (gradients_.dx == nullptr) return;
    table().matmul(block.tile.by_sample(), worker.w.right(classes), sums_.dx_hat_of(part, i), sums_.stride, rows,
                   x_.width, x_.padded(classes), true,
                   i == 0 && worker.update ? worker.update->ahead(first, classes) : Ahead{});
  }

  // What these samples add to the rows [begin, end) of the tile's dw.
  void classes(Worker& worker, const Block& block, int64_t i, int64_t rows, int64_t begin, int64_t end,
               Ahead ahead) const {
    table().matmul(block.tile.by_class(begin), x_.right(i), worker.dw.row(begin), worker.dw.stride, end - begin,
                   x_.width, x_.padded(rows), i > 0, ahead);
  }

  // Row j of the tile, now that all samples have added to it; dot = sum_i G_ij cos_ij.
  void finish(Worker& worker, int64_t first, int64_t j, T dot) const {
    const T inv = worker.w.inv_norm[j];
    const T projection = options_.normalize_weight && inv < 1 / T(kEps) ? dot * inv * inv : 0;
    if (worker.update) {
      worker.update->move(first + j, worker.dw.row(j), projection, worker.w.row(j));
    } else {
      worker.dw.save(j, projection, worker.w);
    }
  }

 private:
  static const Products<T, Operand>& table() { return products<T, Operand>(); }

  const X& x_;
  const ExactSamples<T>& exact_;
  const CosineCache<T>& cosines_;
  const Weight& weight_;
  const Options& options_;
  const Gradients<T>& gradients_;
  const Partition& partition_;
  Sums<T>& sums_;
};

// How many teams the threads form, each with a copy of dx_hat; its members take blocks of samples.
template <typename T>
int teams_of(int threads, const Batch<T>& batch) {
  const int64_t copy = std::max<int64_t>(batch.n * odd_lines<T>(batch.d) * sizeof(T), 1);
  const int64_t most = std::max<int64_t>(kCopies / copy, 1),
                blocks = divide_up(std::max<int64_t>(batch.n, 1), kTileRows);
  return static_cast<int>(std::max<int64_t>(threads / std::min(divide_up(threads, most), blocks), 1));
}

// Every team has tiles of its own. Its members take blocks of samples, one after the other in turn, and then each
// a range of the tile's classes; in between they wait for each other, and so do the teams.
template <typename T, typename Operand>
void by_teams(const TileGradients<T, Operand>& gradients, const Partition& partition,
              const Embeddings<T, Operand>& x, int64_t members, const Runtime& runtime) {
  struct Tile {
    int64_t part, member, first, classes;
  };
  const int64_t threads = partition.parts * members;
  std::vector<std::optional<TileWorker<T, Operand>>> workers(threads);
  std::vector<std::optional<GradientBlock<T, Operand>>> blocks(partition.parts * divide_up(x.n, kTileRows));
  const auto block = [&](int64_t part, int64_t i) -> auto& {
    return blocks[part * divide_up(x.n, kTileRows) + i / kTileRows];
  };
  // Calls body(worker, tile) for every thread whose team has a tile in this round.
  const auto each_thread = [&](int64_t round, auto body) {
    runtime.parallel(threads, [&](int64_t thread) {
      const int64_t part = thread / members, t = partition.first_tile(part) + round;
      if (t >= partition.first_tile(part + 1)) return;
      const int64_t first = t * partition.tile, classes = std::min(partition.tile, partition.classes - first);
      if (!workers[thread]) workers[thread].emplace(gradients.worker(divide_up(partition.tile, members)));
      body(*workers[thread], Tile{part, thread % members, first, classes});
    });
  };
  for (int64_t round = 0; round < divide_up(partition.tiles, partition.parts); ++round) {
    each_thread(round, [&](auto& worker, Tile tile) {
      gradients.begin(worker, tile.first, tile.classes);
      x.each_block([&](int64_t i, int64_t rows) {
        if (i / kTileRows % members != tile.member) return;
        if (!block(tile.part, i)) block(tile.part, i).emplace(gradients.block());
        gradients.samples(worker, *block(tile.part, i), tile.part, tile.first, tile.classes, i, rows);
      });
    });
    each_thread(round, [&](auto& worker, Tile tile) {
      const int64_t begin = tile.member * worker.dw.capacity;
      const int64_t end = std::min(begin + worker.dw.capacity, tile.classes);
      if (!worker.dw.wanted || begin >= end) return;
      x.each_block([&](int64_t i, int64_t rows) {
        gradients.classes(worker, *block(tile.part, i), i, rows, begin, end, {});
      });
      for (int64_t j = begin; j < end; ++j) {
        T dot = 0;
        for (int64_t k = 0; k < members; ++k) dot += workers[tile.part * members + k]->col_dot[j];
        gradients.finish(worker, tile.first, j, dot);
      }
    });
  }
}

template <typename T, typename Operand>
void backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream, const Options& options,
              const Runtime& runtime, const Gradients<T>& gradients) {
  using X = Embeddings<T, Operand>;
  const int64_t d = batch.d, classes = options.classes ? options.count : weight.classes;
  const EntryCache<T> cache(options, batch.n, classes);
  cache.check();
  const bool sparse = !cache.empty();
  Options kept = options;
  if (sparse) kept.cosine_bytes = 0;  // the exact samples have moved together
  Runtime teams = runtime;
  teams.threads = sparse || !gradients.dx ? runtime.threads : teams_of<T>(runtime.threads, batch);
  const int64_t members = runtime.threads / teams.threads;
  const Partition partition =
      sparse ? cache.partition() : CosineCache<T>::partition(kept, classes, teams, kTileOf<T, Operand>);
  const ExactSamples<T> exact(cache, batch, upstream);
  const CosineCache<T> cosines(kept, partition, batch.n);
  const int layouts =
      (cosines.holds_all() ? 0 : X::kColumns) | (gradients.dw || gradients.update ? X::kPanels : 0);
  const X x(exact.batch, runtime, layouts, [&](int64_t i) { return exact.active(i); });
  Sums<T> sums(x.n, odd_lines<T>(x.width), partition.parts, gradients.dx != nullptr, batch.sigmoid.has_value());
  const TileGradients<T, Operand> dense(x, exact, cosines, weight, options, gradients, partition, sums);
  std::optional<SparseGradient<T>> gradient;
  std::optional<Embeddings<T, T>> sparse_x;
  std::optional<Sums<T>> sparse_sums;
  if (sparse) {
    gradient.emplace(cache, batch, upstream);
    sparse_x.emplace(batch, runtime, Embeddings<T, T>::kRows, [&](int64_t i) { return gradient->active(i); });
    sparse_sums.emplace(batch.n, sparse_x->width, partition.parts, gradients.dx != nullptr);
  }

  if (members > 1 && classes > 0) {
    by_teams(dense, partition, x, members, runtime);
  } else {
    runtime.parallel(partition.parts, [&](int64_t part) {
      // so that rows are finished while they are in the cache
      const int64_t some = X::kNormalized || x.n > kTileRows ? partition.tile : kRowsAtOnce;
      auto worker = dense.worker(some);
      auto block = dense.block();
      std::optional<typename SparseGradient<T>::Walk> walk;
      if (sparse) {
        walk.emplace(*gradient, part, sparse_x->rows, x.width, sparse_sums->dx_hat_of(part, 0),
                     sparse_sums->row_dot_of(part, 0), sparse_sums->dscale_of(part, 0));
      }
      auto& [w, dw, update, col_dot, subcenters] = worker;
      partition.each_tile(part, [&](int64_t first, int64_t classes) {
        dense.begin(worker, first, classes);
        x.each_block([&](int64_t i, int64_t rows) {
          dense.samples(worker, block, part, first, classes, i, rows);
          for (int64_t j = 0; dw.wanted && j < classes; j += dw.capacity) {
            const int64_t end = std::min(j + dw.capacity, classes);
            const Ahead ahead = i == 0 ? w.ahead(first + classes + j, end - j) : Ahead{};
            dense.classes(worker, block, i, rows, j, end, ahead);
            if (i + rows < x.n || sparse) continue;
            for (int64_t row = j; row < end; ++row) dense.finish(worker, first, row, col_dot[row]);
          }
        });
        if constexpr (X::kNormalized) {
          if (sparse) {
            walk->tile(first, classes, {w.rows, w.stride, w.inv_norm}, {dw.row(0), dw.stride, x.n > 0}, col_dot);
          }
        }
        if (!dw.wanted || (x.n > 0 && !sparse)) return;
        for (int64_t j = 0; j < classes; ++j) {
          if (!sparse) std::fill_n(dw.row(j), dw.stride, T(0));
          dense.finish(worker, first, j, col_dot[j]);
        }
      });
      if (sparse) walk->finish();
    });
  }

  share(exact.batch.n, d, runtime, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) sums.finish(i, exact.active(i), x, exact.index(i), gradients);
  });
  if (!sparse) return;
  share(batch.n, d, runtime, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (!cache.exact(i)) sparse_sums->finish(i, gradient->active(i), *sparse_x, i, gradients);
    }
  });
}

}  // namespace

template <typename T>
void lmcl_backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream,
                   const Options& options, const Runtime& runtime, const Gradients<T>& gradients) {
  if constexpr (std::is_same_v<T, float>) {
    if (in_bfloat16(batch, weight, options)) {
      return backward<T, BFloat16>(batch, weight, upstream, options, runtime, gradients);
    }
  }
  backward<T, T>(batch, weight, upstream, options, runtime, gradients);
}

template void lmcl_backward(const Batch<float>&, const Weight&, const Upstream<float>&, const Options&,
                            const Runtime&, const Gradients<float>&);
template void lmcl_backward(const Batch<double>&, const Weight&, const Upstream<double>&, const Options&,
                            const Runtime&, const Gradients<double>&);

}  // namespace cosface
