// The CUDA kernels of forward: norms, and statistics of each row over the classes of the chunks.
#include <cmath>

#include "cuda/chunk.h"
#include "cuda/rows.h"

namespace cosface::cuda {
namespace {

template <typename T, typename V, int kThreads, int kPack>
__global__ void row_norms_kernel(const V* v, int64_t n, int64_t columns, int64_t stride, T* inv_norm) {
  const int64_t row = this_row();
  if (row >= n) return;
  v += row * stride;
  T squares = 0;
  for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
    const auto pack = load<kPack>(v + k);
    for (int l = 0; l < kPack; ++l) squares += convert<T>(pack.values[l]) * convert<T>(pack.values[l]);
  }
  const T norm = std::sqrt(reduce<kThreads>(squares, Sum()));
  if (threadIdx.x == 0) inv_norm[row] = 1 / (norm < static_cast<T>(kEps) ? static_cast<T>(kEps) : norm);
}

// Sums over negatives: of e^{s (N - top)} (top - N), of N, and of the cosines above their threshold and of 1 for
// each.
template <typename T>
struct Moments {
  T below = 0, shaped = 0, hard = 0, hard_count = 0;
};

// What `below` becomes where top rises by `rise`, with sum = sum of e^{s (N - top)} and fade = e^{-s rise}.
template <typename T>
__device__ T below_risen(T below, T sum, T rise, T fade) {
  return fade == 0 ? 0 : fade * (below + sum * rise);  // not 0 times infinity
}

template <typename T, int kThreads, int kPack, bool kMoments>
__global__ void class_statistics_kernel(Chunk<T> chunk, RunningStatistics<T> running, T* target_cos) {
  const int64_t row = this_row();
  if (row >= chunk.n) return;
  int64_t begin, end;
  this_segment<kPack>(chunk.classes, &begin, &end);
  const T x_inv_norm = chunk.x_inv_norm[row];
  const int64_t target = chunk.y[row] - chunk.first_class;
  const T s = chunk.s[row] == 0 ? kLeast<T> : chunk.s[row];  // e^{s cos} is 1 for both, s times infinity not nan

  const Reshape<T> reshape(chunk, row);
  const int64_t second = kMoments ? second_target(chunk, row) : -1;
  T top = kLowest<T>, max_cos = kLowest<T>, sum = 0;
  Moments<T> moments;
  for (int64_t j = begin + threadIdx.x * kPack; j < end; j += kThreads * kPack) {
    const auto cosines = compute_cosines(chunk, row, x_inv_norm, j, load<kPack>(chunk.w_inv_norm + j));
    if (chunk.kept != nullptr) keep_cosines(chunk, row, j, cosines);
    for (int l = 0; l < kPack; ++l) {
      const T cos = cosines.values[l];
      if (j + l == target) {
        target_cos[row] = cos;
        continue;
      }
      if (kMoments && j + l == second) {
        target_cos[chunk.n + row] = cos;
        continue;
      }
      const T shaped = reshape.value(cos);
      if (cos > max_cos) max_cos = cos;
      if (shaped > top) {
        const T fade = std::exp(s * (top - shaped));
        if constexpr (kMoments) moments.below = below_risen(moments.below, sum, shaped - top, fade);
        sum *= fade;
        top = shaped;
      }
      const T power = std::exp(s * (shaped - top));
      sum += power;
      if constexpr (kMoments) {
        moments.below += power * (top - shaped);
        moments.shaped += shaped;
        if (cos > reshape.tau) moments.hard += cos, moments.hard_count += 1;
      }
    }
  }
  const T row_top = reduce<kThreads>(top, Max());
  const T fade = std::exp(s * (top - row_top));
  const T row_sum = reduce<kThreads>(sum * fade, Sum());
  const T row_max_cos = chunk.tau == nullptr ? row_top : reduce<kThreads>(max_cos, Max());
  if constexpr (kMoments) {
    moments.below = reduce<kThreads>(below_risen(moments.below, sum, row_top - top, fade), Sum());
    moments.shaped = reduce<kThreads>(moments.shaped, Sum());
    if (chunk.tau != nullptr) {
      moments.hard = reduce<kThreads>(moments.hard, Sum());
      moments.hard_count = reduce<kThreads>(moments.hard_count, Sum());
    }
  }
  if (threadIdx.x != 0) return;
  const int64_t slot = blockIdx.y * chunk.n + row;
  const T old_top = running.top[slot], new_top = Max()(old_top, row_top);
  const T new_max_cos = Max()(running.max_cos[slot], row_max_cos);
  if constexpr (kMoments) {
    const T old_fade = std::exp(s * (old_top - new_top)), row_fade = std::exp(s * (row_top - new_top));
    const int64_t slots = gridDim.y * chunk.n;
    double* sums = running.moments + slot;
    sums[0] = below_risen<double>(sums[0], running.sum_exp[slot], new_top - old_top, old_fade) +
              below_risen(moments.below, row_sum, new_top - row_top, row_fade);
    sums[slots] += moments.shaped;
    sums[2 * slots] += moments.hard;
    sums[3 * slots] += moments.hard_count;
  }
  running.sum_exp[slot] =
      running.sum_exp[slot] * std::exp(s * (old_top - new_top)) + row_sum * std::exp(s * (row_top - new_top));
  running.top[slot] = new_top;
  running.max_cos[slot] = new_max_cos;
}

template <typename T, bool kMoments>
__global__ void merge_statistics_kernel(RunningStatistics<T> running, int64_t segments, int64_t n,
                                        const int64_t* y, const T* s, T margin, Results<T> results) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  T top = kLowest<T>, max_cos = kLowest<T>;
  for (int64_t slot = i; slot < segments * n; slot += n) {
    top = Max()(top, running.top[slot]);
    max_cos = Max()(max_cos, running.max_cos[slot]);
  }
  double sum = 0, below = 0;
  for (int64_t slot = i; slot < segments * n; slot += n) {
    const T from_top = running.top[slot] - top;  // 0 - 0, or far below
    sum += running.sum_exp[slot] * std::exp(from_top == 0 ? 0 : s[i] * from_top);
    if constexpr (kMoments) {
      below += below_risen<double>(running.moments[slot], running.sum_exp[slot], -from_top,
                                   std::exp(from_top == 0 ? 0 : s[i] * from_top));
    }
  }
  if constexpr (kMoments) {
    results.moments[i] = static_cast<T>(sum == 0 ? 0 : below / sum);
    for (int64_t k = 1; k < 4; ++k) {
      double total = 0;
      for (int64_t slot = i; slot < segments * n; slot += n) total += running.moments[k * segments * n + slot];
      results.moments[k * n + i] = static_cast<T>(total);
    }
  }
  if (top == kLowest<T>) top = 0;
  const T log_sum = static_cast<T>(std::log(sum)), z = log_sum + s[i] * (top - (results.target_cos[i] - margin));
  const T softplus = (z > 0 ? z : 0) + std::log1p(std::exp(z > 0 ? -z : z));
  results.max_neg[i] = max_cos == kLowest<T> ? -kInfinity<T> : max_cos;
  results.top[i] = top;
  results.log_sum[i] = log_sum;
  results.loss[i] = y[i] < 0 ? 0 : softplus;
}

}  // namespace

