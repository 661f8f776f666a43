// Compiled once for every instruction set, with COSFACE_ISA naming its namespace. Plain loops that the compiler
// vectorises (`omp simd` allows the reductions); nothing here may call an inline function of the standard library,
// because the linker could then keep a copy that an older processor cannot run.
#include "kernels.h"

#include "philox.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace cosface::COSFACE_ISA {
namespace {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline float sqrt(float v) { return __builtin_sqrtf(v); }
inline double sqrt(double v) { return __builtin_sqrt(v); }

// e^x for x <= 0, and 1 beyond: the distance of a logit from the largest, or the logarithm of a probability, which
// rounded cosines of a cache could put above 0. Cody-Waite reduction x = k ln 2 + f, then 1 + f + f^2 q(f) with q
// the minimax fit of degree 4 on |f| <= ln(2)/2 (relative error 3e-9), then k into the exponent. Below the
// smallest normal number the result is 0.
inline float exp(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // their sum is ln 2, k * high is exact
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kMin = -87.33654f;     // ln 2^-126
  float clamped = x > 0.0f ? 0.0f : x;   // written so that nan passes
  float shifted = clamped * kLog2E + kRound;
  float k = shifted - kRound;
  float f = (clamped - k * kLn2High) - k * kLn2Low;
  float q = 1.381454058e-3f;
  q = q * f + 8.368745446e-3f;
  q = q * f + 4.166838899e-2f;
  q = q * f + 1.666652113e-1f;
  q = q * f + 4.999999404e-1f;
  float r = 1.0f + (f + f * f * q);
  float power = bit_cast<float>((bit_cast<uint32_t>(shifted) << 23) + bit_cast<uint32_t>(1.0f));  // 2^k
  return x < kMin ? 0.0f : r * power;
}
inline double exp(double x) { return __builtin_exp(x > 0 ? 0 : x); }

// -- matrix product ----------------------------------------------------------------------------------------------
//
// A block of kBlockRows x 2 vectors of c stays in registers while a runs down the depth: each step loads two
// vectors of b and as many numbers of a as there are rows. a is read in place, and b is made in panels, once per
// call (x_hat) or per tile (w). With w read in place, one core of a Xeon with AVX-512 did 160 to 166 GFLOP/s on a
// tile's three products, where one library call for each did 125 to 140, because it packs both sides again for
// every tile.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kBlockRows = 14;  // 28 + 2 of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kBlockRows = 6;  // 12 + 3 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kBlockRows = 12;  // 24 + 3 of 32
#else
constexpr int kVectorBytes = 16, kBlockRows = 6;  // 12 + 4 of 16
#endif

// While a block computes, the class rows of the next tile come into L2: a line of 64 bytes every 8 steps is what a
// product with 256 samples needs to fetch one tile during another.
constexpr int64_t kCacheLine = 64, kStepsPerLine = 8;
constexpr int64_t kDepth = 256;  // a panel of b, 256 x 2 vectors, stays in an L1 of 32 KiB

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vector = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <typename T>
constexpr int64_t kPanel = 2 * kLanes<T>;

// c (kRows, kPanel) = a b or c += a b. A row of a is found from the first of its group of four, so that the
// addresses fit into registers; kAdjacent says that its rows are adjacent numbers.
template <typename T, int kRows, bool kAdjacent>
void block(const T* a, int64_t row_stride, int64_t a_step, const T* b, int64_t b_step, int64_t depth, T* c,
           int64_t c_stride, bool accumulate, uintptr_t ahead) {
  constexpr int kGroups = (kRows + 3) / 4;
  if (kAdjacent) row_stride = 1;
  Vector<T> sum[kRows][2] = {};
  const T* groups[kGroups];
  for (int g = 0; g < kGroups; ++g) groups[g] = a + 4 * g * row_stride;
  for (int64_t k = 0; k < depth; ++k, b += b_step) {
    if (k % kStepsPerLine == 0) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + k / kStepsPerLine * kCacheLine), 0, 2);
    }
    const auto b0 = *reinterpret_cast<const Vector<T>*>(b);
    const auto b1 = *reinterpret_cast<const Vector<T>*>(b + kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const T v = groups[r / 4][(r % 4) * row_stride];
      sum[r][0] += v * b0;
      sum[r][1] += v * b1;
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) groups[g] += a_step;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    auto* out = reinterpret_cast<Vector<T>*>(c + r * c_stride);
    auto* out1 = reinterpret_cast<Vector<T>*>(c + r * c_stride + kLanes<T>);
    *out = accumulate ? *out + sum[r][0] : sum[r][0];
    *out1 = accumulate ? *out1 + sum[r][1] : sum[r][1];
  }
}

