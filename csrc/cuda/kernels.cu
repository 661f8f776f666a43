#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "philox.h"
#include "update.h"

namespace cosface::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 256;           // threads of a block that has a row for itself
constexpr int kRowsPerBlock = 4;      // rows of a block that gives each a warp
constexpr int64_t kTripsPerWarp = 8;  // reads of a row by one warp; a row that needs more gets a block
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kWidestLoad = 16;  // bytes

// The lowest is finite, so that the difference of two is 0.
template <typename T>
constexpr T kLowest = std::numeric_limits<T>::lowest();
template <typename T>
constexpr T kLeast = std::numeric_limits<T>::min();
template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Numbers that one instruction loads, or two if they are wider than the others of a loop.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < kWidestLoad ? sizeof(T) * kCount : kWidestLoad) Pack {
  T values[kCount];
};

template <int kCount, typename T>
__device__ Pack<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <int kCount, typename T>
__device__ void store(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

template <typename To, typename From>
__device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<From, __half>) {
    return static_cast<To>(__half2float(v));
  } else if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return static_cast<To>(__bfloat162float(v));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(static_cast<float>(v));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(v));
  } else {
    return static_cast<To>(v);
  }
}

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// The values of the kThreads threads of a row combined, the same for all of them. All must take part.
template <int kThreads, typename Combine, typename T>
__device__ T reduce(T value, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  if constexpr (kThreads > kWarp) {
    __shared__ T parts[kThreads / kWarp];
    __syncthreads();  // a thread may still be reading the parts of the call before
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = parts[0];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) value = combine(value, parts[warp]);
  }
  return value;
}

// <x, w> / (|x| |w|), rounded as written: in an fma, the difference of a cosine and the largest would not be that
// of two numbers that both passes see alike.
__device__ inline float cosine(float dot, float x_inv_norm, float w_inv_norm) {
  return __fmul_rn(__fmul_rn(dot, x_inv_norm), w_inv_norm);
}
__device__ inline double cosine(double dot, double x_inv_norm, double w_inv_norm) {
  return __dmul_rn(__dmul_rn(dot, x_inv_norm), w_inv_norm);
}

constexpr float kCosineStep = 1.0f / 32767;
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer

__device__ inline int16_t keep(float cos) {
  return static_cast<int16_t>(__builtin_bit_cast(uint32_t, cos * 32767.0f + kRoundToInteger));
}
__device__ inline double keep(double cos) { return cos; }
__device__ inline float recall(int16_t kept) { return kept * kCosineStep; }
__device__ inline double recall(double kept) { return kept; }

// The row of this thread: blocks are (threads of a row, rows of the block).
__device__ int64_t this_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

template <typename T>
__device__ bool is_clamped(T inv_norm) {
  return inv_norm >= static_cast<T>(1) / static_cast<T>(kEps);
}

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

// The classes of this block's segment of a chunk: [begin, end).
template <int kPack>
__device__ void this_segment(int64_t classes, int64_t* begin, int64_t* end) {
  const int64_t packs = classes / kPack, segments = gridDim.y, segment = blockIdx.y;
  *begin = packs * segment / segments * kPack;
  *end = packs * (segment + 1) / segments * kPack;
}

// The cosines of a row of a chunk with its classes from j on.
template <int kPack, typename T>
__device__ Pack<T, kPack> compute_cosines(const Chunk<T>& chunk, int64_t row, T x_inv_norm, int64_t j,
                                          const Pack<T, kPack>& w_inv_norms) {
  auto pack = load<kPack>(chunk.dot + row * chunk.classes + j);
  for (int l = 0; l < kPack; ++l) pack.values[l] = cosine(pack.values[l], x_inv_norm, w_inv_norms.values[l]);
  return pack;
}

