// Backend `cuda` on the host, for tests: the unchanged driver and kernels, on the SIMT shim, over tensors on the
// CPU.
#include <torch/extension.h>

#include "cuda/driver.h"

namespace {

using at::Tensor;

// So small that even a test's problem is several chunks, and a row of one several blocks.
const cosface::cuda::Device kDevice{.stream = nullptr, .l2_bytes = 1 << 15, .processors = 4, .least_chunk = 512};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cuda_forward", [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                           bool normalize_weight, const std::optional<Tensor>& thresholds,
                           const std::optional<Tensor>& negatives) {
    return cosface::cuda::forward(x, w, y, s, margin, {normalize_weight, thresholds, negatives}, kDevice);
  });
  m.def("cuda_backward",
        [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& lse,
           const Tensor& g_lse, const Tensor& g_cos, bool need_dx, bool need_dw, bool normalize_weight,
           const std::optional<Tensor>& thresholds, const std::optional<Tensor>& negatives) {
          return cosface::cuda::backward(x, w, y, s, lse, g_lse, g_cos, {normalize_weight, thresholds, negatives},
                                         need_dx, need_dw, kDevice);
        });
}
