// The functions of backend `cuda` in a Python module: in cosface_kernels._C, and in the tests' module on the host.
#pragma once

#include <torch/extension.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/driver.h"

namespace cosface::cuda {

// with_device(tensor, body): what body(the Device of the tensor) returns. Local to the module, because a process
// may have both.
template <typename WithDevice>
void define(py::module_& m, WithDevice with_device) {
  using at::Tensor;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<Options>(m, "CudaOptions", py::module_local())
      .def(py::init([](std::optional<Tensor> classes, Tensor cache, bool normalize_weight,
                       std::optional<Tensor> thresholds, std::optional<Tensor> negatives, int64_t workspace_bytes,
                       bool moments, std::optional<Tensor> g_moments, std::optional<std::string> sigmoid,
                       std::optional<Tensor> polynomials, std::optional<Tensor> exponents) {
             return Options{std::move(classes),
                            std::move(cache),
                            normalize_weight,
                            std::move(thresholds),
                            std::move(negatives),
                            workspace_bytes,
                            moments,
                            std::move(g_moments),
                            {std::move(sigmoid), std::move(polynomials)},
                            std::move(exponents)};
           }),
           py::kw_only(), py::arg("classes"), py::arg("cache"), py::arg("normalize_weight"), py::arg("thresholds"),
           py::arg("negatives"), py::arg("workspace_bytes"), py::arg("moments"), py::arg("g_moments"),
           py::arg("sigmoid"), py::arg("polynomials"), py::arg("exponents"));
  m.def(
      "cuda_forward",
      [=](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
          const Options& options) {
        return with_device(x, [&](const Device& device) { return forward(x, w, y, s, margin, options, device); });
      },
      no_gil);
  m.def(
      "cuda_backward",
      [=](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& top,
          const Tensor& log_sum, const Tensor& g_lse, const Tensor& g_cos, const Options& options, bool need_dx,
          bool need_dw) {
        return with_device(x, [&](const Device& device) {
          return backward(x, w, y, s, top, log_sum, g_lse, g_cos, options, need_dx, need_dw, device);
        });
      },
      no_gil);
  m.def(
      "cuda_sigmoid",
      [=](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& bias, const Tensor& g,
          const Tensor& g_cos, const Options& options, bool need_dx, bool need_dw) {
        return with_device(x, [&](const Device& device) {
          return sigmoid(x, w, y, s, bias, g, g_cos, options, need_dx, need_dw, device);
        });
      },
      no_gil);
  m.def(
      "cuda_backward_update",
      [=](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& top,
          const Tensor& log_sum, const Tensor& g_lse, const Tensor& g_cos, const Options& options,
          const Update& numbers, const std::vector<Tensor>& state, const std::optional<Tensor>& finite,
          bool need_dx) {
        return with_device(x, [&](const Device& device) {
          return backward_update(x, w, y, s, top, log_sum, g_lse, g_cos, options, numbers, state, finite, need_dx,
                                 device);
        });
      },
      no_gil);
  m.def(
      "cuda_apply_update",
      [=](const Tensor& w, const Tensor& dw, const Update& numbers, const std::vector<Tensor>& state) {
        with_device(w, [&](const Device& device) { apply_update(w, dw, numbers, state, device); });
      },
      no_gil);
}

}  // namespace cosface::cuda