template <int kPack, typename T>
__device__ void keep_cosines(const Chunk<T>& chunk, int64_t row, int64_t j, const Pack<T, kPack>& cosines) {
  Pack<Kept<T>, kPack> pack;
  for (int l = 0; l < kPack; ++l) pack.values[l] = keep(cosines.values[l]);
  store(chunk.kept + row * chunk.kept_stride + j, pack);
}

template <int kPack, typename T>
__device__ Pack<T, kPack> recall_cosines(const Chunk<T>& chunk, int64_t row, int64_t j) {
  const auto kept = load<kPack>(chunk.kept + row * chunk.kept_stride + j);
  Pack<T, kPack> pack;
  for (int l = 0; l < kPack; ++l) pack.values[l] = recall(kept.values[l]);
  return pack;
}

// N and N' of a row; where negatives are not reshaped, no cosine is above its threshold.
template <typename T>
struct Reshape {
  T tau = kInfinity<T>, q = 0, a = 1, b = 0;

  __device__ Reshape(const Chunk<T>& chunk, int64_t row) {
    if (chunk.tau == nullptr) return;
    tau = chunk.tau[row];
    q = chunk.polynomial[0], a = chunk.polynomial[1], b = chunk.polynomial[2];
  }
  __device__ T value(T cos) const { return cos > tau ? (q * cos + a) * cos + b : cos; }
  __device__ T slope(T cos) const { return cos > tau ? 2 * q * cos + a : 1; }
};

template <typename T, int kThreads, int kPack>
__global__ void class_statistics_kernel(Chunk<T> chunk, RunningStatistics<T> running, T* target_cos) {
  const int64_t row = this_row();
  if (row >= chunk.n) return;
  int64_t begin, end;
  this_segment<kPack>(chunk.classes, &begin, &end);
  const T x_inv_norm = chunk.x_inv_norm[row];
  const int64_t target = chunk.y[row] - chunk.first_class;
  const T s = chunk.s[row] == 0 ? kLeast<T> : chunk.s[row];  // e^{s cos} is 1 for both, s times infinity not nan

  const Reshape<T> reshape(chunk, row);
  T top = kLowest<T>, max_cos = kLowest<T>, sum = 0;
  for (int64_t j = begin + threadIdx.x * kPack; j < end; j += kThreads * kPack) {
    const auto cosines = compute_cosines(chunk, row, x_inv_norm, j, load<kPack>(chunk.w_inv_norm + j));
    if (chunk.kept != nullptr) keep_cosines(chunk, row, j, cosines);
    for (int l = 0; l < kPack; ++l) {
      const T cos = cosines.values[l];
      if (j + l == target) {
        target_cos[row] = cos;
        continue;
      }
      const T shaped = reshape.value(cos);
      if (cos > max_cos) max_cos = cos;
      if (shaped > top) {
        sum *= std::exp(s * (top - shaped));
        top = shaped;
      }
      sum += std::exp(s * (shaped - top));
    }
  }
  const T row_top = reduce<kThreads>(top, Max());
  const T row_sum = reduce<kThreads>(sum * std::exp(s * (top - row_top)), Sum());
  const T row_max_cos = chunk.tau == nullptr ? row_top : reduce<kThreads>(max_cos, Max());
  if (threadIdx.x != 0) return;
  const int64_t slot = blockIdx.y * chunk.n + row;
  const T old_top = running.top[slot], new_top = Max()(old_top, row_top);
  const T new_max_cos = Max()(running.max_cos[slot], row_max_cos);
  running.sum_exp[slot] =
      running.sum_exp[slot] * std::exp(s * (old_top - new_top)) + row_sum * std::exp(s * (row_top - new_top));
  running.top[slot] = new_top;
  running.max_cos[slot] = new_max_cos;
}

