// Products of bfloat16 numbers with float sums, compiled once for every unit that makes them, with COSFACE_ISA
// naming its namespace; and once in plain loops for each, bit for bit what the unit computes, which is how the
// rest is tested on a processor without it. As kernels.cpp, nothing here may call an inline function of the
// standard library.
//
// Two numbers of adjacent depths are a pair of 32 bits. a is read by rows, in place; b is made in panels of 32
// columns, pair by pair.
#include "kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace cosface::COSFACE_ISA {
namespace {

constexpr int64_t kPanel = 32, kDepthStep = 32;  // columns, and numbers of a row in a tile of 16 x 64 bytes
constexpr int64_t kCacheLine = 64;

inline uint32_t pair(const BFloat16* v) {
  uint32_t both;
  __builtin_memcpy(&both, v, sizeof(both));
  return both;
}

inline float value(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}
inline float low(uint32_t pair) { return value(pair << 16); }
inline float high(uint32_t pair) { return value(pair & 0xffff0000); }

inline uint32_t rounded(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return v != v ? 0x7fc0u : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#if defined(__AVX512BF16__)
// Numbers below the normal ones become 0, as which a product takes them.
inline __m256i rounded(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#endif

#if defined(__AMX_BF16__)

// -- AMX: a block of 32 x 32 sums in four tiles ------------------------------------------------------------------

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1 are the sums of the upper rows of a block, 2 and 3 those of the lower; 4 and 5 hold a, 6 and 7 b.
inline void configure(int64_t upper, int64_t lower) {
  TileShapes shapes;
  const int64_t rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int t = 0; t < 8; ++t) {
    if (rows[t] == 0) continue;
    shapes.rows[t] = static_cast<uint8_t>(rows[t]);
    shapes.row_bytes[t] = 64;
  }
  asm volatile("" ::"m"(shapes) : "memory");  // the intrinsic names its first bytes alone as what it reads
  _tile_loadconfig(&shapes);
}

constexpr int64_t kLinesPerStep = 4;  // what a product with 256 samples needs to fetch one tile during another

// kLower: there are rows in the lower tiles. kFetches: `ahead` is to be fetched meanwhile.
template <bool kLower, bool kFetches>
inline void block(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t depth, float* c,
                  int64_t c_stride, bool accumulate, uintptr_t ahead) {
  const int64_t a_bytes = a_stride * 2, c_bytes = c_stride * 4;
  const BFloat16* const a_lower = a + 16 * a_stride;
  float* const c_lower = c + 16 * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kLower) {
      _tile_loadd(2, c_lower, c_bytes);
      _tile_loadd(3, c_lower + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < depth; k += kDepthStep) {
    for (int line = 0; kFetches && line < kLinesPerStep; ++line, ahead += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead), 0, 2);
    }
    const BFloat16* pairs = b + k * kPanel;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, pairs, kPanel * 4);
    _tile_loadd(7, pairs + kPanel, kPanel * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kLower) {
      _tile_loadd(5, a_lower + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kLower) {
    _tile_stored(2, c_lower, c_bytes);
    _tile_stored(3, c_lower + 16, c_bytes);
  }
}

template <bool kLower>
inline void multiply(const Left<BFloat16>& a, const Right<BFloat16>& b, float* c, int64_t c_stride, int64_t first,
                     int64_t last, int64_t upper, int64_t lower, int64_t cols, int64_t depth, bool accumulate,
                     Ahead* ahead) {
  if (first == last) return;
  configure(upper, lower);
  for (int64_t q = 0; q * kPanel < cols; ++q) {
    const BFloat16* panel = b.data + q * b.panel_stride;
    for (int64_t i = first; i < last; i += upper + lower) {
      const BFloat16* rows = a.data + i * a.row_stride;
      float* out = c + i * c_stride + q * kPanel;
      if (ahead->first < ahead->last) {
        block<kLower, true>(rows, a.row_stride, panel, depth, out, c_stride, accumulate, ahead->first);
        ahead->first += depth / kDepthStep * kLinesPerStep * kCacheLine;
      } else {
        block<kLower, false>(rows, a.row_stride, panel, depth, out, c_stride, accumulate, 0);
      }
      for (int64_t r = 0; b.factor != nullptr && r < upper + lower; ++r) {
#pragma omp simd
        for (int64_t l = 0; l < kPanel; ++l) out[r * c_stride + l] *= b.factor[q * kPanel + l];
      }
    }
  }
}

void matmul(Left<BFloat16> a, Right<BFloat16> b, float* c, int64_t c_stride, int64_t rows, int64_t cols,
            int64_t depth, bool accumulate, Ahead ahead) {
  const int64_t whole = rows / 32 * 32, upper = rows - whole < 16 ? rows - whole : 16,
                lower = rows - whole - upper;
  multiply<true>(a, b, c, c_stride, 0, whole, 16, 16, cols, depth, accumulate, &ahead);
  if (lower > 0) {
    multiply<true>(a, b, c, c_stride, whole, rows, upper, lower, cols, depth, accumulate, &ahead);
  } else {
    multiply<false>(a, b, c, c_stride, whole, rows, upper, 0, cols, depth, accumulate, &ahead);
  }
  _tile_release();
}

#else

// -- a block of kRows x 32 sums ----------------------------------------------------------------------------------

#if defined(__AVX512BF16__)

constexpr int kBlockRows = 14;  // 28 + 2 of 32 registers

template <int kRows>
inline void block(const BFloat16* a, int64_t a_stride, const BFloat16* b, int64_t depth, float* c,
                  int64_t c_stride, bool accumulate, const float* factor, uintptr_t ahead) {
  constexpr int64_t kPairsPerLine = 8;
  __m512 sum[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sum[r][0] = sum[r][1] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; k += 2, b += 2 * kPanel) {
    if (k / 2 % kPairsPerLine == 0) {
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + k / 2 / kPairsPerLine * kCacheLine), 0, 2);
    }
    const __m512bh b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    const __m512bh b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kPanel));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair(a + r * a_stride + k))));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], v, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], v, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half) {
      float* const out = c + r * c_stride + 16 * half;
      // Added at the end: of millions of products each would be rounded as coarsely as what c has become.
      const __m512 all = accumulate ? _mm512_loadu_ps(out) + sum[r][half] : sum[r][half];
      _mm512_storeu_ps(out, factor ? all * _mm512_loadu_ps(factor + 16 * half) : all);
    }
  }
}

