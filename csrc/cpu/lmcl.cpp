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
#include <cstring>
#include <limits>
#include <optional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "partition.h"
#include "sparse.h"

namespace cosface {
namespace {

template <typename T>
bool is(DType dtype) {
  if (std::is_same_v<T, BFloat16>) return dtype == DType::kBFloat16;
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// The tiles whose cosines are kept from forward to backward: spread evenly, so that every thread has its share.
template <typename T>
class CosineCache {
 public:
  static bool wanted(const Options& options) { return options.cosine_bytes >= kHeader; }

  // Forward says how it cut the classes; backward must do so too, whatever the number of threads is by now. What
  // no tile will fill is 0, so that the cache depends on the inputs alone: the last slot may be for fewer classes.
  static void begin(const Options& options, const Partition& partition, int64_t n) {
    if (!wanted(options)) return;
    const CosineCache cache(options, partition, n);
    char* const header = static_cast<char*>(options.cosines);
    char* const last_slot = cache.first_ + std::max<int64_t>(cache.kept_ - 1, 0) * cache.slot_bytes_;
    std::memset(header, 0, kHeader);
    std::memset(last_slot, 0, header + options.cosine_bytes - last_slot);
    *reinterpret_cast<int64_t*>(header) = partition.tile;
  }
  static Partition partition(const Options& options, int64_t classes, const Runtime& runtime, TileSize size) {
    if (!wanted(options)) return {classes, runtime, size};
    const int64_t tile = *static_cast<const int64_t*>(options.cosines);
    if (tile < 1 || tile > std::max(size.classes, runtime.tile_classes)) {
      throw std::invalid_argument(kForeignCache);
    }
    return {classes, tile, std::min<int64_t>(runtime.threads, divide_up(classes, tile))};
  }

  CosineCache(const Options& options, const Partition& partition, int64_t n)
      : partition_(partition),
        first_(wanted(options) ? static_cast<char*>(options.cosines) + kHeader : nullptr),
        exact_(options.exact_cosines),
        element_(exact_ || sizeof(T) == 8 ? sizeof(T) : 2),
        slot_bytes_(partition.tile * n * element_),
        kept_(!wanted(options) || slot_bytes_ == 0
                  ? 0
                  : std::min(partition.tiles, (options.cosine_bytes - kHeader) / slot_bytes_)) {}

  bool holds_all() const { return kept_ == partition_.tiles; }

  // Of the tiles.
  double share() const {
    return static_cast<double>(kept_) / static_cast<double>(std::max<int64_t>(partition_.tiles, 1));
  }

  // z (classes, rows), <w_j, x_hat_i> of the samples from i on with the classes from `first` on, if their tile is
  // one of those that are kept.
  void keep(int64_t first, int64_t i, const T* z, int64_t classes, int64_t rows, int64_t stride,
            const T* inv_norm) const {
    void* to = at(first, i);
    if (to == nullptr) return;
    if (exact_) {
      for (int64_t j = 0; j < classes; ++j) std::copy_n(z + j * stride, rows, static_cast<T*>(to) + j * rows);
    } else {
      kernels<T>().keep_cosines(z, classes, rows, stride, inv_norm, to);
    }
  }

  // z as it was, or false.
  bool recall(int64_t first, int64_t i, T* z, int64_t classes, int64_t rows, int64_t stride,
              const T* inv_norm) const {
    const void* from = at(first, i);
    if (from == nullptr) return false;
    if (exact_) {
      for (int64_t j = 0; j < classes; ++j)
        std::copy_n(static_cast<const T*>(from) + j * rows, rows, z + j * stride);
    } else {
      kernels<T>().recall_cosines(from, classes, rows, stride, inv_norm, z);
    }
    return true;
  }

 private:
  static constexpr int64_t kHeader = 64;

  // Where the block of samples from row i on of the tile from class `first` on is kept, or null.
  void* at(int64_t first, int64_t i) const {
    const int64_t t = first / partition_.tile, slot = t * kept_ / partition_.tiles;
    if ((t + 1) * kept_ / partition_.tiles == slot) return nullptr;
    return first_ + slot * slot_bytes_ + i * partition_.tile * element_;
  }

  const Partition& partition_;
  char* const first_;
  const bool exact_;
  const int64_t element_, slot_bytes_, kept_;
};

// A stride for rows of this width, an odd number of cache lines: a block of a column would else have few places in
// the cache.
template <typename T>
int64_t odd_lines(int64_t width) {
  constexpr int64_t kLine = 64 / sizeof(T);
  return (round_up(width, kLine) / kLine | 1) * kLine;
}

// The embeddings as the products read them: normalised, or, in bfloat16, times the power of two that brings their
// norms near 1 and yet to be divided by what remains of these, so that nothing is rounded.
template <typename T, typename Operand>
struct Embeddings {
  enum Layout { kColumns = 1, kPanels = 2, kRows = 4 };
  static constexpr bool kNormalized = std::is_same_v<T, Operand>;

  const int64_t n, d, depth, width;  // d, rounded up to a depth of products, and to whole panels
  const T* given;                    // (N, D)
  Buffer<Operand> columns;           // blocks of kTileRows rows, each packed as its transpose
  Buffer<Operand> panels;            // blocks of kTileRows rows, each packed, with zeros beyond d
  Buffer<Operand> rows;              // (N, width), zeros beyond d
  Buffer<T> inv_norm;                // (N)
  Buffer<T> remainder;               // (N), of inv_norm without the power of two, if not normalised

  // Rows for which active(i) is false become 0, whatever x holds: 0 x nan would be nan in a product.
  template <typename Active>
  Embeddings(const Batch<T>& batch, const Runtime& runtime, int layouts, Active active)
      : n(batch.n),
        d(batch.d),
        depth(round_up(d, table().depth_step)),
        width(round_up(d, table().panel)),
        given(batch.x),
        columns(layouts & kColumns ? round_up(n, table().panel) * depth : 0),
        panels(layouts & kPanels ? padded(n) * width : 0),
        rows(layouts & kRows ? n * width : 0),
        inv_norm(n),
        remainder(kNormalized ? 0 : round_up(n, table().panel)) {
    const int64_t some = table().panel;  // rows that every layout has in one place
    share(divide_up(n, some), some * d, runtime, [&](int64_t first, int64_t last) {
      Buffer<Operand> apart(layouts & kRows ? 0 : some * width);
      for (int64_t i = first * some; i < std::min(last * some, n); i += some) {
        Operand* const here = layouts & kRows ? rows + i * width : apart;
        const int64_t count = std::min(some, n - i), block = i / kTileRows * kTileRows;
        if (!kNormalized) std::fill_n(remainder + i, some, T(0));
        for (int64_t k = 0; k < count; ++k) {
          Operand* row = here + k * width;
          if (active(i + k)) {
            prepare(i + k, row);
          } else {
            std::fill_n(row, d, Operand{});
            inv_norm[i + k] = 0;
          }
          std::fill(row + d, row + width, Operand{});
        }
        if (layouts & kColumns) table().pack_transposed(here, count, depth, width, columns + i * depth);
        if (layouts & kPanels) {
          const Right<Operand> whole = right(block);
          table().pack(here, count, width, width, panels + block * width + (i - block) * some, whole.panel_stride);
        }
      }
    });
  }

  static const Products<T, Operand>& table() { return products<T, Operand>(); }

  // Samples or classes as a depth of products.
  static int64_t padded(int64_t count) { return round_up(count, table().depth_step); }

  // The block from row i on, as the right side of a product.
  Right<Operand> right(int64_t i) const {
    return {panels + i * width, padded(std::min(kTileRows, n - i)) * table().panel, table().panel};
  }

  // Its transpose.
  Right<Operand> right_transposed(int64_t i) const {
    Right<Operand> block{columns + i * depth, depth * table().panel, table().panel};
    if constexpr (!kNormalized) block.factor = remainder + i;
    return block;
  }

  // Calls body(first row, number of rows) for blocks of at most kTileRows rows.
  template <typename Body>
  void each_block(Body body) const {
    for (int64_t i = 0; i < n; i += kTileRows) body(i, std::min(kTileRows, n - i));
  }

  int64_t tile_stride() const { return odd_lines<T>(round_up(std::min(n, kTileRows), table().panel)); }

 private:
  void prepare(int64_t i, Operand* row) {
    const T* const x = given + i * d;
    if constexpr (kNormalized) {
      kernels<T>().normalize(x, d, row, inv_norm + i);
    } else {
      kernels<T>().inverse_norms(x, 1, d, d, inv_norm + i);
      int exponent;
      remainder[i] = std::frexp(inv_norm[i], &exponent);
      if (!(remainder[i] > 0)) remainder[i] = 1;  // the norm is infinite or nan
      bfloat16_kernels()->scale(x, d, inv_norm[i] / remainder[i], row);
    }
  }
};

constexpr int64_t kPackedRows = 64;  // samples from which on packing a tile of classes saves time, with AVX2

// The class rows of one tile, in whole panels: the weight itself where it is of Operand, else a copy.
template <typename T, typename Operand>
class ClassRows {
 public:
  ClassRows(const Weight& weight, const Options& options, const Embeddings<T, Operand>& x, int64_t tile,
            bool packs)
      : inv_norm(tile),
        weight_(weight),
        chosen_(options.classes),
        normalize_(options.normalize_weight),
        d_(x.d),
        width_(x.width),
        in_place_(chosen_ == nullptr && is<Operand>(weight.dtype) && width_ == d_),
        copy_(in_place_ ? 0 : tile * width_),
        row_(kSame ? 0 : d_),
        packs_(packs),
        panels_(packs ? x.padded(tile) * width_ : 0) {}

  void load(int64_t first, int64_t classes) {
    const auto* source = static_cast<const char*>(weight_.data);
    const int64_t row_bytes = weight_.row_stride * size_of(weight_.dtype);
    if (in_place_) {
      rows = reinterpret_cast<const Operand*>(source + first * row_bytes);
      stride = weight_.row_stride;
    } else {
      for (int64_t j = 0; j < classes; ++j) {
        fetch(source + (chosen_ ? chosen_[first + j] : first + j) * row_bytes, copy_ + j * width_);
        std::fill(copy_ + j * width_ + d_, copy_ + (j + 1) * width_, Operand{});
      }
      rows = copy_;
      stride = width_;
    }
    if (!normalize_) {
      std::fill_n(static_cast<T*>(inv_norm), classes, T(1));
    } else if constexpr (kSame) {
      kernels<T>().inverse_norms(rows, classes, d_, stride, inv_norm);
    } else {
      bfloat16_kernels()->inverse_norms(rows, classes, d_, stride, inv_norm);
    }
    if (packs_) table().pack(rows, classes, width_, stride, panels_, panel_stride(classes));
  }

  // The row of class j of the tile in T, until the next is asked for.
  const T* row(int64_t j) const {
    if constexpr (kSame) {
      return rows + j * stride;
    } else {
      kernels<T>().load(rows + j * stride, DType::kBFloat16, d_, row_);
      return row_;
    }
  }

  // As the right side of a product.
  Right<Operand> right(int64_t classes) const {
    const int64_t panel = table().panel;
    return packs_ ? Right<Operand>{panels_, panel_stride(classes), panel} : Right<Operand>{rows, panel, stride};
  }

  // Where the weight keeps the classes from `first` on; chosen classes lie apart.
  Ahead ahead(int64_t first, int64_t classes) const {
    if (chosen_ != nullptr) return {};
    const auto begin = reinterpret_cast<uintptr_t>(weight_.data);
    const int64_t row_bytes = weight_.row_stride * size_of(weight_.dtype);
    return {begin + first * row_bytes, begin + std::min(first + classes, weight_.classes) * row_bytes};
  }

  // z (classes, rows) = w x_hat^T for the block of embeddings that begins at row i.
  void dot(const Embeddings<T, Operand>& x, int64_t i, int64_t classes, T* z, Ahead ahead) const {
    table().matmul({rows, stride, 1}, x.right_transposed(i), z, x.tile_stride(), classes,
                   round_up(std::min(kTileRows, x.n - i), table().panel), x.depth, false, ahead);
  }

  const Operand* rows = nullptr;
  int64_t stride = 0;
  Buffer<T> inv_norm;  // (classes)

 private:
  static constexpr bool kSame = std::is_same_v<T, Operand>;
  static const Products<T, Operand>& table() { return products<T, Operand>(); }
  static int64_t panel_stride(int64_t classes) { return Embeddings<T, Operand>::padded(classes) * table().panel; }

  void fetch(const char* source, Operand* to) const {
    if constexpr (kSame) {
      kernels<T>().load(source, weight_.dtype, d_, to);
    } else if (is<Operand>(weight_.dtype)) {
      std::memcpy(to, source, d_ * sizeof(Operand));
    } else {
      kernels<T>().store(reinterpret_cast<const T*>(source), d_, to, DType::kBFloat16);
    }
  }

  const Weight& weight_;
  const int64_t* const chosen_;
  const bool normalize_;
  const int64_t d_, width_;
  const bool in_place_;
  Buffer<Operand> copy_;
  Buffer<T> row_;
  const bool packs_;
  Buffer<Operand> panels_;
};

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
        adamw_(update),
        weight_copy_(is<T>(weight.dtype) ? 0 : d),
        state_copy_(3 * d) {}

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
    if (!is<T>(weight_.dtype)) save(moved, stored, weight_.dtype, kWeightTensor, row);
    for (int64_t k = 0; k < 3; ++k) {
      const DType dtype = update_.state[k].dtype;
      if (state[k] != nullptr && !is<T>(dtype)) save(state[k], stored_state(k, row), dtype, k, row);
    }
  }

