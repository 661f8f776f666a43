// Backend `cuda` on the host, for tests: the unchanged driver and kernels, on the SIMT shim, over tensors on the
// CPU.
#include "cuda/bindings.h"
#include "simt/simt.h"

namespace {

// So small that even a test's problem is several chunks, and a row of one several blocks.
const cosface::cuda::Device kDevice{.stream = nullptr, .processors = 4, .largest_workspace = 1 << 15};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  cosface::cuda::define(m, [](const at::Tensor&, auto body) { return body(kDevice); });
  m.def("take_launches", &simt::take_launches);
}