template <typename T>
__global__ void merge_statistics_kernel(RunningStatistics<T> running, int64_t segments, int64_t n,
                                        const int64_t* y, const T* s, T margin, Results<T> results) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  T top = kLowest<T>, max_cos = kLowest<T>;
  for (int64_t slot = i; slot < segments * n; slot += n) {
    top = Max()(top, running.top[slot]);
    max_cos = Max()(max_cos, running.max_cos[slot]);
  }
  double sum = 0;
  for (int64_t slot = i; slot < segments * n; slot += n) {
    const T below = running.top[slot] - top;  // 0 - 0, or far below
    sum += running.sum_exp[slot] * std::exp(below == 0 ? 0 : s[i] * below);
  }
  if (top == kLowest<T>) top = 0;
  const T log_sum = static_cast<T>(std::log(sum)), z = log_sum + s[i] * (top - (results.target_cos[i] - margin));
  const T softplus = (z > 0 ? z : 0) + std::log1p(std::exp(z > 0 ? -z : z));
  results.max_neg[i] = max_cos == kLowest<T> ? -kInfinity<T> : max_cos;
  results.top[i] = top;
  results.log_sum[i] = log_sum;
  results.loss[i] = y[i] < 0 ? 0 : softplus;
}

template <typename T, typename G, int kThreads, int kPack>
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
  const bool active = g_lse != 0 || g_cos != 0;
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
      } else if (active) {
        const T cos = cosines.values[l], shaped = reshape.value(cos);
        const T log_p = s * (shaped - top) - log_sum;
        // A cosine may be above forward's: by another product of the library, or by the rounding of a kept one.
        const T p = std::exp(log_p > 0 ? 0 : log_p);
        negative += p * shaped;
        gradient = s * g_lse * p * reshape.slope(cos);
      }
      if constexpr (!std::is_same_v<G, __half>) gradient *= w_inv_norms.values[l];
      gradients.values[l] = convert<G>(gradient * lift);
    }
    store(g + j, gradients);
  }
  negative = reduce<kThreads>(negative, Sum());
  if (threadIdx.x == 0) negative_dot[blockIdx.y * chunk.n + row] += g_lse * negative;
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

// What one counter of Philox rounds: a pair of numbers of each quarter of a group.
constexpr int kOctet = 8;
constexpr int64_t kQuarter = kNoise / 4;

// Calls body(k, e) for the elements k of a row that are numbers e ... e + kPack - 1 of the octet whose first is at
// `first`.
template <int kPack, typename Body>
__device__ void each_pack(int64_t first, int64_t columns, Body body) {
  for (int e = 0; e < kOctet; e += kPack) {
    const int64_t k = first + e / 2 * kQuarter + e % 2;
    if (k < columns) body(k, e);
  }
}

// A matrix that moves.
struct Moving {
  void* data;  // or null
  DType dtype;
  int64_t stride;
  uint64_t stream;  // of its rounding

  __device__ bool exists() const { return data != nullptr; }
};

template <int kPack, typename V, typename T>
__device__ void load_octet(const V* row, int64_t first, int64_t columns, T* to) {
  each_pack<kPack>(first, columns, [&](int64_t k, int e) {
    const auto pack = load<kPack>(row + k);
    for (int l = 0; l < kPack; ++l) to[e + l] = convert<T>(pack.values[l]);
  });
}

template <int kPack, typename T>
__device__ void load_octet(const Moving& m, int64_t row, int64_t first, int64_t columns, T* to) {
  const int64_t offset = row * m.stride;
  if (m.dtype == DType::kFloat64) {
    load_octet<kPack>(static_cast<const double*>(m.data) + offset, first, columns, to);
  } else if (m.dtype == DType::kFloat32) {
    load_octet<kPack>(static_cast<const float*>(m.data) + offset, first, columns, to);
  } else {
    load_octet<kPack>(static_cast<const __nv_bfloat16*>(m.data) + offset, first, columns, to);
  }
}

template <int kPack, typename V, typename T>
__device__ void store_octet(const T* from, V* row, int64_t first, int64_t columns) {
  each_pack<kPack>(first, columns, [&](int64_t k, int e) {
    Pack<V, kPack> pack;
    for (int l = 0; l < kPack; ++l) pack.values[l] = static_cast<V>(from[e + l]);
    store(row + k, pack);
  });
}

