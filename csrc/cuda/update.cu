// The CUDA kernel that moves rows of the weight, and of an optimizer's state.
#include <cmath>
#include <stdexcept>

#include "cuda/rows.h"
#include "philox.h"
#include "update.h"

namespace cosface::cuda {
namespace {

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

}  // namespace

template <typename T>
void move_rows(const T* g, int64_t n, int64_t columns, const Weight& w, const int64_t* index, int64_t first_row,
               const Update& update, Stream stream) {
  if (update.rule == Update::Rule::kSgd) {
    move_rows_by(SgdStep<T>(update), g, n, columns, w, index, first_row, update, stream);
  } else {
    move_rows_by(AdamWStep<T>(update), g, n, columns, w, index, first_row, update, stream);
  }
}

#define COSFACE_INSTANTIATE(T)                                                                               \
  template void move_rows(const T*, int64_t, int64_t, const Weight&, const int64_t*, int64_t, const Update&, \
                          Stream);

COSFACE_INSTANTIATE(float)
COSFACE_INSTANTIATE(double)

#undef COSFACE_INSTANTIATE

}  // namespace cosface::cuda
