// The vectorised inner loops. kernels.cpp is compiled once for every instruction set; a table of pointers selects
// one at run time.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lmcl.h"
#include "update.h"

namespace cosface {

// Samples per tile. The kernels keep a few numbers per sample on the stack.
constexpr int64_t kTileRows = 256;

// A number with the exponent of a float, and the first 8 bits of its significand.
struct BFloat16 {
  uint16_t bits;
};

// A matrix that is read element by element: (i, k) is at data[i row_stride + k depth_stride]. One of the strides
// must be 1, that of the depth if it holds bfloat16.
template <typename Operand>
struct Left {
  const Operand* data;
  int64_t row_stride, depth_stride;
};

// A matrix that is read in panels of Products::panel columns: row k of panel q is at
// data[q panel_stride + k depth_stride]. Of bfloat16, rows 2k and 2k + 1 are interleaved: their numbers in a
// column are a pair, and depth_stride is the panel.
template <typename Operand>
struct Right {
  const Operand* data;
  int64_t panel_stride, depth_stride;
  const float* factor = nullptr;  // with bfloat16, of the columns of a product; null for 1
};

// Addresses of memory that will be read soon; empty for none.
struct Ahead {
  uintptr_t first = 0, last = 0;
};

// A row's gradient before the projection is taken off it: g = factor (dw - projection w).
template <typename T>
struct RowGradient {
  const T* dw;
  T projection, factor;
};

// A place in a tile of at most 256 classes and 256 samples: class << 8 | sample.
using Place = uint16_t;
constexpr int64_t kPlaceClasses = 256;

// Of the distance s_i (top_i - N(cos_ij)) of an entry from the largest of its row. The last bin has no end.
constexpr int64_t kBins = 256, kBinsPerNat = 8;

constexpr int64_t kKeepSlack = 64;  // entries that forward_and_keep() may write beyond those it counts

// The loops over the entries of the softmax that are kept for a sparse backward; see sparse.h.
template <typename T>
struct SparseKernels {
  // As Kernels::forward_tile, and keeps cos_ij of the entries with N(cos_ij) > cut_i, class by class; returns how
  // many there are. tail_i is the running sum of e^{s_i (N(cos_ij) - row_max_i)} over the others.
  int64_t (*forward_and_keep)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm,
                              const int64_t* y, int64_t first_class, const T* s, Negatives<T> negatives,
                              T* row_max, T* max_cos, double* row_sum, T* target_cos, const T* cut, double* tail,
                              T* kept, Place* place);

  // Adds entries to bins (samples, kBins).
  void (*tally)(const T* kept, const Place* place, int64_t count, const T* s, Negatives<T> negatives, const T* top,
                uint32_t* bins);

  // Moves the entries with N(cos_ij) > cut_i to the front of `to`, which may be where they are or before it, and
  // returns how many there are. Adds e^{s_i (N(cos_ij) - top_i)} of the others to tail_i, and takes them off
  // row_count_i.
  int64_t (*prune)(const T* kept, const Place* place, int64_t count, const T* cut, const T* s,
                   Negatives<T> negatives, const T* top, double* tail, uint32_t* row_count, T* to_kept,
                   Place* to_place);

  // G_ij / |w_j| of entries, each with its class and sample apart; those of samples with g_lse_i = 0 are left out,
  // and the number of others is returned. Adds G_ij cos_ij to col_dot_j, and g_lse_i p_ij N(cos_ij) to dscale_i;
  // with reshaped negatives G_ij cos_ij to row_dot_i, which is else s_i times what dscale_i gets and not touched.
  int64_t (*gradients)(const T* kept, const Place* place, int64_t count, const T* inv_norm, const T* s,
                       Negatives<T> negatives, const T* top, const T* log_sum, const T* g_lse, T* col_dot,
                       double* row_dot, double* dscale, T* g, uint8_t* classes, uint8_t* samples);

  // to = sum_k factor_k rows_{index_k}, or to += it; rows have `width` numbers, a multiple of the panel.
  void (*weighted_sum)(const T* rows, int64_t stride, const uint8_t* index, const T* factor, int64_t count,
                       int64_t width, T* to, bool accumulate);
};

// Matrix products of numbers of type Operand, summed in T.
template <typename T, typename Operand>
struct Products {
  int64_t panel;       // columns that a product makes at a time
  int64_t depth_step;  // depths are multiples of it, with zeros where there is nothing to multiply

  // c (rows, cols) = a (rows, depth) b (depth, cols), or c += a b; cols must be a multiple of panel. Meanwhile
  // fetches what it can of `ahead` into the cache.
  void (*matmul)(Left<Operand> a, Right<Operand> b, T* c, int64_t c_stride, int64_t rows, int64_t cols,
                 int64_t depth, bool accumulate, Ahead ahead);