// block() for the rows that are left over: rows in [1, kRows].
template <typename T, int kRows, bool kAdjacent, typename... Args>
inline void block_of(int64_t rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return block_of<T, kRows - 1, kAdjacent>(rows, args...);
  }
  block<T, kRows, kAdjacent>(args...);
}

template <typename T>
void matmul(Left<T> a, Right<T> b, T* c, int64_t c_stride, int64_t rows, int64_t cols, int64_t depth,
            bool accumulate, Ahead ahead) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t steps = depth - k < kDepth ? depth - k : kDepth;
    for (int64_t q = 0; q * kPanel<T> < cols; ++q) {
      const T* panel = b.data + q * b.panel_stride + k * b.depth_stride;
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        const T* first = a.data + i * a.row_stride + k * a.depth_stride;
        T* out = c + i * c_stride + q * kPanel<T>;
        const int64_t left = rows - i;
        const uintptr_t next = ahead.first < ahead.last ? ahead.first : reinterpret_cast<uintptr_t>(out);
        ahead.first += steps / kStepsPerLine * kCacheLine;
        if (a.row_stride == 1) {
          block_of<T, kBlockRows, true>(left, first, 1, a.depth_stride, panel, b.depth_stride, steps, out,
                                        c_stride, accumulate || k > 0, next);
        } else {
          block_of<T, kBlockRows, false>(left, first, a.row_stride, 1, panel, b.depth_stride, steps, out, c_stride,
                                         accumulate || k > 0, next);
        }
      }
    }
  }
}

template <typename T>
void pack_transposed(const T* v, int64_t rows, int64_t d, int64_t stride, T* to) {
  constexpr int64_t kColumns = 8;  // at a time, so that what is read and what is written is in adjacent numbers
  for (int64_t first = 0; first < rows; first += kPanel<T>, to += d * kPanel<T>) {
    const int64_t some = rows - first < kPanel<T> ? rows - first : kPanel<T>;
    for (int64_t k = 0; k < d; k += kColumns) {
      const int64_t columns = d - k < kColumns ? d - k : kColumns;
      for (int64_t l = 0; l < kPanel<T>; ++l) {
        const T* row = v + (first + l) * stride + k;
        T* out = to + k * kPanel<T> + l;
        for (int64_t c = 0; c < columns; ++c) out[c * kPanel<T>] = l < some ? row[c] : T(0);
      }
    }
  }
}

template <typename T>
void pack(const T* v, int64_t rows, int64_t width, int64_t stride, T* to, int64_t panel_stride) {
  for (int64_t k = 0; k < width; k += kPanel<T>, to += panel_stride) {
    for (int64_t j = 0; j < rows; ++j) {
      for (int64_t l = 0; l < kPanel<T>; l += kLanes<T>) {
        *reinterpret_cast<Vector<T>*>(to + j * kPanel<T> + l) =
            *reinterpret_cast<const Vector<T>*>(v + j * stride + k + l);
      }
    }
  }
}

// -- rows --------------------------------------------------------------------------------------------------------

// Four chains of sums: one would wait for each addition.
template <typename T>
inline T sum_of_squares(const T* v, int64_t d) {
  Vector<T> sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kLanes<T> <= d; k += 4 * kLanes<T>) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto part = *reinterpret_cast<const Vector<T>*>(v + k + c * kLanes<T>);
      sums[c] += part * part;
    }
  }
  const Vector<T> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += total[l];
  for (; k < d; ++k) sum += v[k] * v[k];
  return sum;
}

template <typename T>
inline T inverse_norm(const T* v, int64_t d) {
  T norm = sqrt(sum_of_squares(v, d));
  return 1 / (norm < T(kEps) ? T(kEps) : norm);
}

template <typename T>
void inverse_norms(const T* w, int64_t rows, int64_t d, int64_t stride, T* inv_norm) {
  for (int64_t j = 0; j < rows; ++j) inv_norm[j] = inverse_norm(w + j * stride, d);
}

template <typename T>
void normalize(const T* x, int64_t d, T* x_hat, T* inv_norm) {
  *inv_norm = inverse_norm(x, d);
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) x_hat[k] = x[k] * *inv_norm;
}

inline float from_bfloat16(uint16_t h) { return bit_cast<float>(uint32_t{h} << 16); }

