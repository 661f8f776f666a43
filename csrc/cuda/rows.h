// A row of numbers for a warp or for a block: how it is loaded, converted and summed, and how many share it.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "float8.h"

namespace cosface::cuda {

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

struct Float8 {
  uint8_t bits;
};

template <typename To, typename From>
__device__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<From, Float8>) {
    return static_cast<To>(from_float8(v.bits));
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

// The row of this thread: blocks are (threads of a row, rows of the block).
__device__ inline int64_t this_row() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

template <typename T>
__device__ bool is_clamped(T inv_norm) {
  return inv_norm >= static_cast<T>(1) / static_cast<T>(kEps);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

inline bool is_aligned(const void* data, size_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

template <typename V>
bool rows_are_aligned(const Rows& v) {
  return v.columns % kVector<V> == 0 && v.stride % kVector<V> == 0 && is_aligned(v.data, kWidestLoad);
}

}  // namespace cosface::cuda