#else

constexpr int kBlockRows = 1;

// Both units take numbers below the normal ones for 0, in and out, and round to the nearest.
inline float flushed(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return value((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}
inline float fused(float a, float b, float sum) { return flushed(__builtin_fmaf(flushed(a), flushed(b), sum)); }

template <int kRows>
inline void block(const BFloat16* a, int64_t, const BFloat16* b, int64_t depth, float* c, int64_t, bool accumulate,
                  const float* factor, uintptr_t) {
  static_assert(kRows == 1);
  float sum[kPanel];
#if defined(COSFACE_EMULATES_AMX)
  for (int64_t l = 0; l < kPanel; ++l) sum[l] = accumulate ? flushed(c[l]) : 0.0f;
#else
  for (int64_t l = 0; l < kPanel; ++l) sum[l] = 0.0f;
#endif
  for (int64_t step = 0; step < depth; step += kDepthStep) {
#if defined(COSFACE_EMULATES_AMX)
    float lows[kPanel] = {}, highs[kPanel] = {};  // of a tile, whose sum is added
#endif
    for (int64_t k = step; k < step + kDepthStep; k += 2) {
      const uint32_t v = pair(a + k);
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        const uint32_t w = pair(b + (k / 2 * kPanel + l) * 2);
#if defined(COSFACE_EMULATES_AMX)
        lows[l] = fused(low(v), low(w), lows[l]);
        highs[l] = fused(high(v), high(w), highs[l]);
#else
        sum[l] = fused(low(v), low(w), fused(high(v), high(w), sum[l]));
#endif
      }
    }
#if defined(COSFACE_EMULATES_AMX)
    for (int64_t l = 0; l < kPanel; ++l) sum[l] = flushed(sum[l] + flushed(lows[l] + highs[l]));
#endif
  }
  for (int64_t l = 0; l < kPanel; ++l) {
#if !defined(COSFACE_EMULATES_AMX)
    if (accumulate) sum[l] += c[l];
#endif
    c[l] = factor ? sum[l] * factor[l] : sum[l];
  }
}

#endif

// block() for the rows that are left over: rows in [1, kRows].
template <int kRows, typename... Args>
inline void block_of(int64_t rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return block_of<kRows - 1>(rows, args...);
  }
  block<kRows>(args...);
}