// counter: of the octet, among those of its matrix.
template <int kPack, typename T>
__device__ void store_octet(const T* from, const Moving& m, int64_t row, int64_t first, int64_t columns,
                            uint64_t seed, uint64_t counter) {
  const int64_t offset = row * m.stride;
  if (m.dtype == DType::kFloat64)
    return store_octet<kPack>(from, static_cast<double*>(m.data) + offset, first, columns);
  if (m.dtype == DType::kFloat32)
    return store_octet<kPack>(from, static_cast<float*>(m.data) + offset, first, columns);
  uint32_t words[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
                       static_cast<uint32_t>(m.stream), static_cast<uint32_t>(m.stream >> 32)};
  auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxStep0, k1 += kPhiloxStep1) {
    philox_round(words[0], words[1], words[2], words[3], k0, k1);
  }
  auto* to = static_cast<__nv_bfloat16*>(m.data) + offset;
  each_pack<kPack>(first, columns, [&](int64_t k, int e) {
    Pack<__nv_bfloat16, kPack> pack;
    for (int l = 0; l < kPack; ++l) {
      const auto noise = static_cast<uint16_t>(words[e / 2] >> ((e + l) % 2 * 16));
      const uint16_t bits = round_stochastically(static_cast<float>(from[e + l]), noise);
      pack.values[l] = __builtin_bit_cast(__nv_bfloat16, bits);
    }
    store(to + k, pack);
  });
}

// The new w of one number with gradient g. `last`: whether the last of the states exists. States of one number lie
// kOctet apart.
template <typename T>
__device__ T advance(const SgdStep<T>& s, T g, T w, T* state, bool last) {
  const T v = g + s.weight_decay * w;
  if (!last) return w - s.lr * v;
  state[0] = s.momentum * state[0] + s.fresh * v;
  return w - s.lr * (s.from_g * v + s.from_mean * state[0]);
}

template <typename T>
__device__ T advance(const AdamWStep<T>& s, T g, T w, T* state, bool last) {
  T &mean = state[0], &square = state[kOctet], &largest = state[2 * kOctet];
  mean += s.fresh1 * (g - mean);
  square = s.beta2 * square + s.fresh2 * g * g;
  if (last && !(largest > square)) largest = square;
  return s.kept * w - s.step_size * mean / (std::sqrt(last ? largest : square) / s.root_correction + s.eps);
}

template <typename T, typename Step>
struct Movement {
  Step step;
  T gradient_factor, max_row_norm;
  uint64_t seed;
  Moving w, state[Step::kStates];
  const bool* finite;  // null: yes
};

