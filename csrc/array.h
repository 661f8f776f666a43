// Tensors as Python hands them over. Of torch the module knows the table of C functions that DLPack defines and
// torch has had since 2.10: it is built without torch, and one build serves all of them. Nothing is checked here
// that cosface_kernels/backends/contract.py has checked.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "lmcl.h"

namespace cosface {

// https://dmlc.github.io/dlpack/latest/c_api.html, version 1.
namespace dlpack {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBFloat = 4, kFloat8E4m3fn = 10;

struct Device {
  int32_t type, index;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dim;
  DataType dtype;
  int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

struct Managed {
  uint32_t major, minor;
  void* context;
  void (*deleter)(Managed*);
  uint64_t flags;
  Tensor tensor;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void *allocate, *managed_from_python;  // not used here
  int (*to_python)(Managed* tensor, void** object);
  int (*from_python)(void* object, Tensor* borrowed);
  int (*current_stream)(int32_t device_type, int32_t device, void** stream);
};

}  // namespace dlpack

// torch's table, and its pool of threads.
struct Torch {
  const dlpack::Exchange* exchange = nullptr;
  int32_t (*parallel_for)(int64_t first, int64_t last, int64_t grain, void (*body)(int64_t, int64_t, void*),
                          void* context) = nullptr;
  int32_t (*count_threads)(uint32_t* count) = nullptr;
};
inline Torch torch;  // of cosface_kernels/backends/extension.py

// A tensor, which it keeps alive.
class Array {
 public:
  Array() = default;
  explicit Array(pybind11::object tensor) : owner_(std::move(tensor)) {
    if (torch.exchange->from_python(owner_.ptr(), &view_) != 0) throw pybind11::error_already_set();
    if (view_.data == nullptr && numel() != 0) {  // a wrapper of others, or zeros that torch does not store
      throw pybind11::value_error("The kernels got a tensor without memory of its own.");
    }
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }
  int dim() const { return view_.dim; }
  int64_t size(int k) const { return view_.shape[k]; }
  int64_t stride(int k) const { return view_.strides[k]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int k = 0; k < dim(); ++k) product *= size(k);
    return product;
  }
  int64_t bytes() const { return numel() * view_.dtype.bits / 8; }
  const dlpack::Tensor& view() const { return view_; }

  DType dtype() const {
    const auto [code, bits, lanes] = view_.dtype;
    if (code == dlpack::kFloat8E4m3fn) return DType::kFloat8;
    if (code == dlpack::kBFloat) return DType::kBFloat16;
    return bits == 64 ? DType::kFloat64 : bits == 32 ? DType::kFloat32 : DType::kFloat16;
  }

 private:
  pybind11::object owner_;
  dlpack::Tensor view_ = {};
};

template <typename T = void>
T* data_of(const std::optional<Array>& array) {
  return array ? array->data<T>() : nullptr;
}

// The addresses of torch's C functions, by cosface_kernels/backends/extension.py.
inline void use_torch(pybind11::handle exchange, uintptr_t parallel_for, uintptr_t count_threads) {
  const auto* table =
      static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw pybind11::error_already_set();
  if (table->major != 1) {
    throw std::runtime_error("it has version " + std::to_string(table->major) + " of DLPack, not 1");
  }
  torch.exchange = table;
  torch.parallel_for = reinterpret_cast<decltype(torch.parallel_for)>(parallel_for);
  torch.count_threads = reinterpret_cast<decltype(torch.count_threads)>(count_threads);
}

inline Weight weight_of(const Array& w) { return {w.data<void>(), w.dtype(), w.size(0), w.stride(0)}; }

// The numbers of cosface_kernels/options.py's Update, with the weight and the state that it moves: behind the
// tensors of the state are the exponents of each of these, w first, that is in float8, in their order.
inline Update bound(Update update, const Array& w, const std::vector<Array>& state) {
  auto exponents = std::find_if(state.begin(), state.end(), [](const Array& each) { return each.dim() == 1; });
  const auto next = [&](const Array& rows) {
    return rows.dtype() == DType::kFloat8 ? (exponents++)->data<int8_t>() : nullptr;
  };
  const size_t count = exponents - state.begin();
  update.weight = w.data<void>();
  update.weight_exponents = next(w);
  for (size_t k = 0; k < count; ++k) update.state[k] = {state[k].data<void>(), state[k].dtype(), next(state[k])};
  return update;
}

}  // namespace cosface

namespace pybind11::detail {

template <>
struct type_caster<cosface::Array> {
  PYBIND11_TYPE_CASTER(cosface::Array, const_name("torch.Tensor"));

  bool load(handle tensor, bool) {
    value = cosface::Array(reinterpret_borrow<object>(tensor));
    return true;
  }
};

}  // namespace pybind11::detail
