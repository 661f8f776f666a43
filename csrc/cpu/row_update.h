// How rows of the weight move.
#pragma once

#include <algorithm>
#include <cmath>

#include "float8.h"
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
    auto* stored = static_cast<char*>(update_.weight) + row * weight_.row_stride * size_of(weight_.dtype);
    T* moved = reinterpret_cast<T*>(stored);
    if (!is<T>(weight_.dtype)) moved = std::copy_n(w, d_, static_cast<T*>(weight_copy_)) - d_;
    RowGradient<T> g{dw, projection, static_cast<T>(update_.gradient_factor)};
    if (weight_.dtype == DType::kFloat8) {  // dw is the gradient of what is stored
      const T unit = std::ldexp(T(1), update_.weight_exponents[row]);
      kernels<T>().times(moved, d_, unit);
      g.projection /= unit;
      g.factor /= unit;
    }
    if (std::isfinite(update_.max_row_norm)) {
      const T norm = kernels<T>().gradient_norm(g, moved, d_), most = static_cast<T>(update_.max_row_norm);
      if (norm > most) g.factor *= most / norm;
    }
    T* state[3];
    for (int64_t k = 0; k < 3; ++k) state[k] = loaded_state(k, row);
    if (update_.rule == Update::Rule::kSgd) {
      kernels<T>().sgd(g, moved, state[0], d_, sgd_);
    } else {
      kernels<T>().adamw(g, moved, state[0], state[1], state[2], d_, adamw_);
    }
    if (update_.weight_norm > 0) {
      T inv_norm;
      kernels<T>().inverse_norms(moved, 1, d_, d_, &inv_norm);
      kernels<T>().times(moved, d_, static_cast<T>(update_.weight_norm) * inv_norm);
    }
    if (!is<T>(weight_.dtype)) {
      save(moved, {stored, weight_.dtype, update_.weight_exponents}, kWeightTensor, row, false);
    }
    for (int64_t k = 0; k < 3; ++k) {
      const auto& [_, dtype, exponents] = update_.state[k];
      if (state[k] == nullptr || is<T>(dtype)) continue;
      save(state[k], {stored_state(k, row), dtype, exponents}, k, row, is_square(k));
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
    T* const copy = state_copy_ + k * d_;
    kernels<T>().load(stored_state(k, row), update_.state[k].dtype, d_, copy);
    if (update_.state[k].dtype == DType::kFloat8) {
      kernels<T>().times(copy, d_, std::ldexp(T(1), update_.state[k].exponents[row]));
      if (is_square(k)) kernels<T>().squares(copy, d_);
    }
    return copy;
  }

  // Whether a state is one of AdamW's squares, which have twice the range of a gradient: float8 keeps their roots.
  // None becomes 0 by rounding, or its element would leap.
  bool is_square(int64_t k) const { return update_.rule == Update::Rule::kAdamW && k > 0; }

  // A row of T, which is overwritten, in its own dtype.
  void save(T* from, const Update::State& to, int64_t tensor, int64_t row, bool roots) const {
    const uint64_t stream = rounding_stream(update_.step, tensor);
    if (to.dtype == DType::kFloat8) {
      T largest = kernels<T>().largest(from, d_);
      if (roots) largest = std::sqrt(largest);
      const int8_t exponent = to.exponents[row] = float8_exponent(largest, to.exponents[row]);
      if (roots) kernels<T>().roots(from, d_, largest > 0 ? std::ldexp(T(1), exponent - 9) : 0);
      kernels<T>().times(from, d_, std::ldexp(T(1), -exponent));
    }
    if (to.dtype == DType::kFloat8 || to.dtype == DType::kBFloat16) {
      kernels<T>().store_stochastic(from, d_, to.data, to.dtype, update_.seed, stream, row);
    } else {
      kernels<T>().store(from, d_, to.data, to.dtype);
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