void matmul(Left<BFloat16> a, Right<BFloat16> b, float* c, int64_t c_stride, int64_t rows, int64_t cols,
            int64_t depth, bool accumulate, Ahead ahead) {
  constexpr int64_t kDepth = 256;  // of a panel, which stays in an L1 of 32 KiB
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t some = depth - k < kDepth ? depth - k : kDepth;
    const float* const factor = k + some < depth ? nullptr : b.factor;
    for (int64_t q = 0; q * kPanel < cols; ++q) {
      const BFloat16* const panel = b.data + q * b.panel_stride + k * kPanel;
      for (int64_t i = 0; i < rows; i += kBlockRows) {
        float* out = c + i * c_stride + q * kPanel;
        const uintptr_t next = ahead.first < ahead.last ? ahead.first : reinterpret_cast<uintptr_t>(out);
        ahead.first += some / 16 * kCacheLine;
        block_of<kBlockRows>(rows - i, a.data + i * a.row_stride + k, a.row_stride, panel, some, out, c_stride,
                             accumulate || k > 0, factor ? factor + q * kPanel : nullptr, next);
      }
    }
  }
}

#endif

// -- layouts -----------------------------------------------------------------------------------------------------

void pack_transposed(const BFloat16* v, int64_t rows, int64_t d, int64_t stride, BFloat16* to) {
  constexpr int64_t kPairs = 16;  // at a time: a cache line of each row
  for (int64_t first = 0; first < rows; first += kPanel, to += d * kPanel) {
    const int64_t some = rows - first < kPanel ? rows - first : kPanel;
    for (int64_t k = 0; k < d / 2; k += kPairs) {
      const int64_t pairs = d / 2 - k < kPairs ? d / 2 - k : kPairs;
      for (int64_t l = 0; l < kPanel; ++l) {
        for (int64_t p = k; p < k + pairs; ++p) {
          const uint32_t both = l < some ? pair(v + (first + l) * stride + 2 * p) : 0;
          __builtin_memcpy(to + (p * kPanel + l) * 2, &both, sizeof(both));
        }
      }
    }
  }
}

void pack(const BFloat16* v, int64_t rows, int64_t width, int64_t stride, BFloat16* to, int64_t panel_stride) {
  const int64_t padded = (rows + kDepthStep - 1) / kDepthStep * kDepthStep;
  for (int64_t k = 0; k < width; k += kPanel, to += panel_stride) {
    BFloat16* out = to;
    for (int64_t j = 0; j < padded; j += 2, out += 2 * kPanel) {
      const BFloat16 *even = v + j * stride + k, *odd = even + stride;
      uint32_t pairs[kPanel];
#pragma omp simd
      for (int64_t l = 0; l < kPanel; ++l) {
        const uint32_t upper = j + 1 < rows ? odd[l].bits : 0;
        pairs[l] = (j < rows ? even[l].bits : 0) | upper << 16;
      }
      __builtin_memcpy(out, pairs, sizeof(pairs));
    }
  }
}

void scale(const float* x, int64_t d, float factor, BFloat16* to) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) to[k].bits = static_cast<uint16_t>(rounded(factor * x[k]));
}

