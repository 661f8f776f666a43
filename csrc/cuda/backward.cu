// The CUDA kernels of backward: what its products take, and what follows from what they give.
#include <cmath>
#include <type_traits>

#include "cuda/chunk.h"
#include "cuda/rows.h"

namespace cosface::cuda {
namespace {

template <typename T, typename V, int kThreads, int kPack>
__global__ void normalize_rows_kernel(const V* v, int64_t n, int64_t columns, int64_t stride, const T* inv_norm,
                                      const T* factor, V* hat) {
  const int64_t row = this_row();
  if (row >= n) return;
  v += row * stride;
  hat += row * columns;
  const T inverse = inv_norm[row], row_factor = factor == nullptr ? 1 : factor[row];
  for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
    auto pack = load<kPack>(v + k);
    for (int l = 0; l < kPack; ++l) {
      pack.values[l] = convert<V>(row_factor == 0 ? 0 : convert<T>(pack.values[l]) * inverse * row_factor);
    }
    store(hat + k, pack);
  }
}

template <typename T, typename G, int kThreads, int kPack, bool kMoments>
__global__ void logit_gradients_kernel(Chunk<T> chunk, Upstream<T> upstream, const T* unit, G* g,
                                       double* negative_dot) {
  const int64_t row = this_row();
  if (row >= chunk.n) return;
  int64_t begin, end;
  this_segment<kPack>(chunk.classes, &begin, &end);
  g += row * chunk.classes;
  const T x_inv_norm = chunk.x_inv_norm[row], s = chunk.s[row];
  const T top = upstream.top[row], log_sum = upstream.log_sum[row];
  const T g_lse = upstream.g_lse[row], g_cos = upstream.g_cos[row];
  const T lift = static_cast<T>(kGradientLift) / unit[row];
  const int64_t target = chunk.y[row] - chunk.first_class;
  const bool has_second = kMoments && chunk.second != nullptr,
             has_moments = kMoments && upstream.g_moments != nullptr;
  const int64_t second = kMoments ? second_target(chunk, row) : -1;
  const T g_second = has_second ? upstream.g_cos[chunk.n + row] : 0;
  const T b = has_moments ? upstream.g_moments[row] : 0, c = has_moments ? upstream.g_moments[chunk.n + row] : 0;
  const bool active = g_lse != 0 || g_cos != 0 || g_second != 0 || b != 0 || c != 0;
  const Reshape<T> reshape(chunk, row);

  T negative = 0;
  for (int64_t j = begin + threadIdx.x * kPack; j < end; j += kThreads * kPack) {
    const auto w_inv_norms = load<kPack>(chunk.w_inv_norm + j);
    const auto cosines = chunk.kept == nullptr ? compute_cosines(chunk, row, x_inv_norm, j, w_inv_norms)
                                               : recall_cosines<kPack>(chunk, row, j);
    Pack<G, kPack> gradients;
    for (int l = 0; l < kPack; ++l) {
      T gradient = 0;
      if (active && j + l == target) {
        gradient = g_cos;
      } else if (kMoments && active && j + l == second) {
        gradient = g_second;
      } else if (active) {
        const T cos = cosines.values[l], shaped = reshape.value(cos);
        const T log_p = s * (shaped - top) - log_sum;
        // A cosine may be above forward's: by another product of the library, or by the rounding of a kept one.
        const T p = std::exp(log_p > 0 ? 0 : log_p);
        if constexpr (kMoments) {
          const T t = (g_lse + b * (shaped - top)) * p;
          negative += t * shaped;
          gradient = (s * t + b * p + c) * reshape.slope(cos);
        } else {
          negative += p * shaped;
          gradient = s * g_lse * p * reshape.slope(cos);
        }
      }
      if constexpr (!std::is_same_v<G, __half>) gradient *= w_inv_norms.values[l];
      gradients.values[l] = convert<G>(gradient * lift);
    }
    store(g + j, gradients);
  }
  negative = reduce<kThreads>(negative, Sum());
  if (threadIdx.x == 0) negative_dot[blockIdx.y * chunk.n + row] += kMoments ? negative : g_lse * negative;
}

// The (5) coefficients are those of 1, c, c^2, c^3 and c^4.
template <typename T>
__device__ T polynomial(const T* k, T c) {
  return (((k[4] * c + k[3]) * c + k[2]) * c + k[1]) * c + k[0];
}

template <typename T, typename G, int kThreads, int kPack, bool kByAngle>
__global__ void sigmoid_gradients_kernel(Chunk<T> chunk, Upstream<T> upstream, const T* polynomials, const T* unit,
                                         G* g, double* sums) {
  const int64_t row = this_row();
  if (row >= chunk.n) return;
  int64_t begin, end;
  this_segment<kPack>(chunk.classes, &begin, &end);
  g += row * chunk.classes;
  const T x_inv_norm = chunk.x_inv_norm[row], s = chunk.s[row], log_sum = upstream.log_sum[row];
  const T g_lse = upstream.g_lse[row], g_cos = upstream.g_cos[row];
  const T lift = static_cast<T>(kGradientLift) / unit[row];
  const int64_t target = chunk.y[row] - chunk.first_class;
  const bool active = g_lse != 0 || g_cos != 0;
  T value[5] = {}, slope[5] = {};
  for (int k = 0; !kByAngle && k < 5; ++k) value[k] = polynomials[k], slope[k] = polynomials[5 + k];

  T negative = 0, added = 0, mass = 0;
  for (int64_t j = begin + threadIdx.x * kPack; j < end; j += kThreads * kPack) {
    const auto w_inv_norms = load<kPack>(chunk.w_inv_norm + j);
    const auto cosines = compute_cosines(chunk, row, x_inv_norm, j, w_inv_norms);
    Pack<G, kPack> gradients;
    for (int l = 0; l < kPack; ++l) {
      T gradient = 0;
      if (active && j + l == target) {
        gradient = g_cos;
      } else if (active) {
        const T cos = cosines.values[l];
        const T shaped = kByAngle ? -std::acos(within_one(cos)) : polynomial(value, cos);
        const T logit = s * shaped - log_sum, e = std::exp(-std::fabs(logit));
        const T p = (logit > 0 ? 1 : e) / (1 + e);
        mass += p;
        if constexpr (kByAngle) {
          added += p * cos;
          gradient = g_lse * p;
        } else {
          added += (logit > 0 ? logit : 0) + std::log1p(e);
          negative += p * shaped;
          gradient = s * g_lse * p * polynomial(slope, cos);
        }
      }
      if constexpr (!std::is_same_v<G, __half>) gradient *= w_inv_norms.values[l];
      gradients.values[l] = convert<G>(gradient * lift);
    }
    store(g + j, gradients);
  }
  const T all[] = {g_lse * reduce<kThreads>(negative, Sum()), reduce<kThreads>(added, Sum()),
                   reduce<kThreads>(mass, Sum())};
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 3; ++k) sums[(k * gridDim.y + blockIdx.y) * chunk.n + row] += all[k];
}

