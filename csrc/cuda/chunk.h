// A row of a chunk for the blocks that share it: its cosines, kept or computed, and its reshaped negatives.
#pragma once

#include <cstdint>

#include "cuda/rows.h"

namespace cosface::cuda {

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

// nan passes.
template <typename T>
__device__ T within_one(T cos) {
  return cos > 1 ? 1 : cos < -1 ? -1 : cos;
}

// The products of TensorFloat-32 make cosines of up to 1 + 2^-10, of which the integer would wrap around to -1.
__device__ inline int16_t keep(float cos) {
  return static_cast<int16_t>(__builtin_bit_cast(uint32_t, within_one(cos) * 32767.0f + kRoundToInteger));
}
__device__ inline double keep(double cos) { return cos; }
__device__ inline float recall(int16_t kept) { return kept * kCosineStep; }
__device__ inline double recall(double kept) { return kept; }

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
  T tau = kInfinity<T>, q = 0, a = 1, b = 0, r = 1, u = 0, v = 1;

  __device__ Reshape(const Chunk<T>& chunk, int64_t row) {
    if (chunk.tau == nullptr) return;
    tau = chunk.tau[row];
    q = chunk.coefficients[0], a = chunk.coefficients[1], b = chunk.coefficients[2];
    r = chunk.coefficients[3], u = chunk.coefficients[4], v = chunk.coefficients[5];
  }
  __device__ T value(T cos) const { return cos > tau ? (q * cos + a) * cos + b : r * cos; }
  __device__ T slope(T cos) const { return cos > tau ? u * cos + v : r; }
};

// The place of a row's second target in the chunk; negative if it has none.
template <typename T>
__device__ int64_t second_target(const Chunk<T>& chunk, int64_t row) {
  return chunk.second == nullptr ? -1 : chunk.second[row] - chunk.first_class;
}

constexpr int kChunkPack = 4;  // numbers of a chunk's row that a thread takes at once

template <typename T, typename Body>
void with_chunk_shape(const Chunk<T>& chunk, Body body) {
  const bool aligned = chunk.classes % kChunkPack == 0 && chunk.kept_stride % kChunkPack == 0 &&
                       is_aligned(chunk.kept, kChunkPack * sizeof(Kept<T>)) &&
                       is_aligned(chunk.w_inv_norm, kWidestLoad);
  with_shape<kChunkPack>(ceil_div(chunk.classes, chunk.segments), aligned, body);
}

}  // namespace cosface::cuda