inline uint16_t to_bfloat16(float v) {
  uint32_t bits = bit_cast<uint32_t>(v);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

// The exponent and mantissa of a half, moved into a float's place, are off by the difference of the biases, 2^112;
// multiplying puts that right for subnormal halves too.
inline float from_float16(uint16_t h) {
  uint32_t magnitude = uint32_t{h} & 0x7fff;
  float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  uint32_t finite = bit_cast<uint32_t>(scaled);
  uint32_t bits = magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : finite;
  return bit_cast<float>(bits | (uint32_t{h} & 0x8000) << 16);
}

inline uint16_t to_float16(float v) {
  uint32_t sign = bit_cast<uint32_t>(v) >> 16 & 0x8000;
  uint32_t bits = bit_cast<uint32_t>(v) & 0x7fffffff;
  uint32_t normal = (bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13;
  // adding 0.5 puts the last bit of a subnormal half, 2^-24, at the last bit of the float, which rounds
  uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + 0.5f) - bit_cast<uint32_t>(0.5f);
  uint32_t h = bits < 0x38800000 ? subnormal : normal;  // 2^-14, the smallest normal half
  h = bits >= 0x477ff000 ? 0x7c00 : h;                  // 65520 and above round to infinity
  h = bits > 0x7f800000 ? 0x7e00 : h;
  return static_cast<uint16_t>(h | sign);
}

template <typename T>
void load(const void* from, DType dtype, int64_t n, T* __restrict to) {
  if (dtype == DType::kFloat64) {
    const auto* source = static_cast<const double*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = static_cast<T>(source[k]);
  } else if (dtype == DType::kFloat32) {
    const auto* source = static_cast<const float*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = source[k];
  } else if (dtype == DType::kBFloat16) {
    const auto* source = static_cast<const uint16_t*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = from_bfloat16(source[k]);
  } else {
    const auto* source = static_cast<const uint16_t*>(from);
    for (int64_t k = 0; k < n; ++k) to[k] = from_float16(source[k]);
  }
}

template <typename T>
void store(const T* __restrict from, int64_t n, void* to, DType dtype) {
  if (dtype == DType::kFloat64) {
    auto* target = static_cast<double*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = from[k];
  } else if (dtype == DType::kFloat32) {
    auto* target = static_cast<float*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = static_cast<float>(from[k]);
  } else if (dtype == DType::kBFloat16) {
    auto* target = static_cast<uint16_t*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = to_bfloat16(static_cast<float>(from[k]));
  } else {
    auto* target = static_cast<uint16_t*>(to);
    for (int64_t k = 0; k < n; ++k) target[k] = to_float16(static_cast<float>(from[k]));
  }
}

// -- tiles -------------------------------------------------------------------------------------------------------

// Targets as rows of a tile, -1 for those outside; in T, so that comparing them takes a lane as wide as a number.
template <typename T>
void targets_in_tile(const int64_t* y, int64_t n, int64_t first_class, int64_t classes, T* target) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t j = y[i] - first_class;
    target[i] = y[i] >= 0 && j >= 0 && j < classes ? static_cast<T>(j) : T(-1);
  }
}

// N(cos) and N'(cos) for a negative of sample i.
template <bool kReshaped, typename T>
inline T reshape(const Negatives<T>& by, int64_t i, T cos) {
  if constexpr (!kReshaped) return cos;
  return cos > by.tau[i] ? (by.q * cos + by.a) * cos + by.b : cos;
}
template <bool kReshaped, typename T>
inline T slope(const Negatives<T>& by, int64_t i, T cos) {
  if constexpr (!kReshaped) return 1;
  return cos > by.tau[i] ? 2 * by.q * cos + by.a : T(1);
}

// The first half of a tile's logsumexp: z becomes N(cos), or stays cos for its entries to be kept, and top the
// running maximum of N(cos).
template <typename T, bool kReshaped, bool kKeeps>
inline void cosines_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                       int64_t first_class, Negatives<T> negatives, const T* row_max, T* max_cos, T* target_cos,
                       T* top) {
  T target[kTileRows];
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t i = 0; i < n; ++i) {
    const auto j = static_cast<int64_t>(target[i]);
    if (j >= 0) target_cos[i] = z[j * stride + i] * inv_norm[j];
    top[i] = row_max[i];
  }
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T cos = target[i] == here ? T(-__builtin_inf()) : row[i] * inv;
      if constexpr (kReshaped) max_cos[i] = cos > max_cos[i] ? cos : max_cos[i];
      const T shaped = reshape<kReshaped>(negatives, i, cos);
      row[i] = kKeeps ? cos : shaped;
      top[i] = shaped > top[i] ? shaped : top[i];  // a nan is passed over here and enters through the sum
    }
  }
}