template <typename T, typename V, typename Out, int kThreads, int kPack>
__global__ void project_rows_kernel(const T* g, bool divided, const V* v, int64_t n, int64_t columns,
                                    int64_t stride, const T* inv_norm, const T* factor, int64_t factor_step,
                                    Out* out) {
  const int64_t row = this_row();
  if (row >= n) return;
  g += row * columns;
  v += row * stride;
  out += row * columns;
  const T inverse = inv_norm[row], row_factor = factor[row * factor_step],
          by = row_factor * (divided ? 1 : inverse);
  T dot = 0;
  for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
    const auto gradients = load<kPack>(g + k);
    const auto values = load<kPack>(v + k);
    for (int l = 0; l < kPack; ++l) dot += gradients.values[l] * (convert<T>(values.values[l]) * inverse);
  }
  dot = reduce<kThreads>(dot, Sum());
  if (is_clamped(inverse)) dot = 0;
  for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
    const auto gradients = load<kPack>(g + k);
    const auto values = load<kPack>(v + k);
    Pack<Out, kPack> result;
    for (int l = 0; l < kPack; ++l) {
      const T orthogonal = gradients.values[l] - dot * (convert<T>(values.values[l]) * inverse);
      result.values[l] = convert<Out>(row_factor == 0 ? 0 : orthogonal * by);
    }
    store(out + k, result);
  }
}

}  // namespace

