// What the C++ side asks of torch's tensors: nothing reaches a kernel by its pointer that has not been checked
// here.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "lmcl.h"

namespace cosface {

inline DType dtype_of(const at::Tensor& tensor, const char* name = "A tensor") {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    case at::kFloat8_e4m3fn:
      return DType::kFloat8;
    default:
      TORCH_CHECK_TYPE(false, name,
                       " must be float64, float32, bfloat16 or float16, or of a weight float8_e4m3fn, got ",
                       tensor.scalar_type(), ".");
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

// The tensor, if its storage holds all of it, which may have been freed or shrunk under it.
inline const at::Tensor& allocated(const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0) return tensor;
  int64_t elements = tensor.storage_offset() + 1;
  for (int64_t k = 0; k < tensor.dim(); ++k) elements += (tensor.size(k) - 1) * tensor.stride(k);
  const size_t needed = elements * tensor.element_size(), there = tensor.storage().nbytes();
  TORCH_CHECK_VALUE(needed <= there, name, " of shape ", tensor.sizes(), " needs ", needed,
                    " bytes of memory, but its storage has ", there, ".");
  return tensor;
}

// The tensor, if it has this shape and device, and memory.
inline const at::Tensor& fitting(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                                 at::Device device) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ", tensor.sizes(), ".");
  TORCH_CHECK_VALUE(tensor.device() == device, name, " must be on device ", device, ", got it on ",
                    tensor.device(), ".");
  return allocated(name, tensor);
}

inline const at::Tensor& fitting(const char* name, const at::Tensor& tensor, at::IntArrayRef shape,
                                 at::Device device, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, " must have dtype ", dtype, ", got ", tensor.scalar_type(),
                   ".");
  return fitting(name, tensor, shape, device);
}

// Those of the rows of w, in float8.
inline const at::Tensor& check_exponents(const at::Tensor& exponents, const at::Tensor& w) {
  fitting("exponents", exponents, {w.size(0)}, w.device(), at::kChar);
  TORCH_CHECK_VALUE(exponents.is_contiguous(), "exponents must be contiguous to be moved in place, got strides ",
                    exponents.strides(), ".");
  return exponents;
}

// Bytes that kernels may see as numbers.
inline void check_cache(const at::Tensor& cache, at::Device device) {
  fitting("cache", cache, {cache.numel()}, device, at::kByte);
  TORCH_CHECK_VALUE(cache.is_contiguous() && reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % 64 == 0,
                    "cache must be contiguous and aligned to 64 bytes, as lmcl returns it.");
}

// cosface_kernels/options.py's sigmoid and polynomials.
struct Sigmoids {
  std::optional<std::string> name;
  std::optional<at::Tensor> polynomials;  // (2, 5)

  void check(at::Device device, bool softmax) const {
    TORCH_CHECK_VALUE(!name || *name == "cross_entropy" || *name == "angle",
                      "sigmoid must be None or one of cross_entropy, angle, got '", name.value_or(""), "'.");
    TORCH_CHECK_VALUE((name == "cross_entropy") == polynomials.has_value(),
                      "polynomials must be given with sigmoid 'cross_entropy' and with no other.");
    TORCH_CHECK_VALUE(!name || !softmax,
                      "moments, thresholds and a gradient_tolerance belong to a softmax, got "
                      "them with sigmoid '",
                      name.value_or(""), "'.");
    if (polynomials) fitting("polynomials", *polynomials, {2, 5}, device);
  }

  // With coefficients in the memory of a CPU.
  template <typename T>
  std::optional<Sigmoid<T>> in() const {
    if (!name) return std::nullopt;
    Sigmoid<T> sigmoid{*name == "angle"};
    if (polynomials) {
      const at::Tensor k = polynomials->to(c10::CppTypeToScalarType<T>::value).contiguous();
      std::copy_n(k.const_data_ptr<T>(), 5, sigmoid.value);
      std::copy_n(k.const_data_ptr<T>() + 5, 5, sigmoid.slope);
    }
    return sigmoid;
  }
};

// What every call of the op is given.
struct Inputs {
  const at::Tensor &x, &w, &y, &s;
  const std::optional<at::Tensor>&classes, &thresholds, &negatives;
  bool moments = false;  // whether targets may be (2, N)
  int64_t subcenters = 1;

  const Inputs& checked() const {
    for (const auto& [name, rows] : {std::pair{"x", &x}, std::pair{"w", &w}}) {
      TORCH_CHECK_VALUE(rows->dim() == 2 && rows->size(1) > 0, name, " must have shape (rows, D), got ",
                        rows->sizes(), ".");
      dtype_of(*rows, name);
    }
    TORCH_CHECK_TYPE(dtype_of(x) != DType::kFloat8, "x must be float64, float32, bfloat16 or float16, got ",
                     x.scalar_type(), ".");
    allocated("x", x);
    const int64_t n = x.size(0);
    const at::Device device = x.device();
    fitting("w", w, {w.size(0), x.size(1)}, device);
    const int64_t two_rows[] = {2, n}, has_second = moments && y.dim() == 2;
    fitting("targets", y, at::IntArrayRef(two_rows + !has_second, 1 + has_second), device, at::kLong);
    fitting("scale", s, {n}, device);
    TORCH_CHECK_VALUE(thresholds.has_value() == negatives.has_value(),
                      "thresholds and negatives must be given together.");
    if (thresholds) {
      fitting("thresholds", *thresholds, {n}, device);
      fitting("negatives", *negatives, {negatives->numel() == 6 ? 6 : 3}, device);
    }
    if (classes) check_classes();
    TORCH_CHECK_VALUE(subcenters >= 1 && subcenters <= kMostSubcenters, "subcenters must be in [1, ",
                      kMostSubcenters, "], got ", subcenters, ".");
    const int64_t rows = classes ? classes->numel() : w.size(0);
    TORCH_CHECK_VALUE(rows % subcenters == 0, "the rows of w that take part must be a multiple of subcenters ",
                      subcenters, ", got ", rows, ".");
    return *this;
  }