template <typename T, bool kReshaped>
void forward_tile_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                     int64_t first_class, const T* s, Negatives<T> negatives, T* row_max, T* max_cos,
                     double* row_sum, T* target_cos) {
  T top[kTileRows], sum[kTileRows] = {};
  cosines_of<T, kReshaped, false>(z, classes, n, stride, inv_norm, y, first_class, negatives, row_max, max_cos,
                                  target_cos, top);
  for (int64_t j = 0; j < classes; ++j) {
    const T* cos = z + j * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += exp(s[i] * (cos[i] - top[i]));
  }
  for (int64_t i = 0; i < n; ++i) {
    row_sum[i] = row_sum[i] * exp(s[i] * (row_max[i] - top[i])) + sum[i];
    row_max[i] = top[i];
  }
}

template <typename T>
void forward_tile(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                  int64_t first_class, const T* s, const Negatives<T>& negatives, T* row_max, T* max_cos,
                  double* row_sum, T* target_cos) {
  (negatives.tau ? forward_tile_of<T, true> : forward_tile_of<T, false>)(z, classes, n, stride, inv_norm, y,
                                                                         first_class, s, negatives, row_max,
                                                                         max_cos, row_sum, target_cos);
}

template <typename T, bool kReshaped>
void backward_tile_of(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                      int64_t first_class, const T* s, Negatives<T> negatives, const T* top, const T* log_sum,
                      const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale) {
  T target[kTileRows], dot[kTileRows] = {}, ds[kTileRows] = {};
  targets_in_tile(y, n, first_class, classes, target);
  for (int64_t j = 0; j < classes; ++j) {
    T* row = z + j * stride;
    const T inv = inv_norm[j], here = static_cast<T>(j);
    T col = 0;
#pragma omp simd reduction(+ : col)
    for (int64_t i = 0; i < n; ++i) {
      const bool is_target = target[i] == here;
      const T cos = row[i] * inv;  // rounded as in forward: other uses than the difference keep it out of an fma
      const T shaped = reshape<kReshaped>(negatives, i, cos);
      const T g_neg = g_lse[i] * exp(s[i] * (shaped - top[i]) - log_sum[i]);
      const T p = is_target ? T(0) : g_neg;
      const T g = is_target ? g_cos[i] : s[i] * p * slope<kReshaped>(negatives, i, cos);
      ds[i] += p * shaped;
      dot[i] += g * cos;
      col += g * cos;
      row[i] = g * inv;
    }
    col_dot[j] += col;
  }
  for (int64_t i = 0; i < n; ++i) {
    row_dot[i] += dot[i];
    dscale[i] += ds[i];
  }
}

constexpr float kCosineStep = 1.0f / 32767;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer

inline void keep_row(const float* z, int64_t n, float inv_norm, int16_t* kept) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float shifted = z[i] * inv_norm * 32767.0f + kRoundToInteger;
    kept[i] = static_cast<int16_t>(bit_cast<uint32_t>(shifted));
  }
}
inline void recall_row(const int16_t* kept, int64_t n, float inv_norm, float* z) {
  const float step = inv_norm > 0 ? kCosineStep / inv_norm : 0.0f;  // a norm that overflows makes cosines of 0
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) z[i] = static_cast<float>(kept[i]) * step;
}
inline void keep_row(const double* z, int64_t n, double, double* kept) {
  for (int64_t i = 0; i < n; ++i) kept[i] = z[i];
}
inline void recall_row(const double* kept, int64_t n, double, double* z) {
  for (int64_t i = 0; i < n; ++i) z[i] = kept[i];
}

template <typename T>
struct KeptOf {
  typedef T type;
};
template <>
struct KeptOf<float> {
  typedef int16_t type;
};
template <typename T>
using Kept = typename KeptOf<T>::type;

template <typename T>
void keep_cosines(const T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, void* kept) {
  for (int64_t j = 0; j < classes; ++j)
    keep_row(z + j * stride, n, inv_norm[j], static_cast<Kept<T>*>(kept) + j * n);
}

template <typename T>
void recall_cosines(const void* kept, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, T* z) {
  for (int64_t j = 0; j < classes; ++j) {
    recall_row(static_cast<const Kept<T>*>(kept) + j * n, n, inv_norm[j], z + j * stride);
  }
}

template <typename T>
void backward_tile(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                   int64_t first_class, const T* s, const Negatives<T>& negatives, const T* top, const T* log_sum,
                   const T* g_lse, const T* g_cos, T* col_dot, double* row_dot, double* dscale) {
  (negatives.tau ? backward_tile_of<T, true> : backward_tile_of<T, false>)(z, classes, n, stride, inv_norm, y,
                                                                           first_class, s, negatives, top, log_sum,
                                                                           g_lse, g_cos, col_dot, row_dot, dscale);
}

