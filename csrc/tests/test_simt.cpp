// The SIMT shim itself: what kernels see of the machine.
#include <cmath>
#include <numeric>
#include <vector>

#include "check.h"
#include "formats.h"
#include "simt/simt.h"

namespace cosface::test {
namespace {

__global__ void write_indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += static_cast<int>(100 * block + thread);
}

void every_thread_of_every_block() {
  Exact<int> out(2 * 3 * 2 * 24, 0);
  simt::launch(write_indices, dim3(2, 3, 2), dim3(4, 3, 2), 0, static_cast<int*>(out));
  for (int i = 0; i < out.size(); ++i) CHECK(out[i] == 100 * (i / 24) + i % 24, i, out[i]);
  simt::launch(write_indices, dim3(0), dim3(32), 0, nullptr);
}

// The sum of a block: within warps by shuffles, between them through shared memory.
__global__ void sum(const double* values, double* total) {
  __shared__ double parts[32];
  double value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) value += parts[warp];
  __syncthreads();
  if (threadIdx.x == 0) parts[0] = 0;
  total[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

void sums_over_blocks() {
  for (unsigned threads : {32, 64, 1024}) {
    Exact<double> values(3 * threads), total(3 * threads);
    std::iota(values.begin(), values.end(), 1.0);
    simt::launch(sum, dim3(3), dim3(threads), 0, static_cast<const double*>(values), static_cast<double*>(total));
    for (int64_t i = 0; i < total.size(); ++i) {
      const double first = values[i / threads * threads];
      CHECK(total[i] == threads * first + threads * (threads - 1.0) / 2, i, threads, total[i]);
    }
  }
}

// Lanes that went different ways exchange among their own.
__global__ void exchange_by_halves(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
    out[lane] += 100 * __shfl_sync(0x0000ffffu, lane, 3);
  } else {
    out[lane] = __shfl_xor_sync(0xffff0000u, lane, 8);
  }
}

__global__ void reverse_warp(unsigned* out) {
  __shared__ unsigned shared[32];
  shared[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = shared[31 - threadIdx.x];
}

// The lanes' second exchange waits for nobody who still reads the first.
__global__ void exchange_many(unsigned* out) {
  unsigned value = threadIdx.x;
  for (int i = 0; i < 100; ++i) value = __shfl_sync(~0u, value, threadIdx.x + 1);
  out[threadIdx.x] = value;
}

void shuffles() {
  Exact<unsigned> out(32, 0u);
  simt::launch(exchange_many, dim3(1), dim3(32), 0, static_cast<unsigned*>(out));
  for (unsigned i = 0; i < 32; ++i) CHECK(out[i] == (i + 100) % 32, i, out[i]);
}

void diverged_lanes() {
  Exact<unsigned> out(32, 0u);
  simt::launch(exchange_by_halves, dim3(1), dim3(32), 0, static_cast<unsigned*>(out));
  for (unsigned i = 0; i < 32; ++i) CHECK(out[i] == (i < 16 ? (i ^ 1) + 300 : i ^ 8), i, out[i]);
  simt::launch(reverse_warp, dim3(1), dim3(32), 0, static_cast<unsigned*>(out));
  for (unsigned i = 0; i < 32; ++i) CHECK(out[i] == 31 - i, i, out[i]);
}

__global__ void read_and_write_dynamic(double* found) {
  auto* shared = static_cast<double*>(simt::dynamic_shared());
  found[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 1;
}

void fresh_shared_memory_is_nan() {
  Exact<double> found(2 * 32, 0.0);
  simt::launch(read_and_write_dynamic, dim3(2), dim3(32), 32 * sizeof(double), static_cast<double*>(found));
  for (double v : found) CHECK(std::isnan(v), v);
}

void formats() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto narrow = static_cast<uint16_t>(bits);
    __half half;
    __nv_bfloat16 brain;
    std::memcpy(static_cast<void*>(&half), &narrow, 2);
    std::memcpy(static_cast<void*>(&brain), &narrow, 2);
    const double want[] = {kHalf.decode(narrow), kBrain.decode(narrow)};
    const float got[] = {__half2float(half), __bfloat162float(brain)};
    for (int k : {0, 1}) CHECK(got[k] == want[k] || (std::isnan(got[k]) && std::isnan(want[k])), bits, k, got[k]);
  }
  for (uint32_t step = 0; step < 1 << 16; ++step) {
    const float v = float_of(step * 65537u ^ step >> 3);  // all exponents, many fractions
    if (std::isnan(v)) continue;
    uint16_t half, brain;
    const __half as_half = __float2half_rn(v);
    const __nv_bfloat16 as_brain = __float2bfloat16_rn(v);
    std::memcpy(&half, &as_half, 2);
    std::memcpy(&brain, &as_brain, 2);
    CHECK(half == kHalf.encode(v), v, half, kHalf.encode(v));
    CHECK(brain == kBrain.encode(v), v, brain, kBrain.encode(v));
  }
  const __nv_bfloat16 nan = __float2bfloat16_rn(std::numeric_limits<float>::quiet_NaN());
  CHECK(std::isnan(__bfloat162float(nan)));
}

void all() {
  every_thread_of_every_block();
  sums_over_blocks();
  shuffles();
  diverged_lanes();
  fresh_shared_memory_is_nan();
  formats();
}

}  // namespace
}  // namespace cosface::test

int main() { return cosface::test::run(cosface::test::all); }
