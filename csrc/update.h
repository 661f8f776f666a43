// The numbers of an Update in T, as one step needs them.
#pragma once

#include <cmath>

#include "lmcl.h"

namespace cosface {

template <typename T>
struct SgdStep {
  static constexpr int kStates = 1;  // momentum, if any
  T lr, weight_decay, momentum;
  T fresh;              // share of g in the momentum
  T from_g, from_mean;  // what w moves along: g + momentum x mean with nesterov, else the mean

  explicit SgdStep(const Update& u)
      : lr(static_cast<T>(u.lr)),
        weight_decay(static_cast<T>(u.weight_decay)),
        momentum(static_cast<T>(u.momentum)),
        fresh(static_cast<T>(1 - u.dampening)),
        from_g(u.nesterov ? 1 : 0),
        from_mean(u.nesterov ? momentum : 1) {}
};

template <typename T>
struct AdamWStep {
  static constexpr int kStates = 3;  // mean, mean square and, if any, its running maximum
  T kept, fresh1, beta2, fresh2;     // kept: of w by the decay
  T step_size, root_correction, eps;

  explicit AdamWStep(const Update& u)
      : kept(static_cast<T>(1 - u.lr * u.weight_decay)),
        fresh1(static_cast<T>(1 - u.beta1)),
        beta2(static_cast<T>(u.beta2)),
        fresh2(static_cast<T>(1 - u.beta2)),
        step_size(static_cast<T>(u.lr / (1 - std::pow(u.beta1, u.step)))),
        root_correction(static_cast<T>(std::sqrt(1 - std::pow(u.beta2, u.step)))),
        eps(static_cast<T>(u.eps)) {}
};

// The stream of Philox that rounds a tensor in a step. It is not 0, the stream of fill_normal: steps begin with 1.
constexpr int kWeightTensor = 3;  // after the tensors of the state
inline uint64_t rounding_stream(int64_t step, int64_t tensor) { return static_cast<uint64_t>(4 * step + tensor); }

}  // namespace cosface