template <typename T>
void project(T* __restrict dw, const T* __restrict w, int64_t d, T projection) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) dw[k] -= projection * w[k];
}

template <typename T>
T gradient_norm(RowGradient<T> g, const T* __restrict w, int64_t d) {
  const T* __restrict dw = g.dw;
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * (dw[k] - g.projection * w[k]);
    sum += v * v;
  }
  return sqrt(sum);
}

template <typename T>
void sgd(RowGradient<T> g, T* __restrict w, T* __restrict momentum, int64_t d, const SgdStep<T>& step) {
  const T* __restrict dw = g.dw;
  const SgdStep<T> s = step;
  if (momentum == nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) {
      w[k] -= s.lr * (g.factor * (dw[k] - g.projection * w[k]) + s.weight_decay * w[k]);
    }
    return;
  }
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * (dw[k] - g.projection * w[k]) + s.weight_decay * w[k];
    const T mean = s.momentum * momentum[k] + s.fresh * v;
    momentum[k] = mean;
    w[k] -= s.lr * (s.from_g * v + s.from_mean * mean);
  }
}

template <typename T, bool kMax>
void adamw_row(RowGradient<T> g, T* __restrict w, T* __restrict mean, T* __restrict square,
               T* __restrict max_square, int64_t d, const AdamWStep<T>& step) {
  const T* __restrict dw = g.dw;
  const AdamWStep<T> s = step;
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T v = g.factor * (dw[k] - g.projection * w[k]);
    const T m = mean[k] + s.fresh1 * (v - mean[k]);
    T q = s.beta2 * square[k] + s.fresh2 * v * v;
    mean[k] = m;
    square[k] = q;
    if (kMax) max_square[k] = q = max_square[k] > q ? max_square[k] : q;
    w[k] = s.kept * w[k] - s.step_size * m / (sqrt(q) / s.root_correction + s.eps);
  }
}

template <typename T>
void adamw(RowGradient<T> g, T* w, T* mean, T* square, T* max_square, int64_t d, const AdamWStep<T>& step) {
  (max_square ? adamw_row<T, true> : adamw_row<T, false>)(g, w, mean, square, max_square, d, step);
}

template <typename T>
void finish_dx(const T* dx_hat, int64_t parts, int64_t part_stride, const T* x, T row_dot, T inv_norm, int64_t d,
               T* dx) {
  const T dot = inv_norm >= 1 / T(kEps) ? 0 : row_dot;
  for (int64_t k = 0; k < d; ++k) {
    T sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += dx_hat[part * part_stride + k];
    dx[k] = (sum - dot * (x[k] * inv_norm)) * inv_norm;
  }
}

// -- random numbers ----------------------------------------------------------------------------------------------

// ln(x) for x in (0, 1]: x = 2^e (1 + t) with 1 + t in [sqrt(1/2), sqrt(2)), then t - t^2/2 + t^3 r(t) with r the
// minimax fit of degree 5 (absolute error 6e-8).
inline float log(float x) {
  uint32_t bits = bit_cast<uint32_t>(x);
  uint32_t shifted = bits - bit_cast<uint32_t>(0.70710678f);
  auto e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  float t = bit_cast<float>((shifted & 0x7fffff) + bit_cast<uint32_t>(0.70710678f)) - 1.0f;
  float r = -1.022421047e-1f;
  r = r * t + 1.614119112e-1f;
  r = r * t + -1.716690958e-1f;
  r = r * t + 1.991023719e-1f;
  r = r * t + -2.498057336e-1f;
  r = r * t + 3.333469033e-1f;
  return e * 0.69314718f + (t - 0.5f * t * t + t * t * t * r);
}

// sin and cos of 2 pi (bits / 2^32): the top two bits, rounded, choose a quadrant; the rest is an angle of at most
// pi/4 either side, for which the minimax fits in v^2 have errors 2e-9 and 3e-8.
inline void sin_cos(uint32_t bits, float* sine, float* cosine) {
  uint32_t quadrant = (bits + 0x20000000u) >> 30;
  float v = static_cast<float>(static_cast<int32_t>(bits - (quadrant << 30))) * 0x1p-29f;  // [-1, 1) for pi/4
  float u = v * v;
  float a = v * (7.853981853e-1f + u * (-8.074543625e-2f + u * (2.490007086e-3f + u * -3.595450835e-5f)));
  float b = 1.0f + u * (-3.084242642e-1f + u * (1.584991440e-2f + u * -3.188805131e-4f));
  float si = (quadrant & 1) ? b : a, co = (quadrant & 1) ? a : b;
  *sine = (quadrant & 2) ? -si : si;
  *cosine = ((quadrant + 1) & 2) ? -co : co;
}

