// How a kernel is launched: on a GPU if nvcc compiles this, else on the shim of csrc/tests/simt, which runs the
// same kernels on the host.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "simt/simt.h"
#endif

namespace cosface::cuda {

// Throws std::runtime_error with the kernel's name if it cannot be launched. An empty grid launches nothing.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, [[maybe_unused]] Stream stream,
            Arguments... arguments) {
  if (grid.x == 0) return;
#ifdef __CUDACC__
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("The CUDA kernel ") + name +
                             " could not be launched: " + cudaGetErrorString(status) + ".");
  }
#else
  simt::count_launch(name);
  simt::launch(kernel, grid, block, 0, arguments...);
#endif
}

}  // namespace cosface::cuda