  // Where the first state of these classes is kept, which lie apart if they were chosen.
  Ahead ahead(int64_t first, int64_t classes) const {
    if (chosen_ != nullptr || update_.state[0].data == nullptr) return {};
    return {reinterpret_cast<uintptr_t>(stored_state(0, first)),
            reinterpret_cast<uintptr_t>(stored_state(0, first + classes))};
  }

 private:
  char* stored_state(int64_t k, int64_t row) const {
    return static_cast<char*>(update_.state[k].data) + row * d_ * size_of(update_.state[k].dtype);
  }

  T* loaded_state(int64_t k, int64_t row) const {
    if (update_.state[k].data == nullptr) return nullptr;
    if (is<T>(update_.state[k].dtype)) return reinterpret_cast<T*>(stored_state(k, row));
    kernels<T>().load(stored_state(k, row), update_.state[k].dtype, d_, state_copy_ + k * d_);
    return state_copy_ + k * d_;
  }

  void save(const T* from, void* to, DType dtype, int64_t tensor, int64_t row) const {
    if (dtype == DType::kBFloat16) {
      kernels<T>().store_stochastic(from, d_, to, update_.seed, rounding_stream(update_.step, tensor), row);
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
    for (int64_t i = 0; i < batch.n; ++i) {
      if (!active(i)) top_[i] = log_sum_[i] = s_[i] = 0;
    }
  }

  bool active(int64_t i) const { return upstream.g_lse[i] != 0 || upstream.g_cos[i] != 0; }
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
  std::vector<T> x_, s_, top_, log_sum_, g_lse_, g_cos_, tau_;
};

// What each thread sums up for each sample.
template <typename T>
class Sums {
 public:
  Sums(int64_t n, int64_t stride, int64_t parts, bool need_dx)
      : stride(stride),
        n_(n),
        parts_(parts),
        dx_hat_(need_dx ? std::max<int64_t>(parts, 1) * n_ * stride : 0),
        row_dot_(parts * n_),
        dscale_(parts * n_) {}

