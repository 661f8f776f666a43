// Runs CUDA kernels on the host, from their unchanged source, where sanitizers see them.
//
// Blocks run one after the other. The threads of a block are fibers of one processor, which switch where CUDA
// threads wait for each other, in an order that is always the same. ThreadSanitizer is told of every fiber and of
// every barrier, so it reports what two threads of a block touch without a barrier between.
//
// A wait that cannot end, a lane that is named but absent and a launch beyond a GPU's limits end the program with
// a message. Not seen: races between blocks. A static __shared__ array keeps what the block before left in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <type_traits>

#ifdef SIMT_TOOLKIT
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>
#undef __device__
#undef __global__
#undef __shared__
#else
#include "simt/stand_ins.h"
#endif

#define __device__
#define __global__
#define __shared__ static
#define threadIdx (::simt::thread().index)
#define blockIdx (::simt::block().index)
#define blockDim (::simt::block().threads)
#define gridDim (::simt::block().grid)

namespace simt {

struct Thread {
  dim3 index;
  unsigned number;  // in its block
};

struct Block {
  dim3 index, threads, grid;
};

const Thread& thread();
const Block& block();

// The dynamic shared memory of this block. Its bits are 1 at the start: nan in any dtype.
void* dynamic_shared();

// Waits for the whole block; memory is in order afterwards.
void wait_for_block();

// Waits for the lanes in `mask`, with memory in order afterwards or, as in a shuffle, not. Returns the bits that
// lane `source` brought.
uint64_t exchange(const char* name, uint32_t mask, uint64_t bits, unsigned source, bool orders_memory);

void run(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);

void count_launch(const char* name);

// The launches of each kernel since the last call.
std::map<std::string, int64_t> take_launches();

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, size_t shared_bytes, Arguments... arguments) {
  run(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline unsigned lane() { return thread().number % 32; }

template <typename T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(name, mask, bits, source, false);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads() { simt::wait_for_block(); }

inline void __syncwarp(uint32_t mask = ~0u) { simt::exchange("__syncwarp", mask, 0, simt::lane(), true); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, unsigned source) {
  return simt::shuffle("__shfl_sync", mask, value, source % 32);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, unsigned flipped) {
  return simt::shuffle("__shfl_xor_sync", mask, value, simt::lane() ^ flipped);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  const unsigned source = simt::lane() + delta;
  return simt::shuffle("__shfl_down_sync", mask, value, source < 32 ? source : simt::lane());
}

// Products that no fma takes in: they go through memory.
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
