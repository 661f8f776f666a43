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

// Calls body(0) ... body(kCount - 1), unrolled: what these numbers index stays in registers.
template <int kCount, typename Body>
__device__ void each_of(Body body) {
  if constexpr (kCount > 0) {
    each_of<kCount - 1>(body);
    body(kCount - 1);
  }
}

// A matrix that moves.
struct Moving {
  void* data;  // or null
  DType dtype;
  int64_t stride;
  uint64_t stream;    // of its rounding
  int8_t* exponents;  // of float8

  __device__ bool exists() const { return data != nullptr; }
  __device__ bool is_float8() const { return exists() && dtype == DType::kFloat8; }
};

// A row of float8 is 2^e times what is stored or, of AdamW's squares, the square of that.
template <typename T>
struct Float8Row {
  bool has_roots = false;
  int8_t exponent = 0;       // e before the step
  T unit = 1, inverse = 1;   // 2^e before the step, 2^-e after it
  T largest = kInfinity<T>;  // of the new numbers, or of their roots
  T least = -kInfinity<T>;   // a root that is stored: 0 by rounding would make its element leap

  // What is stored becomes numbers.
  __device__ void read(T* octet) const {
    for (int e = 0; e < kOctet; ++e) {
      octet[e] *= unit;
      if (has_roots) octet[e] *= octet[e];
    }
  }

  // Returns e after the step.
  __device__ int8_t fit(T largest_number) {
    largest = has_roots ? std::sqrt(largest_number) : largest_number;
    if (has_roots && largest > 0) least = static_cast<T>(0x1p-9);
    const int8_t after = float8_exponent(largest, exponent);
    inverse = std::ldexp(T(1), -after);
    return after;
  }

  // Numbers become what is stored. None passes the largest, as it could where another fma rounds the second
  // reading.
  __device__ void write(T* octet) const {
    for (int e = 0; e < kOctet; ++e) {
      const T v = has_roots ? std::sqrt(octet[e]) : octet[e];
      const T scaled = (v > largest ? largest : v < -largest ? -largest : v) * inverse;
      octet[e] = scaled < least ? least : scaled;
    }
  }
};

template <int kPack, typename V, typename T>
__device__ void load_octet(const V* row, int64_t first, int64_t columns, T* to) {
  each_pack<kPack>(first, columns, [&](int64_t k, int e) {
    const auto pack = load<kPack>(row + k);
    for (int l = 0; l < kPack; ++l) to[e + l] = convert<T>(pack.values[l]);
  });
}

