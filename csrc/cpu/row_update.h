// How rows of the weight move.
#pragma once

#include <algorithm>
#include <cmath>

#include "operands.h"

namespace cosface {

// Moves rows of the weight and of the optimizer's state: in place where these are in T, else in copies of a row.
template <typename T>
class RowUpdate {
 public:
  RowUpdate(const Update& update, const Weight& weight, const Options& options, int64_t d)
      : update_(update),
        weight_(weight),
        chosen_(options.classes),
        d_(d),
        sgd_(update),
        adamw_(update),
        weight_copy_(is<T>(weight.dtype) ? 0 : d),
        state_copy_(3 * d) {}

  // Class j of the call by its gradient dw before the projection; w is its row in T.
  void move(int64_t j, const T* dw, T projection, const T* w) const {
    const int64_t row = chosen_ ? chosen_[j] : j;
    RowGradient<T> g{dw, projection, static_cast<T>(update_.gradient_factor)};
    if (std::isfinite(update_.max_row_norm)) {
      const T norm = kernels<T>().gradient_norm(g, w, d_), most = static_cast<T>(update_.max_row_norm);
      if (norm > most) g.factor *= most / norm;
    }
    auto* stored = static_cast<char*>(update_.weight) + row * weight_.row_stride * size_of(weight_.dtype);
    T* moved = reinterpret_cast<T*>(stored);
    if (!is<T>(weight_.dtype)) moved = std::copy_n(w, d_, static_cast<T*>(weight_copy_)) - d_;
    T* state[3];
    for (int64_t k = 0; k < 3; ++k) state[k] = loaded_state(k, row);
    if (update_.rule == Update::Rule::kSgd) {
      kernels<T>().sgd(g, moved, state[0], d_, sgd_);
    } else {
      kernels<T>().adamw(g, moved, state[0], state[1], state[2], d_, adamw_);
    }
    if (!is<T>(weight_.dtype)) save(moved, stored, weight_.dtype, kWeightTensor, row);
    for (int64_t k = 0; k < 3; ++k) {
      const DType dtype = update_.state[k].dtype;
      if (state[k] != nullptr && !is<T>(dtype)) save(state[k], stored_state(k, row), dtype, k, row);
    }
  }

  // Where the first state of these classes is kept, which lie apart if they were chosen.
  Ahead ahead(int64_t first, int64_t classes) const {
    if (chosen_ != nullptr || update_.state[0].data == nullptr) return {};
    return {reinterpret_cast<uintptr_t>(stored_state(0, first)),
            reinterpret_cast<uintptr_t>(stored_state(0, first + classes))};
  }

 private:
  char* stored_state(int64_t k, int64_t row) const {
    return static_cast<char*>(update_.state[k].data) + row * d_ * size_of(update_.state[k].dtype);
  }

  T* loaded_state(int64_t k, int64_t row) const {
    if (update_.state[k].data == nullptr) return nullptr;
    if (is<T>(update_.state[k].dtype)) return reinterpret_cast<T*>(stored_state(k, row));
    kernels<T>().load(stored_state(k, row), update_.state[k].dtype, d_, state_copy_ + k * d_);
    return state_copy_ + k * d_;
  }

  void save(const T* from, void* to, DType dtype, int64_t tensor, int64_t row) const {
    if (dtype == DType::kBFloat16) {
      kernels<T>().store_stochastic(from, d_, to, update_.seed, rounding_stream(update_.step, tensor), row);
    } else {
      kernels<T>().store(from, d_, to, dtype);
    }
  }

  const Update& update_;
  const Weight& weight_;
  const int64_t* const chosen_;
  const int64_t d_;
  const SgdStep<T> sgd_;
  const AdamWStep<T> adamw_;
  Buffer<T> weight_copy_, state_copy_;
};

}  // namespace cosface