template <typename T>
void row_norms(const Rows& v, T* inv_norm, Stream stream) {
  with_operand<T>(v.dtype, [&](auto type) {
    using V = typename decltype(type)::type;
    with_shape<kVector<V>>(v.columns, rows_are_aligned<V>(v), [&](auto shape) {
      using S = decltype(shape);
      launch("row_norms", row_norms_kernel<T, V, S::kThreads, S::kPack>, S::grid(v.n, 1), S::block(), stream,
             static_cast<const V*>(v.data), v.n, v.columns, v.stride, inv_norm);
    });
  });
}

template <typename T>
void class_statistics(const Chunk<T>& chunk, const RunningStatistics<T>& running, T* target_cos, Stream stream) {
  with_chunk_shape(chunk, [&](auto shape) {
    using S = decltype(shape);
    const auto kernel = running.moments == nullptr ? class_statistics_kernel<T, S::kThreads, S::kPack, false>
                                                   : class_statistics_kernel<T, S::kThreads, S::kPack, true>;
    launch("class_statistics", kernel, S::grid(chunk.n, chunk.segments), S::block(), stream, chunk, running,
           target_cos);
  });
}

template <typename T>
void merge_statistics(const RunningStatistics<T>& running, int64_t segments, int64_t n, const int64_t* y,
                      const T* s, T margin, const Results<T>& results, Stream stream) {
  const auto kernel =
      running.moments == nullptr ? merge_statistics_kernel<T, false> : merge_statistics_kernel<T, true>;
  launch("merge_statistics", kernel, dim3(static_cast<unsigned>(ceil_div(n, kBlock))), dim3(kBlock), stream,
         running, segments, n, y, s, margin, results);
}

#define COSFACE_INSTANTIATE(T)                                                                               \
  template void row_norms(const Rows&, T*, Stream);                                                          \
  template void class_statistics(const Chunk<T>&, const RunningStatistics<T>&, T*, Stream);                  \
  template void merge_statistics(const RunningStatistics<T>&, int64_t, int64_t, const int64_t*, const T*, T, \
                                 const Results<T>&, Stream);

COSFACE_INSTANTIATE(float)
COSFACE_INSTANTIATE(double)

#undef COSFACE_INSTANTIATE

}  // namespace cosface::cuda
