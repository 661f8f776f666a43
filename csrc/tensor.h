// What the C++ side asks of torch's tensors.
#pragma once

#include <ATen/core/Tensor.h>

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

}  // namespace cosface