  T* dx_hat_of(int64_t part, int64_t i) { return dx_hat_.empty() ? nullptr : &dx_hat_[(part * n_ + i) * stride]; }
  double* row_dot_of(int64_t part, int64_t i) { return row_dot_.data() + part * n_ + i; }
  double* dscale_of(int64_t part, int64_t i) { return dscale_.data() + part * n_ + i; }

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
};

template <typename T>
T softplus(T z) {
  return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
}

constexpr int64_t kRowsAtOnce = 64;  // of dw, of bfloat16 products with one block of samples

template <typename T, typename Operand>
constexpr TileSize kTileOf = std::is_same_v<T, Operand> ? kTile : kBfloat16Tile;

template <typename T, typename Operand>
void forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options, const Runtime& runtime,
             const Results<T>& results) {
  const int64_t n = batch.n, classes = options.classes ? options.count : weight.classes;
  // one entry at a time is slower than products of bfloat16
  const bool keeps = options.gradient_tolerance > 0 && Embeddings<T, Operand>::kNormalized;
  const Partition partition(classes, runtime, kTileOf<T, Operand>,
                            keeps ? kPlaceClasses : std::numeric_limits<int64_t>::max());
  const EntryCache<T> cache(options, n, classes);
  CosineCache<T>::begin(options, partition, n);
  const Embeddings<T, Operand> x(batch, runtime, Embeddings<T, Operand>::kColumns, [](int64_t) { return true; });
  constexpr T kLowest = std::numeric_limits<T>::lowest();  // finite, so that the difference of two is 0
  std::vector<T> row_max(partition.parts * n, kLowest);
  std::vector<T> max_cos(batch.negatives.tau ? row_max.size() : 0, kLowest);  // where row_max is of N(cos)
  std::vector<double> row_sum(partition.parts * n);
  std::fill_n(results.target_cos, n, T(0));
  // With s = 0 the left-out target, s (-inf), would be nan; e^{s cos} is 1 for the smallest s as well.
  std::vector<T> s(batch.s, batch.s + n);
  for (T& scale : s) scale = scale == 0 ? std::numeric_limits<T>::min() : scale;
  const CosineCache<T> cosines(options, partition, n);
  std::optional<Keeper<T>> keeper;
  if (keeps) {
    cache.lay_out(partition);
    keeper.emplace(cache, partition, batch, s.data(), row_max.data(), max_cos.empty() ? nullptr : max_cos.data(),
                   row_sum.data(), results.target_cos, options.gradient_tolerance, cosines.share());
  } else {
    cache.clear();
  }

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassRows<T, Operand> w(weight, options, x, partition.tile, false);
    Buffer<T> z(partition.tile * x.tile_stride());
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      w.load(first, classes);
      x.each_block([&](int64_t i, int64_t rows) {
        w.dot(x, i, classes, z, i == 0 ? w.ahead(first + classes, classes) : Ahead{});
        cosines.keep(first, i, z, classes, rows, x.tile_stride(), w.inv_norm);
        if (keeper) {
          keeper->forward_tile(part, z, first, classes, i, rows, x.tile_stride(), w.inv_norm);
          return;
        }
        kernels<T>().forward_tile(z, classes, rows, x.tile_stride(), w.inv_norm, batch.y + i, first, &s[i],
                                  batch.negatives.from(i), &row_max[part * n + i],
                                  max_cos.empty() ? nullptr : &max_cos[part * n + i], &row_sum[part * n + i],
                                  results.target_cos + i);
      });
    });
  });
  if (keeper) keeper->finish(runtime);

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
    results.top[i] = top == kLowest ? 0 : top;
    results.log_sum[i] = static_cast<T>(std::log(sum));
    const T z = results.log_sum[i] + batch.s[i] * (results.top[i] - (results.target_cos[i] - margin));
    results.loss[i] = batch.y[i] < 0 ? 0 : softplus(z);
  }
}