  // Rows v (rows, d), which lie `stride` apart, as a Right of depth d whose columns are the rows of v: panel q
  // holds v_{q panel + l, k} at [q d panel + k panel + l], with zeros where there is no such row.
  void (*pack_transposed)(const Operand* v, int64_t rows, int64_t d, int64_t stride, Operand* to);

  // Rows v (rows, width), which lie `stride` apart, as a Right with adjacent rows of panels that lie panel_stride
  // apart: rows that are powers of two apart share few places of a cache. width must be a multiple of panel. Rows
  // of zeros follow up to the next depth_step.
  void (*pack)(const Operand* v, int64_t rows, int64_t width, int64_t stride, Operand* to, int64_t panel_stride);
};

// What products of bfloat16 need besides; see bfloat16.cpp.
struct Bfloat16Kernels {
  Products<float, BFloat16> products;
  bool outruns_entries;  // an exact backward takes less time than a sparse one of float, however few the entries

  // to = factor x, rounded to the nearest.
  void (*scale)(const float* x, int64_t d, float factor, BFloat16* to);

  // A tile of gradients (classes, n) as the left sides of two products: factor_i g_ji class by class, and g_ji
  // sample by sample, both rounded to the nearest, with zeros up to whole depth_steps of their rows.
  void (*round)(const float* g, int64_t classes, int64_t n, int64_t stride, const float* factor,
                BFloat16* by_class, int64_t class_stride, BFloat16* by_sample, int64_t sample_stride);

  void (*inverse_norms)(const BFloat16* w, int64_t rows, int64_t d, int64_t stride, float* inv_norm);

  // Of n elements, exact.
  void (*from_float8)(const void* from, int64_t n, BFloat16* to);

  // to = dw - projection w, rounded to the nearest.
  void (*project)(const float* dw, const BFloat16* w, int64_t d, float projection, BFloat16* to);
};

// What a tile of samples adds up beside its logsumexp, and their second targets.
template <typename T>
struct MomentSums {
  const int64_t* second;  // or null
  T* second_cos;
  // (n) each, of Results::moments; below relative to row_max, and times row_sum
  double *below, *sum, *hard_sum, *hard_count;
};

// The gradients of these, as in Upstream.
template <typename T>
struct MomentGradients {
  const int64_t* second;  // or null
  const T *g_second_cos, *b, *c;
};

template <typename T>
struct Kernels {
  Products<T, T> products;

  // x_hat = x / max(|x|, eps) and inv_norm = 1 / max(|x|, eps) for a row x of length d.
  void (*normalize)(const T* x, int64_t d, T* x_hat, T* inv_norm);

  void (*inverse_norms)(const T* w, int64_t rows, int64_t d, int64_t stride, T* inv_norm);

  // Conversion of n elements to T, and back: to fewer bits through float, each with round-to-nearest-even. What is
  // too large for float8, which has no infinity, becomes its largest number.
  void (*load)(const void* from, DType dtype, int64_t n, T* to);
  void (*store)(const T* from, int64_t n, void* to, DType dtype);

