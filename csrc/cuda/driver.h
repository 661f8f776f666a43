// The op on a device: library matrix products and the kernels of kernels.h, chunk by chunk of the classes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "cuda/kernels.h"

namespace cosface::cuda {

struct Device {
  Stream stream;
  int64_t l2_bytes, processors;
  int64_t least_chunk = 4096;  // classes; with fewer, the launches of a small batch would outlast its arithmetic
};

// As in cosface_kernels/options.py.
struct Options {
  bool normalize_weight = true;
  std::optional<at::Tensor> thresholds, negatives;
};

// As in cosface_kernels.reference: loss, lse, target_cos and max_neg.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& w,
                                                                   const at::Tensor& y, const at::Tensor& s,
                                                                   double margin, const Options& options,
                                                                   const Device& device);

// dx, dw and dscale; what is not needed comes back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& x, const at::Tensor& w,
                                                        const at::Tensor& y, const at::Tensor& s,
                                                        const at::Tensor& lse, const at::Tensor& g_lse,
                                                        const at::Tensor& g_cos, const Options& options,
                                                        bool need_dx, bool need_dw, const Device& device);

}  // namespace cosface::cuda