template <typename T, typename Operand>
void backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream, const Options& options,
              const Runtime& runtime, const Gradients<T>& gradients) {
  using X = Embeddings<T, Operand>;
  const Products<T, Operand>& table = products<T, Operand>();
  const int64_t d = batch.d, classes = options.classes ? options.count : weight.classes;
  const EntryCache<T> cache(options, batch.n, classes);
  cache.check();
  const bool sparse = !cache.empty();
  Options kept = options;
  if (sparse) kept.cosine_bytes = 0;  // the exact samples have moved together
  const Partition partition =
      sparse ? cache.partition() : CosineCache<T>::partition(kept, classes, runtime, kTileOf<T, Operand>);
  const ExactSamples<T> exact(cache, batch, upstream);
  const CosineCache<T> cosines(kept, partition, batch.n);
  const int layouts =
      (cosines.holds_all() ? 0 : X::kColumns) | (gradients.dw || gradients.update ? X::kPanels : 0);
  const X x(exact.batch, runtime, layouts, [&](int64_t i) { return exact.active(i); });
  Sums<T> sums(x.n, odd_lines<T>(x.width), partition.parts, gradients.dx != nullptr);
  std::optional<SparseGradient<T>> gradient;
  std::optional<Embeddings<T, T>> sparse_x;
  std::optional<Sums<T>> sparse_sums;
  if (sparse) {
    gradient.emplace(cache, batch, upstream);
    sparse_x.emplace(batch, runtime, Embeddings<T, T>::kRows, [&](int64_t i) { return gradient->active(i); });
    sparse_sums.emplace(batch.n, sparse_x->width, partition.parts, gradients.dx != nullptr);
  }

  runtime.parallel(partition.parts, [&](int64_t part) {
    const bool packs = gradients.dx != nullptr && (x.n >= kPackedRows || !X::kNormalized);
    ClassRows<T, Operand> w(weight, options, x, partition.tile, packs);
    // so that rows are finished while they are in the cache
    const int64_t some = X::kNormalized || x.n > kTileRows ? partition.tile : kRowsAtOnce;
    GradientRows<T> dw(gradients, weight.dtype, d, x.width, some);
    GradientTile<T, Operand> gradient_tile(x.padded(partition.tile), x.padded(std::min(x.n, kTileRows)));
    std::optional<RowUpdate<T>> update;
    if (gradients.update != nullptr) update.emplace(*gradients.update, weight, options, d);
    std::optional<typename SparseGradient<T>::Walk> walk;
    if (sparse) {
      walk.emplace(*gradient, part, sparse_x->rows, x.width, sparse_sums->dx_hat_of(part, 0),
                   sparse_sums->row_dot_of(part, 0), sparse_sums->dscale_of(part, 0));
    }
    const int64_t stride = x.tile_stride();
    Buffer<T> g(partition.tile * stride), col_dot(partition.tile);
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      w.load(first, classes);
      dw.begin(first);
      std::fill_n(static_cast<T*>(col_dot), classes, T(0));
      const auto finish = [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) {
          const T inv = w.inv_norm[j];
          const T projection = options.normalize_weight && inv < 1 / T(kEps) ? col_dot[j] * inv * inv : 0;
          if (update) {
            update->move(first + j, dw.row(j), projection, w.row(j));
          } else {
            dw.save(j, projection, w);
          }
        }
      };
      x.each_block([&](int64_t i, int64_t rows) {
        if (cosines.recall(first, i, g, classes, rows, stride, w.inv_norm)) {
          exact.silence(i, g, classes, rows, stride);
        } else {
          w.dot(x, i, classes, g, {});
        }
        kernels<T>().backward_tile(g, classes, rows, stride, w.inv_norm, exact.batch.y + i, first, exact.s(i),
                                   exact.batch.negatives.from(i), exact.top(i), exact.log_sum(i),
                                   exact.upstream.g_lse + i, exact.upstream.g_cos + i, col_dot,
                                   sums.row_dot_of(part, i), sums.dscale_of(part, i));
        gradient_tile.load(g, classes, rows, stride, x.remainder + i);
        if (gradients.dx) {
          table.matmul(gradient_tile.by_sample(), w.right(classes), sums.dx_hat_of(part, i), sums.stride, rows,
                       x.width, x.padded(classes), true,
                       i == 0 && update ? update->ahead(first, classes) : Ahead{});
        }
        for (int64_t j = 0; dw.wanted && j < classes; j += dw.capacity) {
          const int64_t end = std::min(j + dw.capacity, classes);
          table.matmul(gradient_tile.by_class(j), x.right(i), dw.row(j), dw.stride, end - j, x.width,
                       x.padded(rows), i > 0, i == 0 ? w.ahead(first + classes + j, end - j) : Ahead{});
          if (i + rows == x.n && !sparse) finish(j, end);
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
        finish(j, j + 1);
      }
    });
    if (sparse) walk->finish();
  });

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