// 16 x 16 pairs, transposed from rows that are adjacent to rows that lie `stride` numbers apart.
inline void transpose(const uint32_t* from, BFloat16* to, int64_t stride) {
#if defined(__AVX512F__)
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) r[k] = _mm512_load_si512(from + 16 * k);
#pragma GCC unroll 16
  for (int k = 0; k < 16; k += 2) {
    t[k] = _mm512_maskz_unpacklo_epi32(0xffff, r[k], r[k + 1]);
    t[k + 1] = _mm512_maskz_unpackhi_epi32(0xffff, r[k], r[k + 1]);
  }
#pragma GCC unroll 16
  for (int k = 0; k < 16; k += 4) {
    r[k] = _mm512_maskz_unpacklo_epi64(0xff, t[k], t[k + 2]);
    r[k + 1] = _mm512_maskz_unpackhi_epi64(0xff, t[k], t[k + 2]);
    r[k + 2] = _mm512_maskz_unpacklo_epi64(0xff, t[k + 1], t[k + 3]);
    r[k + 3] = _mm512_maskz_unpackhi_epi64(0xff, t[k + 1], t[k + 3]);
  }
  // r[4 g + k] holds columns k, k + 4, k + 8, k + 12 of rows 4 g to 4 g + 3
#pragma GCC unroll 16
  for (int k = 0; k < 4; ++k) {
    const __m512i even = _mm512_maskz_shuffle_i32x4(0xffff, r[k], r[4 + k], 0x88),
                  odd = _mm512_maskz_shuffle_i32x4(0xffff, r[k], r[4 + k], 0xdd);
    const __m512i even2 = _mm512_maskz_shuffle_i32x4(0xffff, r[8 + k], r[12 + k], 0x88),
                  odd2 = _mm512_maskz_shuffle_i32x4(0xffff, r[8 + k], r[12 + k], 0xdd);
    _mm512_storeu_si512(to + k * stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even2, 0x88));
    _mm512_storeu_si512(to + (k + 8) * stride, _mm512_maskz_shuffle_i32x4(0xffff, even, even2, 0xdd));
    _mm512_storeu_si512(to + (k + 4) * stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd2, 0x88));
    _mm512_storeu_si512(to + (k + 12) * stride, _mm512_maskz_shuffle_i32x4(0xffff, odd, odd2, 0xdd));
  }
#else
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t k = 0; k < 16; ++k) __builtin_memcpy(to + i * stride + 2 * k, from + 16 * k + i, sizeof(*from));
  }
#endif
}

// Two rows of 16 numbers of which `count` are there: times factor, rounded, to rows; and rounded as pairs.
inline void round_rows(const float* even, const float* odd, const float* factor, int64_t count, BFloat16* to_even,
                       BFloat16* to_odd, uint32_t* pairs) {
#if defined(__AVX512BF16__)
  if (count == 16) {
    const __m512 scale = _mm512_loadu_ps(factor), a = _mm512_loadu_ps(even),
                 b = odd ? _mm512_loadu_ps(odd) : _mm512_setzero_ps();
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to_even), rounded(a * scale));
    if (odd) {
      _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(to_odd), rounded(b * scale));
    }
    const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, rounded(a)),
                  high = _mm512_maskz_cvtepu16_epi32(0xffff, rounded(b));
    _mm512_storeu_si512(pairs, low | _mm512_maskz_slli_epi32(0xffff, high, 16));
    return;
  }
#endif
  for (int64_t l = 0; l < 16; ++l) {
    const bool there = l < count;
    pairs[l] = (there ? rounded(even[l]) : 0) | (there && odd ? rounded(odd[l]) : 0) << 16;
    to_even[l].bits = there ? static_cast<uint16_t>(rounded(even[l] * factor[l])) : 0;
    if (odd) to_odd[l].bits = there ? static_cast<uint16_t>(rounded(odd[l] * factor[l])) : 0;
  }
}