// The four words of each counter.
struct Words {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
};

// Philox on a group of counters, key = seed.
inline void philox(uint64_t seed, uint64_t group, uint64_t stream, Words* words) {
  uint32_t *c0 = words->c0, *c1 = words->c1, *c2 = words->c2, *c3 = words->c3;
  for (int64_t l = 0; l < kCounters; ++l) {
    uint64_t counter = group * kCounters + l;
    c0[l] = static_cast<uint32_t>(counter);
    c1[l] = static_cast<uint32_t>(counter >> 32);
    c2[l] = static_cast<uint32_t>(stream);
    c3[l] = static_cast<uint32_t>(stream >> 32);
  }
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxStep0, k1 += kPhiloxStep1) {
#pragma omp simd
    for (int64_t l = 0; l < kCounters; ++l) philox_round(c0[l], c1[l], c2[l], c3[l], k0, k1);
  }
}

// Box-Muller on the words of stream 0.
void normal(uint64_t seed, uint64_t group, int64_t n, float std, float* to) {
  Words words;
  philox(seed, group, 0, &words);
  float out[4 * kCounters];
  const uint32_t* pairs[2][2] = {{words.c0, words.c1}, {words.c2, words.c3}};
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t *first = pairs[pair][0], *second = pairs[pair][1];
    float *sines = out + 2 * pair * kCounters, *cosines = sines + kCounters;
#pragma omp simd
    for (int64_t l = 0; l < kCounters; ++l) {
      float uniform = static_cast<float>(static_cast<int32_t>(first[l] >> 1)) * 0x1p-31f + 0x1p-32f;  // (0, 1]
      float radius = std * sqrt(-2.0f * log(uniform));
      float sine, cosine;
      sin_cos(second[l], &sine, &cosine);
      sines[l] = radius * sine;
      cosines[l] = radius * cosine;
    }
  }
  __builtin_memcpy(to, out, sizeof(float) * static_cast<size_t>(n < 4 * kCounters ? n : 4 * kCounters));
}

template <typename T>
void store_stochastic(const T* __restrict from, int64_t d, void* to, uint64_t seed, uint64_t stream, int64_t row) {
  auto* __restrict out = static_cast<uint16_t*>(to);
  const int64_t groups = (d + kNoise - 1) / kNoise;
  for (int64_t group = 0; group < groups; ++group) {
    Words words;
    philox(seed, static_cast<uint64_t>(row * groups + group), stream, &words);
    uint16_t noise[kNoise];
    __builtin_memcpy(noise, &words, sizeof(noise));
    const int64_t first = group * kNoise, count = d - first < kNoise ? d - first : kNoise;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      out[first + k] = round_stochastically(static_cast<float>(from[first + k]), noise[k]);
    }
  }
}

// -- entries that are kept for a sparse backward -----------------------------------------------------------------

#if defined(__AVX512F__)
// Keeps the cosines of 16 that are above cut as they are shaped; returns how many that are.
inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, __m512i places, float* kept,
                           Place* to) {
  const __mmask16 above = _mm512_cmp_ps_mask(_mm512_loadu_ps(shaped), _mm512_loadu_ps(cut), _CMP_GT_OQ);
  if (above == 0) return 0;
  const __m512i chosen = _mm512_maskz_compress_epi32(above, places);
  _mm512_storeu_ps(kept, _mm512_maskz_compress_ps(above, _mm512_loadu_ps(cos)));
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, chosen));
  return __builtin_popcount(above);
}

// Their places are place, place + 1, ...
inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, uint32_t place, float* kept,
                           Place* to) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(place)), lanes);
  return keep_vector(cos, shaped, cut, places, kept, to);
}

inline int64_t keep_vector(const float* cos, const float* shaped, const float* cut, const Place* places,
                           float* kept, Place* to) {
  const __m256i own = _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(places));
  return keep_vector(cos, shaped, cut, _mm512_maskz_cvtepu16_epi32(0xffff, own), kept, to);
}
#endif

template <typename T>
inline int64_t keep_vector(const T* cos, const T* shaped, const T* cut, uint32_t place, T* kept, Place* places) {
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int l = 0; l < 16; ++l) any |= shaped[l] > cut[l];
  if (any == 0) return 0;
  int64_t count = 0;
  for (uint32_t l = 0; l < 16; ++l) {
    kept[count] = cos[l];
    places[count] = static_cast<Place>(place + l);
    count += shaped[l] > cut[l];
  }
  return count;
}