  // Online logsumexp of one tile, class by class. z (classes, n) holds <w_j, x_hat_i> for classes j from
  // first_class on and n <= kTileRows samples i; it is overwritten. Updates row_max_i, the running maximum of
  // cos_ij over j != y_i, and row_sum_i, the running sum of e^{s_i (cos_ij - row_max_i)}; writes target_cos_i
  // where y_i lies in the tile. s_i > 0. With reshaped negatives, N(cos_ij) takes the place of cos_ij, and
  // max_cos_i is updated, which is else not looked at: the running maximum of cos_ij itself.
  void (*forward_tile)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                       int64_t first_class, const T* s, const Negatives<T>& negatives, T* row_max, T* max_cos,
                       double* row_sum, T* target_cos);

  // The samples, in where, with a cosine z_i inv_norm that is not at most their limit, and how many they are.
  int64_t (*exceeding)(const T* z, int64_t n, T inv_norm, const T* limit, uint8_t* where);

  // Gradient of one tile. z is as in forward_tile and is overwritten by G_ij / |w_j|, where
  // G_ij = s_i g_lse_i p_ij with p_ij = e^{s_i (cos_ij - top_i) - log_sum_i} for j != y_i, and g_cos_i for j =
  // y_i. Adds sum_i G_ij cos_ij to col_dot_j, sum_j G_ij cos_ij to row_dot_i and sum_{j != y_i} g_lse_i p_ij
  // cos_ij to dscale_i. With reshaped negatives, p_ij and dscale_i have N(cos_ij), and G_ij the factor N'(cos_ij).
  void (*backward_tile)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                        int64_t first_class, const T* s, const Negatives<T>& negatives, const T* top,
                        const T* log_sum, const T* g_lse, const T* g_cos, T* col_dot, double* row_dot,
                        double* dscale);

  // forward_tile and backward_tile with the moments and second targets too. backward_moments: G_ij = (s_i t_ij +
  // b_i p_ij + c_i) N'(cos_ij) with t_ij = (g_lse_i + b_i (N(cos_ij) - top_i)) p_ij, which dscale_i has in place
  // of g_lse_i p_ij.
  void (*forward_moments)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                          int64_t first_class, const T* s, const Negatives<T>& negatives, T* row_max, T* max_cos,
                          double* row_sum, T* target_cos, const MomentSums<T>& moments);
  void (*backward_moments)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                           int64_t first_class, const T* s, const Negatives<T>& negatives, const T* top,
                           const T* log_sum, const T* g_lse, const T* g_cos, T* col_dot, double* row_dot,
                           double* dscale, const MomentGradients<T>& moments);

  // backward_tile with a sigmoid, and log_sum = -bias: p_ij = 1 / (1 + e^-(s_i N(cos_ij) - log_sum_i)), t_ij =
  // g_lse_i p_ij, and for j != y_i G_ij = s_i t_ij N'(cos_ij); by angles t_ij, which dscale_i has no part of. Adds
  // what the negatives add to added_i, and their p_ij to mass_i.
  void (*sigmoid_tile)(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                       int64_t first_class, const T* s, const Sigmoid<T>& sigmoid, const T* log_sum,
                       const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale, double* added,
                       double* mass);

  // From z (rows, n) of a tile of whole classes, K rows each, their cosines (rows / K, n) in place, and which of
  // the K rows each is of: the first of equal ones, or of those that are nan.
  void (*fold)(T* z, int64_t rows, int64_t n, int64_t stride, const T* inv_norm, int64_t subcenters,
               uint8_t* winner);
  // From G (rows / K, n) of these cosines to G_ij / |w_j| of all rows, in place. Adds sum_i G_ij cos_ij to
  // col_dot_j.
  void (*unfold)(T* g, int64_t rows, int64_t n, int64_t stride, const T* inv_norm, int64_t subcenters,
                 const uint8_t* winner, const T* cos, T* col_dot);

  // Cosines <w_j, x_hat_i> / |w_j| of one tile to a cache, class by class, in fixed point of 16 bits for float;
  // and back to z (classes, n), as forward_tile takes it.
  void (*keep_cosines)(const T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, void* kept);
  void (*recall_cosines)(const void* kept, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, T* z);

  // dw -= projection w, for rows of length d.
  void (*project)(T* dw, const T* w, int64_t d, T projection);

  // The length of a row's gradient g.
  T (*gradient_norm)(RowGradient<T> g, const T* w, int64_t d);

  // Move a row w of length d by its gradient; momentum may be null, and so may max_square.
  void (*sgd)(RowGradient<T> g, T* w, T* momentum, int64_t d, const SgdStep<T>& step);
  void (*adamw)(RowGradient<T> g, T* w, T* mean, T* square, T* max_square, int64_t d, const AdamWStep<T>& step);

  // Row `row` of a matrix of width d to bfloat16 or float8, up or down at random with the probabilities that keep
  // the expected value; which way element (row, k) goes depends on seed, stream > 0 and its place alone.
  void (*store_stochastic)(const T* from, int64_t d, void* to, DType dtype, uint64_t seed, uint64_t stream,
                           int64_t row);

  // What rows of float8 need besides: the largest |v_k|, 0 of nan alone; v times a power of two; roots, but at
  // least `least`; squares.
  T (*largest)(const T* v, int64_t d);
  void (*times)(T* v, int64_t d, T factor);
  void (*roots)(T* v, int64_t d, T least);
  void (*squares)(T* v, int64_t d);

  // dx = (dx_hat - row_dot x / |x|) / |x|, where dx_hat is the sum of `parts` rows that lie part_stride apart.
  void (*finish_dx)(const T* dx_hat, int64_t parts, int64_t part_stride, const T* x, T row_dot, T inv_norm,
                    int64_t d, T* dx);

  // The elements [256 group, 256 group + n) of the normal stream, n <= 256.
  void (*normal)(uint64_t seed, uint64_t group, int64_t n, float std, float* to);

  SparseKernels<T> sparse[2];  // N(c) = c, and reshaped negatives

  const SparseKernels<T>& sparse_for(const Negatives<T>& negatives) const {
    return sparse[negatives.tau == nullptr ? 0 : 1];
  }
};

// The best set that this processor has, or the one named in COSFACE_CPU_ISA; chosen at the first call.
template <typename T>
const Kernels<T>& kernels();

// Null where this processor multiplies bfloat16 no faster than float.
const Bfloat16Kernels* bfloat16_kernels();

template <typename T, typename Operand>
const Products<T, Operand>& products() {
  if constexpr (std::is_same_v<T, Operand>) {
    return kernels<T>().products;
  } else {
    return bfloat16_kernels()->products;
  }
}

}  // namespace cosface
