// Backend `cuda` on the host, for tests: the unchanged kernels, on the SIMT shim, over tensors on the CPU.
#include "cuda/bindings.h"
#include "simt/simt.h"

PYBIND11_MODULE(cosface_cuda_host, m) {
  m.def("use_torch", cosface::use_torch);
  cosface::cuda::define(m, [](const cosface::Array&) {});
  m.def("take_launches", &simt::take_launches);
}