template <typename T>
inline int64_t keep_vector(const T* cos, const T* shaped, const T* cut, const Place* places, T* kept, Place* to) {
  int64_t count = 0;
  for (int64_t l = 0; l < 16; ++l) {  // kept and `to` may be where the cosines and the places are
    const T value = cos[l];
    const Place place = places[l];
    const bool above = shaped[l] > cut[l];
    kept[count] = value;
    to[count] = place;
    count += above;
  }
  return count;
}

template <typename T, bool kReshaped>
int64_t forward_and_keep(T* z, int64_t classes, int64_t n, int64_t stride, const T* inv_norm, const int64_t* y,
                         int64_t first_class, const T* s, Negatives<T> negatives, T* row_max, T* max_cos,
                         double* row_sum, T* target_cos, const T* cut, double* tail, T* kept, Place* place) {
  T top[kTileRows], sum[kTileRows] = {}, dropped[kTileRows] = {}, above[kTileRows], shaped_row[kTileRows];
  for (int64_t i = 0; i < kTileRows; ++i) above[i] = i < n ? cut[i] : T(__builtin_inf());
  cosines_of<T, kReshaped, true>(z, classes, n, stride, inv_norm, y, first_class, negatives, row_max, max_cos,
                                 target_cos, top);
  const int64_t whole = n / 16 * 16;
  int64_t count = 0;
  for (int64_t j = 0; j < classes; ++j) {
    const T *cos = z + j * stride, *shaped = kReshaped ? shaped_row : cos;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T value = reshape<kReshaped>(negatives, i, cos[i]), e = exp(s[i] * (value - top[i]));
      sum[i] += e;
      dropped[i] += value > above[i] ? T(0) : e;  // a nan is not above, and enters
      if constexpr (kReshaped) shaped_row[i] = value;
    }
    const auto first = static_cast<uint32_t>(j << 8);
    for (int64_t i = 0; i < whole; i += 16) {
      count += keep_vector(cos + i, shaped + i, above + i, first + static_cast<uint32_t>(i), kept + count,
                           place + count);
    }
    for (int64_t i = whole; i < n; ++i) {
      kept[count] = cos[i];
      place[count] = static_cast<Place>((j << 8) + i);
      count += shaped[i] > above[i];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    const T shrink = exp(s[i] * (row_max[i] - top[i]));
    row_sum[i] = row_sum[i] * shrink + sum[i];
    tail[i] = tail[i] * shrink + dropped[i];
    row_max[i] = top[i];
  }
  return count;
}

// The loops over entries compute kBatch of them with vectors, which read the samples' numbers by index, and then
// add up one after the other.
constexpr int64_t kBatch = 64;

template <typename T, bool kReshaped>
void tally(const T* kept, const Place* place, int64_t count, const T* s, Negatives<T> negatives, const T* top,
           uint32_t* bins) {
  int32_t bin[kBatch];
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
#pragma omp simd
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T shaped = reshape<kReshaped>(negatives, i, kept[first + k]);
      const T distance = s[i] * (top[i] - shaped) * T(kBinsPerNat);
      const T near = distance < T(kBins - 1) ? distance : T(kBins - 1);  // so that nan is far
      bin[k] = i * static_cast<int32_t>(kBins) + static_cast<int32_t>(near > 0 ? near : T(0));
    }
    for (int64_t k = 0; k < some; ++k) ++bins[bin[k]];
  }
}

template <typename T, bool kReshaped>
int64_t prune(const T* kept, const Place* place, int64_t count, const T* cut, const T* s, Negatives<T> negatives,
              const T* top, double* tail, uint32_t* row_count, T* to_kept, Place* to_place) {
  T limit[kBatch], e[kBatch], shaped_batch[kBatch];
  int32_t below[kBatch];
  int64_t left = 0;
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
    const T* shaped = kReshaped ? shaped_batch : kept + first;
    int32_t any = 0;
#pragma omp simd reduction(+ : any)
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T value = reshape<kReshaped>(negatives, i, kept[first + k]);
      const T least = cut[i], mass = exp(s[i] * (value - top[i]));
      limit[k] = least;
      e[k] = value > least ? T(0) : mass;
      below[k] = value > least ? 0 : 1;
      any += value > least ? 0 : 1;
      if constexpr (kReshaped) shaped_batch[k] = value;
    }
    for (int64_t k = 0; any != 0 && k < some; ++k) {
      const int64_t i = place[first + k] & 255;
      tail[i] += e[k];
      row_count[i] -= static_cast<uint32_t>(below[k]);
    }
    int64_t k = 0;
    for (; k + 16 <= some; k += 16) {
      left +=
          keep_vector(kept + first + k, shaped + k, limit + k, place + first + k, to_kept + left, to_place + left);
    }
    for (; k < some; ++k) {
      const bool above = shaped[k] > limit[k];
      to_kept[left] = kept[first + k];
      to_place[left] = place[first + k];
      left += above;
    }
  }
  return left;
}