template <int kPack, bool kFloat8, typename T>
__device__ void load_octet(const Moving& m, int64_t row, int64_t first, int64_t columns, T* to) {
  const int64_t offset = row * m.stride;
  if (m.dtype == DType::kFloat64) {
    load_octet<kPack>(static_cast<const double*>(m.data) + offset, first, columns, to);
  } else if (m.dtype == DType::kFloat32) {
    load_octet<kPack>(static_cast<const float*>(m.data) + offset, first, columns, to);
  } else if (kFloat8 && m.dtype == DType::kFloat8) {
    load_octet<kPack>(static_cast<const Float8*>(m.data) + offset, first, columns, to);
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

__device__ inline void round_at_random(float v, uint16_t noise, __nv_bfloat16* to) {
  *to = __builtin_bit_cast(__nv_bfloat16, round_stochastically(v, noise));
}
__device__ inline void round_at_random(float v, uint16_t noise, Float8* to) {
  to->bits = round_to_float8(v, noise);
}

template <int kPack, typename V, typename T>
__device__ void round_octet(const T* from, const uint32_t* words, V* row, int64_t first, int64_t columns) {
  each_pack<kPack>(first, columns, [&](int64_t k, int e) {
    Pack<V, kPack> pack;
    for (int l = 0; l < kPack; ++l) {
      const auto noise = static_cast<uint16_t>(words[e / 2] >> ((e + l) % 2 * 16));
      round_at_random(static_cast<float>(from[e + l]), noise, &pack.values[l]);
    }
    store(row + k, pack);
  });
}

// counter: of the octet, among those of its matrix.
template <int kPack, bool kFloat8, typename T>
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
  if (kFloat8 && m.dtype == DType::kFloat8) {
    round_octet<kPack>(from, words, static_cast<Float8*>(m.data) + offset, first, columns);
  } else {
    round_octet<kPack>(from, words, static_cast<__nv_bfloat16*>(m.data) + offset, first, columns);
  }
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
  T gradient_factor, max_row_norm, weight_norm;
  uint64_t seed;
  Moving tensors[1 + Step::kStates];  // w and the states
  const bool* finite;                 // null: yes
};

// kTwice: rows are read twice, since an exponent follows from the largest of a row's new numbers, and what gives a
// row of the weight its length from all of them.
template <typename T, typename Step, int kThreads, int kPack, bool kTwice>
__global__ void move_rows_kernel(const T* g, int64_t n, int64_t columns, const int64_t* index, int64_t first_row,
                                 Movement<T, Step> move) {
  constexpr int kTensors = 1 + Step::kStates;
  const int64_t j = this_row();
  if (j >= n || (move.finite != nullptr && !*move.finite)) return;
  g += j * columns;
  const int64_t row = index == nullptr ? first_row + j : index[j];
  T factor = move.gradient_factor;
  Float8Row<T> of_float8[kTensors];
  if constexpr (kTwice) {
    each_of<kTensors>([&](int t) {
      if (!move.tensors[t].is_float8()) return;
      const int8_t exponent = move.tensors[t].exponents[row];
      of_float8[t] = {t > 1, exponent, std::ldexp(T(1), exponent)};
    });
    factor /= of_float8[0].unit;  // g is the gradient of what is stored
  }
  if (move.max_row_norm < kInfinity<T>) {
    T squares = 0;
    for (int64_t k = threadIdx.x * kPack; k < columns; k += kThreads * kPack) {
      const auto pack = load<kPack>(g + k);
      for (int l = 0; l < kPack; ++l) squares += factor * pack.values[l] * (factor * pack.values[l]);
    }
    const T norm = std::sqrt(reduce<kThreads>(squares, Sum()));
    if (norm > move.max_row_norm) factor *= move.max_row_norm / norm;
  }

  const int64_t counters = (columns + kNoise - 1) / kNoise * kCounters;
  // Calls body(new numbers of each tensor, kOctet apart; the first of them; the octet) for this thread's octets.
  const auto each_octet = [&](auto body) {
    for (int64_t c = threadIdx.x; c < counters; c += kThreads) {
      const int64_t first = c / kCounters * kNoise + c % kCounters * 2;
      if (first >= columns) continue;
      T gradient[kOctet] = {}, numbers[kTensors * kOctet] = {};
      load_octet<kPack>(g, first, columns, gradient);
      each_of<kTensors>([&](int t) {
        if (!move.tensors[t].exists()) return;
        load_octet<kPack, kTwice>(move.tensors[t], row, first, columns, numbers + t * kOctet);
        if constexpr (kTwice) of_float8[t].read(numbers + t * kOctet);
      });
      for (int e = 0; e < kOctet; ++e) {
        numbers[e] = advance(move.step, factor * gradient[e], numbers[e], numbers + kOctet + e,
                             move.tensors[kTensors - 1].exists());
      }
      body(numbers, first, c);
    }
  };
  T stretch = 1;  // of a row of the weight
  if constexpr (kTwice) {
    T largest[kTensors] = {}, squares = 0;
    each_octet([&](const T* numbers, int64_t first, int64_t) {
      each_pack<kPack>(first, columns, [&](int64_t, int e) {
        for (int l = 0; l < kPack; ++l) squares += numbers[e + l] * numbers[e + l];
      });
      each_of<kTensors>([&](int t) {
        for (int e = 0; e < kOctet; ++e) {
          const T size = std::fabs(numbers[t * kOctet + e]);
          if (size > largest[t]) largest[t] = size;
        }
      });
    });
    if (move.weight_norm > 0) {
      const T norm = std::sqrt(reduce<kThreads>(squares, Sum()));
      stretch = move.weight_norm / (norm < static_cast<T>(kEps) ? static_cast<T>(kEps) : norm);
      largest[0] *= stretch;
    }
    each_of<kTensors>([&](int t) {
      if (!move.tensors[t].is_float8()) return;
      const int8_t exponent = of_float8[t].fit(reduce<kThreads>(largest[t], Max()));
      __syncwarp();  // every thread has read the one before
      if (threadIdx.x == 0) move.tensors[t].exponents[row] = exponent;
    });
  }
  each_octet([&](T* numbers, int64_t first, int64_t c) {
    if constexpr (kTwice) {
      for (int e = 0; e < kOctet; ++e) numbers[e] *= stretch;
    }
    each_of<kTensors>([&](int t) {
      if (!move.tensors[t].exists()) return;
      if constexpr (kTwice) of_float8[t].write(numbers + t * kOctet);
      store_octet<kPack, kTwice>(numbers + t * kOctet, move.tensors[t], row, first, columns, move.seed,
                                 row * counters + c);
    });
  });
}

template <typename T, typename Step>
void move_rows_by(const Step& step, const T* g, int64_t n, int64_t columns, const Weight& w, const int64_t* index,
                  int64_t first_row, const Update& update, Stream stream) {
  constexpr int kPair = 2;
  bool aligned = columns % kPair == 0 && is_aligned(g, kPair * sizeof(T));
  bool any_float8 = false;
  const auto moving = [&](void* data, DType dtype, int8_t* exponents, int64_t stride, int tensor) {
    if (dtype == DType::kFloat16) throw std::logic_error("Rows in float16 do not move.");
    aligned &= stride % kPair == 0 && is_aligned(data, kPair * size_of(dtype));
    any_float8 |= data != nullptr && dtype == DType::kFloat8;
    return Moving{data, dtype, stride, rounding_stream(update.step, tensor), exponents};
  };
  const auto factor = static_cast<T>(update.gradient_factor), longest = static_cast<T>(update.max_row_norm);
  const auto length = static_cast<T>(update.weight_norm);
  Movement<T, Step> move{step, factor, longest, length, update.seed, {}, update.finite};
  move.tensors[0] = moving(update.weight, w.dtype, update.weight_exponents, w.row_stride, kWeightTensor);
  for (int t = 0; t < Step::kStates; ++t) {
    const auto& [data, dtype, exponents] = update.state[t];
    move.tensors[1 + t] = moving(data, dtype, exponents, columns, t);
  }
  with_shape<kPair, kOctet / kPair>(columns, aligned, [&](auto shape) {
    using S = decltype(shape);
    const auto kernel = any_float8 || length > 0 ? move_rows_kernel<T, Step, S::kThreads, S::kPack, true>
                                                 : move_rows_kernel<T, Step, S::kThreads, S::kPack, false>;
    launch("move_rows", kernel, S::grid(n, 1), S::block(), stream, g, n, columns, index, first_row, move);
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
