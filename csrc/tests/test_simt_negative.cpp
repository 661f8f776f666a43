// Proof that the SIMT shim sees what a GPU would not forgive: each mode launches one wrong kernel.
#include "check.h"
#include "simt/simt.h"

namespace cosface::test {
namespace {

void launch(void (*kernel)(), unsigned threads = 32, size_t shared_bytes = 0) {
  simt::launch(kernel, dim3(1), dim3(threads), shared_bytes);
}

__global__ void half_of_them_wait() {
  if (threadIdx.x < 16) __syncthreads();
  if (threadIdx.x >= 16) __shfl_xor_sync(0xffff0000u, 1, 1);
}

__global__ void one_leaves() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void half_of_them_shuffle() {
  if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1, 1);
}

__global__ void all_shuffle_among_half() { __shfl_xor_sync(0x0000ffffu, 1, 1); }

__global__ void half_of_them_read_the_others() {
  if (threadIdx.x < 16) __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void past_static() {
  __shared__ int shared[32];
  volatile int* data = shared;
  data[threadIdx.x + 1] = 1;
}

__global__ void past_dynamic() {
  volatile int* data = static_cast<int*>(simt::dynamic_shared());
  data[threadIdx.x + 1] = 1;
}

__global__ void without_barrier() {
  __shared__ int shared[64];
  volatile int* data = shared;
  data[threadIdx.x] = data[63 - threadIdx.x];
}

__global__ void with_shuffle() {
  __shared__ int shared[32];
  volatile int* data = shared;
  data[threadIdx.x] = 1;
  __shfl_xor_sync(~0u, 1, 1);  // waits, but orders no memory
  data[31 - threadIdx.x] = 2;
}

__global__ void nothing() {}

}  // namespace
}  // namespace cosface::test

int main(int argc, char** argv) {
  using namespace cosface::test;
  return run_negative(argc, argv,
                      {{"divergent_barrier", [] { launch(half_of_them_wait); }},
                       {"left_before_barrier", [] { launch(one_leaves); }},
                       {"divergent_shuffle", [] { launch(half_of_them_shuffle); }},
                       {"lane_outside_mask", [] { launch(all_shuffle_among_half); }},
                       {"source_outside_mask", [] { launch(half_of_them_read_the_others); }},
                       {"huge_block", [] { launch(nothing, 1025); }},
                       {"static_overrun", [] { launch(past_static); }},
                       {"dynamic_overrun", [] { launch(past_dynamic, 32, 32 * sizeof(int)); }},
                       {"removed_barrier", [] { launch(without_barrier, 64); }},
                       {"shuffle_for_barrier", [] { launch(with_shuffle); }}});
}