template <typename T, typename Step, int kThreads, int kPack>
__global__ void move_rows_kernel(const T* g, int64_t n, int64_t columns, const int64_t* index, int64_t first_row,
                                 Movement<T, Step> move) {
  constexpr int kStates = Step::kStates;
  const int64_t j = this_row();
  if (j >= n || (move.finite != nullptr && !*move.finite)) return;
  g += j * columns;
  T factor = move.gradient_factor;
  if (move.max_row_norm < kInfinity<T>) {
    T squares = 0;
    for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
      const auto pack = load<kPack>(g + k);
      for (int l = 0; l < kPack; ++l) squares += factor * pack.values[l] * (factor * pack.values[l]);
    }
    const T norm = std::sqrt(reduce<kThreads>(squares, Sum()));
    if (norm > move.max_row_norm) factor *= move.max_row_norm / norm;
  }

  const int64_t row = index == nullptr ? first_row + j : index[j];
  const int64_t counters = (columns + kNoise - 1) / kNoise * kCounters;
  for (int64_t c = threadIdx.x; c < counters; c += kThreads) {
    const int64_t first = c / kCounters * kNoise + c % kCounters * 2;
    if (first >= columns) continue;
    T gradient[kOctet] = {}, w[kOctet] = {}, state[kStates * kOctet] = {};
    load_octet<kPack>(g, first, columns, gradient);
    load_octet<kPack>(move.w, row, first, columns, w);
    for (int t = 0; t < kStates; ++t) {
      if (move.state[t].exists()) load_octet<kPack>(move.state[t], row, first, columns, state + t * kOctet);
    }
    for (int e = 0; e < kOctet; ++e) {
      w[e] = advance(move.step, factor * gradient[e], w[e], state + e, move.state[kStates - 1].exists());
    }
    const uint64_t counter = row * counters + c;
    store_octet<kPack>(w, move.w, row, first, columns, move.seed, counter);
    for (int t = 0; t < kStates; ++t) {
      if (!move.state[t].exists()) continue;
      store_octet<kPack>(state + t * kOctet, move.state[t], row, first, columns, move.seed, counter);
    }
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename V>
struct Type {
  using type = V;
};

// Calls body(Type<V>()) for the operand dtypes whose sums are in T.
template <typename T, typename Body>
void with_operand(DType dtype, Body body) {
  if constexpr (std::is_same_v<T, double>) {
    if (dtype == DType::kFloat64) return body(Type<double>());
  } else {
    if (dtype == DType::kFloat32) return body(Type<float>());
    if (dtype == DType::kBFloat16) return body(Type<__nv_bfloat16>());
    if (dtype == DType::kFloat16) return body(Type<__half>());
  }
  throw std::logic_error("Operands in float64, and no others, have sums in double.");
}

template <int kThreads_, int kPack_>
struct Shape {
  static constexpr int kThreads = kThreads_, kPack = kPack_;
  static dim3 block() { return dim3(kThreads, kThreads == kWarp ? kRowsPerBlock : 1); }
  static dim3 grid(int64_t rows, int64_t segments) {
    return dim3(static_cast<unsigned>(ceil_div(rows, block().y)), static_cast<unsigned>(segments));
  }
};

// Calls body(Shape) with the width of the loads and the threads for a row of `columns` numbers, of which kWide
// can be loaded at once where rows are aligned to as many. A thread takes kLoads loads a trip.
template <int kWide, int kLoads = 1, typename Body>
void with_shape(int64_t columns, bool aligned, Body body) {
  const bool narrow_row = columns <= kTripsPerWarp * kWarp * kLoads * (aligned ? kWide : 1);
  if (aligned) {
    narrow_row ? body(Shape<kWarp, kWide>()) : body(Shape<kBlock, kWide>());
  } else {
    narrow_row ? body(Shape<kWarp, 1>()) : body(Shape<kBlock, 1>());
  }
}

template <typename V>
constexpr int kVector = kWidestLoad / sizeof(V);  // numbers in the widest load

bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <typename V>
bool rows_are_aligned(const Rows& v) {
  return v.columns % kVector<V> == 0 && v.stride % kVector<V> == 0 && is_aligned(v.data, kWidestLoad);
}

template <typename T, typename Step>
void move_rows_by(const Step& step, const T* g, int64_t n, int64_t columns, const Weight& w, const int64_t* index,
                  int64_t first_row, const Update& update, Stream stream) {
  constexpr int kPair = 2;
  bool aligned = columns % kPair == 0 && is_aligned(g, kPair * sizeof(T));
  const auto moving = [&](void* data, DType dtype, int64_t stride, int tensor) {
    if (dtype == DType::kFloat16) throw std::logic_error("Rows in float16 do not move.");
    const size_t bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
    aligned &= stride % kPair == 0 && is_aligned(data, kPair * bytes);
    return Moving{data, dtype, stride, rounding_stream(update.step, tensor)};
  };
  const auto factor = static_cast<T>(update.gradient_factor), longest = static_cast<T>(update.max_row_norm);
  const Moving weight = moving(update.weight, w.dtype, w.row_stride, kWeightTensor);
  Movement<T, Step> move{step, factor, longest, update.seed, weight, {}, update.finite};
  for (int t = 0; t < Step::kStates; ++t)
    move.state[t] = moving(update.state[t].data, update.state[t].dtype, columns, t);
  with_shape<kPair, kOctet / kPair>(columns, aligned, [&](auto shape) {
    using S = decltype(shape);
    launch("move_rows", move_rows_kernel<T, Step, S::kThreads, S::kPack>, S::grid(n, 1), S::block(), stream, g, n,
           columns, index, first_row, move);
  });
}

constexpr int kChunkPack = 4;  // numbers of a chunk's row that a thread takes at once

template <typename T, typename Body>
void with_chunk_shape(const Chunk<T>& chunk, Body body) {
  const bool aligned = chunk.classes % kChunkPack == 0 && chunk.kept_stride % kChunkPack == 0 &&
                       is_aligned(chunk.kept, kChunkPack * sizeof(Kept<T>)) &&
                       is_aligned(chunk.w_inv_norm, kWidestLoad);
  with_shape<kChunkPack>(ceil_div(chunk.classes, chunk.segments), aligned, body);
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
void class_statistics(const Chunk<T>& chunk, const RunningStatistics<T>& running, T* target_cos, Stream stream) {
  with_chunk_shape(chunk, [&](auto shape) {
    using S = decltype(shape);
    launch("class_statistics", class_statistics_kernel<T, S::kThreads, S::kPack>, S::grid(chunk.n, chunk.segments),
           S::block(), stream, chunk, running, target_cos);
  });
}

template <typename T>
void merge_statistics(const RunningStatistics<T>& running, int64_t segments, int64_t n, const int64_t* y,
                      const T* s, T margin, const Results<T>& results, Stream stream) {
  launch("merge_statistics", merge_statistics_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, kBlock))),
         dim3(kBlock), stream, running, segments, n, y, s, margin, results);
}