 private:
  // On a GPU looking at them would wait for it.
  void check_classes() const {
    fitting("classes", *classes, {classes->numel()}, x.device(), at::kLong);
    if (!classes->is_cpu()) return;
    const at::Tensor numbers = classes->contiguous();
    const int64_t* j = numbers.const_data_ptr<int64_t>();
    for (int64_t k = 0; k < numbers.numel(); ++k) {
      TORCH_CHECK_VALUE(j[k] > (k == 0 ? -1 : j[k - 1]) && j[k] < w.size(0), "classes must ascend within [0, ",
                        w.size(0), "), got ", j[k], " at place ", k, ".");
    }
  }
};

// top, log_sum, g_lse, g_cos and g_moments in the dtype of the results: (N) each, but g_cos in the shape of the
// targets y, and g_moments (2, N), or undefined.
inline std::vector<at::Tensor> upstream_of(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                                           const at::Tensor& top, const at::Tensor& log_sum,
                                           const at::Tensor& g_lse, const at::Tensor& g_cos,
                                           const std::optional<at::Tensor>& g_moments) {
  const at::ScalarType dtype = in_double(x, w) ? at::kDouble : at::kFloat;
  const auto rows = [&](const char* name, const at::Tensor& values, at::IntArrayRef shape) {
    return fitting(name, values, shape, x.device(), dtype).contiguous();
  };
  const int64_t n = x.size(0);
  return {rows("top", top, {n}), rows("log_sum", log_sum, {n}), rows("g_lse", g_lse, {n}),
          rows("g_cos", g_cos, y.sizes()), g_moments ? rows("g_moments", *g_moments, {2, n}) : at::Tensor()};
}

inline std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

inline DType movable(const char* name, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(rows.is_contiguous(), name, " must be contiguous to be moved in place, got strides ",
                    rows.strides(), ".");
  const DType dtype = dtype_of(rows, name);
  TORCH_CHECK_TYPE(dtype != DType::kFloat16, name,
                   " must be float64, float32, bfloat16 or float8_e4m3fn to move, got float16.");
  return dtype;
}

// An update in progress: cosface_kernels/options.py's Update, the weight and the optimizer's state, behind which
// are the exponents of each of these that is in float8, in their order.
inline Update bound(Update update, const at::Tensor& w, const std::vector<at::Tensor>& state) {
  const bool sgd = update.rule == Update::Rule::kSgd;
  TORCH_CHECK_VALUE(w.dim() == 2, "w must have shape (C, D), got ", w.sizes(), ".");
  const size_t count =
      std::count_if(state.begin(), state.end(), [](const auto& each) { return each.scalar_type() != at::kChar; });
  TORCH_CHECK_VALUE(sgd ? count <= 1 : count == 2 || count == 3, sgd ? "sgd" : "adamw", " must have ",
                    sgd ? "at most one tensor" : "two or three tensors", " of state, got ", count, ".");
  size_t next = count;
  const auto exponents = [&](const char* name, DType dtype) -> int8_t* {
    if (dtype != DType::kFloat8) return nullptr;
    TORCH_CHECK_VALUE(next < state.size(), name, " in float8 needs exponents of its rows, got ",
                      state.size() - count, " tensors of some.");
    return check_exponents(state[next++], w).mutable_data_ptr<int8_t>();
  };
  const DType of_weight = movable("w", allocated("w", w));
  update.weight = w.mutable_data_ptr();
  update.weight_exponents = exponents("w", of_weight);
  for (size_t k = 0; k < 3; ++k) update.state[k] = {nullptr, DType::kFloat32};
  for (size_t k = 0; k < count; ++k) {
    const DType dtype = movable("state", fitting("state", state[k], w.sizes(), w.device()));
    update.state[k] = {state[k].mutable_data_ptr(), dtype, exponents("state", dtype)};
  }
  TORCH_CHECK_VALUE(next == state.size(), "exponents must be those of what is in float8, got ",
                    state.size() - next, " tensors more.");
  return update;
}

// The gradient that moves w, as apply_update takes it.
inline at::Tensor gradient_of(const at::Tensor& w, const at::Tensor& dw) {
  const at::ScalarType dtype = w.scalar_type() == at::kFloat8_e4m3fn ? at::kFloat : w.scalar_type();
  return fitting("dw", dw, w.sizes(), w.device()).to(dtype).contiguous();
}

}  // namespace cosface
