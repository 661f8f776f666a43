// What the chunk driver launches between its matrix products: raw pointers to a device's memory, no torch.
//
// Letters as in lmcl.h. T is the dtype of sums and statistics: double for operands in float64, else float. A
// product's operands are float64, float32, bfloat16 or float16. Offsets are 64-bit, no result is made by atomics,
// and what several blocks contribute to one number goes into a slot each, summed in order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "lmcl.h"

namespace cosface::cuda {

using Stream = void*;  // a cudaStream_t; the host's shim has none

// A gradient G_ij is stored as G_ij kGradientLift / unit_i, with unit_i a power of two that bounds |G_ij|, and
// x_hat_i as x_hat_i kEmbeddingLift unit_i / max_i unit_i. So float16 operands neither overflow nor, down to
// probabilities of 1.5e-8, become subnormal, whatever the loss is divided by.
constexpr double kGradientLift = 4096, kEmbeddingLift = 256;

// Whether G of this dtype is stored divided by |w_j| as well, so that both products take rows of w as they are.
// float16 has no range for short rows.
constexpr bool is_divided(DType g) { return g != DType::kFloat16; }

// Rows (n, columns) of operands: embeddings, or the class weights of a chunk.
struct Rows {
  const void* data;
  DType dtype;
  int64_t n, columns;
  int64_t stride;  // elements from row to row
};

// inv_norm_i = 1 / max(|v_i|, eps).
template <typename T>
void row_norms(const Rows& v, T* inv_norm, Stream stream);

// hat_i = factor_i v_i / max(|v_i|, eps): (n, columns), contiguous, in the dtype of v. Without a factor it is 1;
// where it is 0 so is hat, whatever v holds.
template <typename T>
void normalize_rows(const Rows& v, const T* inv_norm, const T* factor, void* hat, Stream stream);

// A cosine as it is kept from forward to backward: fixed point, off by at most 2^-16, or exact where T is double.
template <typename T>
using Kept = std::conditional_t<std::is_same_v<T, double>, double, int16_t>;

// The products of a chunk: dot_ij = <x_i, w_j>, (n, classes), contiguous. Class j of the chunk is first_class + j.
template <typename T>
struct Chunk {
  T* dot;
  int64_t n, classes, first_class;
  const T *x_inv_norm, *w_inv_norm;  // (n), (classes): as of row_norms, or 1
  const int64_t* y;                  // (n)
  const T* s;                        // (n)
  int64_t segments;                  // blocks that share a row
  // Negatives are reshaped to N(c) = (q c + a) c + b where c > tau_i: (n), and q, a, b; or null for N(c) = c.
  const T *tau = nullptr, *coefficients = nullptr;
  // Where cos_ij is kept, at i kept_stride + j: class_statistics writes it, and logit_gradients reads it in
  // place of dot, which may then be null. Or null.
  Kept<T>* kept = nullptr;
  int64_t kept_stride = 0;
  const int64_t* second = nullptr;  // (n) second targets, where there are moments, or null
};

// Statistics of the chunks seen so far: (segments, n) each, from `lowest` and 0 on.
template <typename T>
struct RunningStatistics {
  T *top, *max_cos;  // of N(cos_ij) and of cos_ij over j != y_i; the same memory where N(c) = c
  double* sum_exp;   // sum of e^{s_i (N(cos_ij) - top)}
  // (4, segments, n) sums, or null if not wanted: of e^{s_i (N(cos_ij) - top)} (top - N(cos_ij)), of N(cos_ij), of
  // the cos_ij above tau_i, and how many these are.
  double* moments = nullptr;
};

// Also writes target_cos_i where y_i lies in the chunk, and at n + i that of the second target.
template <typename T>
void class_statistics(const Chunk<T>& chunk, const RunningStatistics<T>& running, T* target_cos, Stream stream);

// The slots of each row in order, then LMCL, given its target_cos, and the moments where they are wanted.
template <typename T>
void merge_statistics(const RunningStatistics<T>& running, int64_t segments, int64_t n, const int64_t* y,
                      const T* s, T margin, const Results<T>& results, Stream stream);

// g_ij (n, classes) from dot_ij, in the dtype of the operands: s_i g_lse_i p_ij N'(cos_ij) for j != y_i, g_cos_i
// for j = y_i, both lifted and, where is_divided, divided. It may be the memory of `dot`, if their dtype is the
// same. negative_dot: (segments, n), += g_lse_i sum_{j != y_i} p_ij N(cos_ij). With gradients b_i and c_i of
// moments, (s_i t_ij + b_i p_ij + c_i) N'(cos_ij) and += sum_{j != y_i} t_ij N(cos_ij) with t_ij = (g_lse_i + b_i
// (N(cos_ij) - top_i)) p_ij.
template <typename T>
void logit_gradients(const Chunk<T>& chunk, const Upstream<T>& upstream, const T* unit, void* g, DType dtype,
                     double* negative_dot, Stream stream);

// logit_gradients of classes that count each on its own, as lmcl.h's Sigmoid defines them: p_ij = 1 / (1 +
// e^-z_ij) with z_ij = s_i N(cos_ij) - log_sum_i. polynomials: (2, 5), N and the slope for it, of which g_ij for j
// != y_i is s_i g_lse_i p_ij times that slope; or null for N(cos) = -arccos(cos), where it is g_lse_i p_ij. sums:
// (3, segments, n), += over j != y_i what negative_dot is, by angles 0; what the negatives add; and p_ij. A row
// whose gradients are 0 adds nothing.
template <typename T>
void sigmoid_gradients(const Chunk<T>& chunk, const Upstream<T>& upstream, const T* polynomials, const T* unit,
                       void* g, DType dtype, double* sums, Stream stream);

// The gradient of v from that of v_hat = v / max(|v|, eps), which may be divided by |v_i| already:
//   out_i = factor_i (g_i - <g_i, v_hat_i> v_hat_i) / |v_i|,
// without the projection for a row whose norm was clamped, and 0 where the factor is; nan where |v_i| is infinite.
// g and out are (n, columns), contiguous; out is in the dtype of v, or in T. factor_step is 1 for a factor per
// row, 0 for one of all.
template <typename T>
void project_rows(const T* g, bool divided, const Rows& v, const T* inv_norm, const T* factor, int64_t factor_step,
                  void* out, DType out_dtype, Stream stream);

// Moves n rows of w and of the optimizer's state, in place, by their gradient g (n, columns), contiguous. Row j of
// g is that of row index_j of w, or of row first_row + j where index is null. Rounding to bfloat16 and float8
// is stochastic, with the bits of backend `cpu`: they depend on seed, step and place alone. Of a weight in float8
// g is the gradient of what is stored.
template <typename T>
void move_rows(const T* g, int64_t n, int64_t columns, const Weight& w, const int64_t* index, int64_t first_row,
               const Update& update, Stream stream);

}  // namespace cosface::cuda
