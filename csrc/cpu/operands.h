// What the products of a tile read: the embeddings, and the rows of its classes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "partition.h"

namespace cosface {

template <typename T>
bool is(DType dtype) {
  if (std::is_same_v<T, BFloat16>) return dtype == DType::kBFloat16;
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

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
        exponents_(options.exponents),
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
      for (int64_t j = 0; exponents_ && j < classes; ++j) {
        inv_norm[j] = std::ldexp(T(1), exponents_[chosen_ ? chosen_[first + j] : first + j]);
      }
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
    } else if (weight_.dtype == DType::kFloat8) {
      bfloat16_kernels()->from_float8(source, d_, to);
    } else {
      kernels<T>().store(reinterpret_cast<const T*>(source), d_, to, DType::kBFloat16);
    }
  }

  const Weight& weight_;
  const int64_t* const chosen_;
  const bool normalize_;
  const int8_t* const exponents_;
  const int64_t d_, width_;
  const bool in_place_;
  Buffer<Operand> copy_;
  Buffer<T> row_;
  const bool packs_;
  Buffer<Operand> panels_;
};

template <typename T, typename Operand>
constexpr TileSize kTileOf = std::is_same_v<T, Operand> ? kTile : kBfloat16Tile;

template <typename T>
bool in_bfloat16(const Batch<T>& batch, const Weight& weight, const Options& options) {
  const bool fits =
      weight.dtype == DType::kBFloat16 || weight.dtype == DType::kFloat32 || weight.dtype == DType::kFloat8;
  return multiplies_bfloat16(options.gradient_tolerance) && batch.bfloat16 && fits;
}

}  // namespace cosface