void round(const float* g, int64_t classes, int64_t n, int64_t stride, const float* factor, BFloat16* by_class,
           int64_t class_stride, BFloat16* by_sample, int64_t sample_stride) {
  alignas(64) uint32_t pairs[16 * 16];
  for (int64_t i = 0; i < (n + kDepthStep - 1) / kDepthStep * kDepthStep; i += 16) {
    const int64_t count = n < i ? 0 : n - i < 16 ? n - i : 16;
    for (int64_t first = 0; first < classes; first += kDepthStep) {
      for (int64_t p = 0; p < 16; ++p) {
        const int64_t j = first + 2 * p;
        uint32_t* const to = pairs + 16 * p;
        if (j < classes) {
          const float* const even = g + j * stride + i;
          BFloat16* const out = by_class + j * class_stride + i;
          const bool two = j + 1 < classes;
          round_rows(even, two ? even + stride : nullptr, factor + i, count, out, out + class_stride, to);
        } else {
          for (int64_t l = 0; l < 16; ++l) to[l] = 0;
        }
      }
      BFloat16* const out = by_sample + i * sample_stride + first;
      if (count == 16) {
        transpose(pairs, out, sample_stride);
        continue;
      }
      for (int64_t l = 0; l < count; ++l) {
        for (int64_t p = 0; p < 16; ++p) {
          __builtin_memcpy(out + l * sample_stride + 2 * p, pairs + 16 * p + l, sizeof(*pairs));
        }
      }
    }
  }
}

void inverse_norms(const BFloat16* w, int64_t rows, int64_t d, int64_t stride, float* inv_norm) {
  for (int64_t j = 0; j < rows; ++j) {
    const BFloat16* const row = w + j * stride;
    float lows = 0, highs = 0;
#pragma omp simd reduction(+ : lows, highs)
    for (int64_t k = 0; k < d / 2; ++k) {
      const uint32_t both = pair(row + 2 * k);
      lows += low(both) * low(both);
      highs += high(both) * high(both);
    }
    const float last = d % 2 == 0 ? 0.0f : value(uint32_t{row[d - 1].bits} << 16);
    const float norm = __builtin_sqrtf(lows + highs + last * last);
    inv_norm[j] = 1 / (norm < static_cast<float>(kEps) ? static_cast<float>(kEps) : norm);
  }
}

// In 16 bits: the exponent of a normal number changes its bias, and a subnormal one has that of its highest bit.
void from_float8(const void* from, int64_t n, BFloat16* __restrict to) {
  const auto* __restrict source = static_cast<const uint8_t*>(from);
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const uint16_t h = source[k], m = h & 0x7f;
    uint16_t bits = static_cast<uint16_t>((m << 4) + (120 << 7));
    bits = m < 8 ? static_cast<uint16_t>((m << 5) + (119 << 7)) : bits;  // 4 to 7 steps of 2^-9
    bits = m < 4 ? static_cast<uint16_t>((m << 6) + (118 << 7)) : bits;
    bits = m < 2 ? static_cast<uint16_t>(m * (118 << 7)) : bits;
    bits = m == 0x7f ? 0x7fc0 : bits;
    to[k].bits = static_cast<uint16_t>(bits | (h & 0x80) << 8);
  }
}

void project(const float* __restrict dw, const BFloat16* __restrict w, int64_t d, float projection,
             BFloat16* __restrict to) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    to[k].bits = static_cast<uint16_t>(rounded(dw[k] - projection * value(uint32_t{w[k].bits} << 16)));
  }
}

// Measured with AMX: 256 x 100,000 x 512 with standard deviations of cosines up to 0.12 takes 113 to 121 ms, and
// at least 196 ms by entries. AVX512-BF16, with at most twice the rate of float, is not expected to do so.
#if defined(__AMX_BF16__) || defined(COSFACE_EMULATES_AMX)
constexpr bool kOutrunsEntries = true;
#else
constexpr bool kOutrunsEntries = false;
#endif

constexpr Bfloat16Kernels kTable{{kPanel, kDepthStep, matmul, pack_transposed, pack},
                                 kOutrunsEntries,
                                 scale,
                                 round,
                                 inverse_norms,
                                 from_float8,
                                 project};

}  // namespace

const Bfloat16Kernels& bfloat16_table() { return kTable; }

}  // namespace cosface::COSFACE_ISA