template <typename T, bool kReshaped>
int64_t gradients(const T* kept, const Place* place, int64_t count, const T* inv_norm, const T* s,
                  Negatives<T> negatives, const T* top, const T* log_sum, const T* g_lse, T* col_dot,
                  double* row_dot, double* dscale, T* g, uint8_t* classes, uint8_t* samples) {
  T p[kBatch];
  int64_t left = 0;
  for (int64_t first = 0; first < count; first += kBatch) {
    const int64_t some = count - first < kBatch ? count - first : kBatch;
#pragma omp simd
    for (int64_t k = 0; k < some; ++k) {
      const int32_t i = place[first + k] & 255;
      const T shaped = reshape<kReshaped>(negatives, i, kept[first + k]);
      p[k] = g_lse[i] * exp(s[i] * (shaped - top[i]) - log_sum[i]);
    }
    for (int64_t k = 0; k < some; ++k) {
      const int64_t i = place[first + k] & 255, j = place[first + k] >> 8;
      if (g_lse[i] == 0) continue;
      const T cos = kept[first + k], steep = p[k] * slope<kReshaped>(negatives, i, cos), along = steep * cos;
      dscale[i] += p[k] * reshape<kReshaped>(negatives, i, cos);
      col_dot[j] += s[i] * along;
      if constexpr (kReshaped) row_dot[i] += s[i] * along;
      g[left] = s[i] * steep * inv_norm[j];
      classes[left] = static_cast<uint8_t>(j);
      samples[left++] = static_cast<uint8_t>(i);
    }
  }
  return left;
}

// kVectors of the sum stay in registers while the rows pass by, the next on its way from L2.
template <typename T, int kVectors>
inline void weighted_sum_of(const T* rows, int64_t stride, const uint8_t* index, const T* factor, int64_t count,
                            T* to, bool accumulate) {
  Vector<T> sum[kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* row = rows + index[k] * stride;
    const T* next = rows + index[k + 1 < count ? k + 1 : k] * stride;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(next + v * kLanes<T>);
      sum[v] += factor[k] * *reinterpret_cast<const Vector<T>*>(row + v * kLanes<T>);
    }
  }
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    auto* out = reinterpret_cast<Vector<T>*>(to + v * kLanes<T>);
    *out = accumulate ? *out + sum[v] : sum[v];
  }
}

template <typename T>
void weighted_sum(const T* rows, int64_t stride, const uint8_t* index, const T* factor, int64_t count,
                  int64_t width, T* to, bool accumulate) {
  constexpr int kMany = kVectorBytes == 64 ? 16 : 8;
  int64_t k = 0;
  for (; k + kMany * kLanes<T> <= width; k += kMany * kLanes<T>) {
    weighted_sum_of<T, kMany>(rows + k, stride, index, factor, count, to + k, accumulate);
  }
  for (; k < width; k += kPanel<T>) {
    weighted_sum_of<T, 2>(rows + k, stride, index, factor, count, to + k, accumulate);
  }
}

template <typename T, bool kReshaped>
constexpr SparseKernels<T> kSparse{forward_and_keep<T, kReshaped>, tally<T, kReshaped>, prune<T, kReshaped>,
                                   gradients<T, kReshaped>, weighted_sum<T>};

template <typename T>
constexpr Kernels<T> kTable{{kPanel<T>, 1, matmul<T>, pack_transposed<T>, pack<T>},
                            normalize<T>,
                            inverse_norms<T>,
                            load<T>,
                            store<T>,
                            forward_tile<T>,
                            backward_tile<T>,
                            keep_cosines<T>,
                            recall_cosines<T>,
                            project<T>,
                            gradient_norm<T>,
                            sgd<T>,
                            adamw<T>,
                            store_stochastic<T>,
                            finish_dx<T>,
                            normal,
                            {kSparse<T, false>, kSparse<T, true>}};

}  // namespace

template <typename T>
const Kernels<T>& table() {
  return kTable<T>;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace cosface::COSFACE_ISA
