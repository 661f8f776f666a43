// What the C++ side asks of torch's tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "lmcl.h"

namespace cosface {

inline DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating dtype, got ", tensor.scalar_type(), ".");
  }
}

// Whether all arithmetic is in double.
inline bool in_double(const at::Tensor& x, const at::Tensor& w) {
  return x.scalar_type() == at::kDouble || w.scalar_type() == at::kDouble;
}

// Rows of w whose elements are adjacent: w itself if they are.
inline at::Tensor with_adjacent_elements(const at::Tensor& w) {
  return w.stride(1) == 1 || w.size(1) == 1 ? w : w.contiguous();
}

// The weight, whose rows are adjacent elements.
inline Weight weight_of(const at::Tensor& w) { return {w.const_data_ptr(), dtype_of(w), w.size(0), w.stride(0)}; }

// An update in progress: cosface_kernels/options.py's Update, the weight and the optimizer's state.
inline Update bound(Update update, const at::Tensor& w, const std::vector<at::Tensor>& state) {
  update.weight = w.mutable_data_ptr();
  update.state_dtype = state.empty() ? dtype_of(w) : dtype_of(state[0]);
  for (size_t k = 0; k < 3; ++k) update.state[k] = k < state.size() ? state[k].mutable_data_ptr() : nullptr;
  return update;
}

}  // namespace cosface