template <typename T>
void normalize_rows(const Rows& v, const T* inv_norm, const T* factor, void* hat, Stream stream) {
  with_operand<T>(v.dtype, [&](auto type) {
    using V = typename decltype(type)::type;
    with_shape<kVector<V>>(v.columns, rows_are_aligned<V>(v), [&](auto shape) {
      using S = decltype(shape);
      launch("normalize_rows", normalize_rows_kernel<T, V, S::kThreads, S::kPack>, S::grid(v.n, 1), S::block(),
             stream, static_cast<const V*>(v.data), v.n, v.columns, v.stride, inv_norm, factor,
             static_cast<V*>(hat));
    });
  });
}

template <typename T>
void logit_gradients(const Chunk<T>& chunk, const Upstream<T>& upstream, const T* unit, void* g, DType dtype,
                     double* negative_dot, Stream stream) {
  with_operand<T>(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    with_chunk_shape(chunk, [&](auto shape) {
      using S = decltype(shape);
      const bool plain = upstream.g_moments == nullptr && chunk.second == nullptr;
      const auto kernel = plain ? logit_gradients_kernel<T, G, S::kThreads, S::kPack, false>
                                : logit_gradients_kernel<T, G, S::kThreads, S::kPack, true>;
      launch("logit_gradients", kernel, S::grid(chunk.n, chunk.segments), S::block(), stream, chunk, upstream,
             unit, static_cast<G*>(g), negative_dot);
    });
  });
}

template <typename T>
void sigmoid_gradients(const Chunk<T>& chunk, const Upstream<T>& upstream, const T* polynomials, const T* unit,
                       void* g, DType dtype, double* sums, Stream stream) {
  with_operand<T>(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    with_chunk_shape(chunk, [&](auto shape) {
      using S = decltype(shape);
      const auto kernel = polynomials == nullptr ? sigmoid_gradients_kernel<T, G, S::kThreads, S::kPack, true>
                                                 : sigmoid_gradients_kernel<T, G, S::kThreads, S::kPack, false>;
      launch("sigmoid_gradients", kernel, S::grid(chunk.n, chunk.segments), S::block(), stream, chunk, upstream,
             polynomials, unit, static_cast<G*>(g), sums);
    });
  });
}

template <typename T>
void project_rows(const T* g, bool divided, const Rows& v, const T* inv_norm, const T* factor, int64_t factor_step,
                  void* out, DType out_dtype, Stream stream) {
  with_operand<T>(v.dtype, [&](auto type) {
    using V = typename decltype(type)::type;
    with_shape<kVector<V>>(v.columns, rows_are_aligned<V>(v), [&](auto shape) {
      using S = decltype(shape);
      const auto run = [&](auto* typed_out) {
        using Out = std::remove_pointer_t<decltype(typed_out)>;
        launch("project_rows", project_rows_kernel<T, V, Out, S::kThreads, S::kPack>, S::grid(v.n, 1), S::block(),
               stream, g, divided, static_cast<const V*>(v.data), v.n, v.columns, v.stride, inv_norm, factor,
               factor_step, typed_out);
      };
      out_dtype == v.dtype ? run(static_cast<V*>(out)) : run(static_cast<T*>(out));
    });
  });
}

#define COSFACE_INSTANTIATE(T)                                                                                    \
  template void normalize_rows(const Rows&, const T*, const T*, void*, Stream);                                   \
  template void logit_gradients(const Chunk<T>&, const Upstream<T>&, const T*, void*, DType, double*, Stream);    \
  template void sigmoid_gradients(const Chunk<T>&, const Upstream<T>&, const T*, const T*, void*, DType, double*, \
                                  Stream);                                                                        \
  template void project_rows(const T*, bool, const Rows&, const T*, const T*, int64_t, void*, DType, Stream);

COSFACE_INSTANTIATE(float)
COSFACE_INSTANTIATE(double)

#undef COSFACE_INSTANTIATE

}  // namespace cosface::cuda