template <typename T>
bool in_bfloat16(const Batch<T>& batch, const Weight& weight) {
  return multiplies_bfloat16() && batch.bfloat16 &&
         (weight.dtype == DType::kBFloat16 || weight.dtype == DType::kFloat32);
}

}  // namespace

template <typename T>
void lmcl_forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options,
                  const Runtime& runtime, const Results<T>& results) {
  if constexpr (std::is_same_v<T, float>) {
    if (in_bfloat16(batch, weight)) {
      return forward<T, BFloat16>(batch, weight, margin, options, runtime, results);
    }
  }
  forward<T, T>(batch, weight, margin, options, runtime, results);
}

template <typename T>
void lmcl_backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream,
                   const Options& options, const Runtime& runtime, const Gradients<T>& gradients) {
  if constexpr (std::is_same_v<T, float>) {
    if (in_bfloat16(batch, weight)) {
      return backward<T, BFloat16>(batch, weight, upstream, options, runtime, gradients);
    }
  }
  backward<T, T>(batch, weight, upstream, options, runtime, gradients);
}

template <typename T>
void apply_update(const Weight& weight, const void* dw, int64_t d, const Update& update, const Runtime& runtime) {
  const int64_t row_bytes = d * size_of(weight.dtype);
  share(weight.classes, d, runtime, [&](int64_t first, int64_t last) {
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
  share(divide_up(start + n, kGroup) - skipped, kGroup, runtime, [&](int64_t first, int64_t last) {
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
