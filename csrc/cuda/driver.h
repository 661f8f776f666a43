// The op on a device: library matrix products and the kernels of kernels.h, chunk by chunk of the classes. With
// chosen classes, their rows of one chunk at a time are copied, because a library's product cannot read rows that
// lie apart.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/kernels.h"
#include "tensor.h"

namespace cosface::cuda {

struct Device {
  Stream stream;
  int64_t processors;
  int64_t largest_workspace = std::numeric_limits<int64_t>::max();  // bytes; less only in tests
};

// As in cosface_kernels/options.py.
struct Options {
  std::optional<at::Tensor> classes;
  at::Tensor cache;  // uint8, which forward fills with norms, and with the cosines of as many classes as fit
  bool normalize_weight = true;
  std::optional<at::Tensor> thresholds, negatives;
  int64_t workspace_bytes = 256 << 20;
  bool moments = false;
  std::optional<at::Tensor> g_moments;
  Sigmoids sigmoid = {};  // with one nothing is read from the cache
  std::optional<at::Tensor> exponents = {};
};

// As in cosface_kernels.reference: loss, top, log_sum, target_cos, max_neg, and the moments, empty if not wanted.
std::array<at::Tensor, 6> forward(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                  const at::Tensor& s, double margin, const Options& options,
                                  const Device& device);

// dx, dw and dscale; what is not needed comes back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& x, const at::Tensor& w,
                                                        const at::Tensor& y, const at::Tensor& s,
                                                        const at::Tensor& top, const at::Tensor& log_sum,
                                                        const at::Tensor& g_lse, const at::Tensor& g_cos,
                                                        const Options& options, bool need_dx, bool need_dw,
                                                        const Device& device);

// cosface_kernels.reference's sigmoid_sums, (2, N), with backward's dx, dw and dscale in the same pass.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sigmoid(const at::Tensor& x, const at::Tensor& w,
                                                                   const at::Tensor& y, const at::Tensor& s,
                                                                   const at::Tensor& bias, const at::Tensor& g,
                                                                   const at::Tensor& g_cos, const Options& options,
                                                                   bool need_dx, bool need_dw,
                                                                   const Device& device);

// dx and dscale; the rows of w that take part move, chunk by chunk, and so does their state, unless `finite`, 0-d,
// is there and false. No dw exists. `numbers`: as cosface_kernels/options.py's Update has them.
std::tuple<at::Tensor, at::Tensor> backward_update(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                                   const at::Tensor& s, const at::Tensor& top,
                                                   const at::Tensor& log_sum, const at::Tensor& g_lse,
                                                   const at::Tensor& g_cos, const Options& options,
                                                   const Update& numbers, const std::vector<at::Tensor>& state,
                                                   const std::optional<at::Tensor>& finite, bool need_dx,
                                                   const Device& device);

// Moves all rows of w by dw.
void apply_update(const at::Tensor& w, const at::Tensor& dw, const Update& numbers,
                  const std::vector<at::Tensor>& state, const Device& device);

}  // namespace cosface::cuda