template <typename T>
void logit_gradients(const Chunk<T>& chunk, const Upstream<T>& upstream, const T* unit, void* g, DType dtype,
                     double* negative_dot, Stream stream) {
  with_operand<T>(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    with_chunk_shape(chunk, [&](auto shape) {
      using S = decltype(shape);
      launch("logit_gradients", logit_gradients_kernel<T, G, S::kThreads, S::kPack>,
             S::grid(chunk.n, chunk.segments), S::block(), stream, chunk, upstream, unit, static_cast<G*>(g),
             negative_dot);
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

template <typename T>
void move_rows(const T* g, int64_t n, int64_t columns, const Weight& w, const int64_t* index, int64_t first_row,
               const Update& update, Stream stream) {
  if (update.rule == Update::Rule::kSgd) {
    move_rows_by(SgdStep<T>(update), g, n, columns, w, index, first_row, update, stream);
  } else {
    move_rows_by(AdamWStep<T>(update), g, n, columns, w, index, first_row, update, stream);
  }
}

#define COSFACE_INSTANTIATE(T)                                                                                 \
  template void row_norms(const Rows&, T*, Stream);                                                            \
  template void normalize_rows(const Rows&, const T*, const T*, void*, Stream);                                \
  template void class_statistics(const Chunk<T>&, const RunningStatistics<T>&, T*, Stream);                    \
  template void merge_statistics(const RunningStatistics<T>&, int64_t, int64_t, const int64_t*, const T*, T,   \
                                 const Results<T>&, Stream);                                                   \
  template void logit_gradients(const Chunk<T>&, const Upstream<T>&, const T*, void*, DType, double*, Stream); \
  template void project_rows(const T*, bool, const Rows&, const T*, const T*, int64_t, void*, DType, Stream);  \
  template void move_rows(const T*, int64_t, int64_t, const Weight&, const int64_t*, int64_t, const Update&,   \
                          Stream);

COSFACE_INSTANTIATE(float)
COSFACE_INSTANTIATE(double)

}  // namespace cosface::cuda
