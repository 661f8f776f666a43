// The CUDA kernels in a Python module, over Arrays: in cosface_kernels._C, and in the tests' module on the host.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "array.h"
#include "cuda/kernels.h"

namespace cosface::cuda {

namespace py = pybind11;

inline Rows rows_of(const Array& v) { return {v.data<void>(), v.dtype(), v.size(0), v.size(1), v.stride(0)}; }

// cosface::cuda::Chunk, of any dtype.
struct ChunkOfAny {
  std::optional<Array> dot;
  int64_t classes, first_class;
  Array x_inv_norm, w_inv_norm, targets, scale;
  int64_t segments;
  std::optional<Array> tau, coefficients, kept;
  int64_t kept_stride;

  template <typename T>
  Chunk<T> in() const {
    const int64_t n = scale.size(0);
    int64_t* y = targets.data<int64_t>();
    return {data_of<T>(dot),
            n,
            classes,
            first_class,
            x_inv_norm.data<T>(),
            w_inv_norm.data<T>(),
            y,
            scale.data<T>(),
            segments,
            data_of<T>(tau),
            data_of<T>(coefficients),
            data_of<Kept<T>>(kept),
            kept_stride,
            targets.dim() == 2 ? y + n : nullptr};
  }
};

// body(a T), of the dtype of sums.
template <typename Body>
void in_dtype_of(const Array& sums, Body body) {
  sums.dtype() == DType::kFloat64 ? body(double{}) : body(float{});
}

template <typename T>
RunningStatistics<T> running_in(const std::array<std::optional<Array>, 4>& running) {
  const auto& [top, max_cos, sum_exp, moments] = running;
  return {data_of<T>(top), data_of<T>(max_cos), data_of<double>(sum_exp), data_of<double>(moments)};
}

// top, log_sum, g_lse, g_cos and, if any, g_moments.
using GivenUpstream = std::array<std::optional<Array>, 5>;

template <typename T>
Upstream<T> upstream_in(const GivenUpstream& upstream) {
  const auto& [top, log_sum, g_lse, g_cos, g_moments] = upstream;
  return {data_of<T>(top), data_of<T>(log_sum), data_of<T>(g_lse), data_of<T>(g_cos), data_of<T>(g_moments)};
}

// on(tensor): makes its device the one on which kernels are launched. Local to the module, because a process may
// have both.
template <typename On>
void define(py::module_& m, On on) {
  using Given = const Array&;
  using GivenIf = const std::optional<Array>&;
  const auto stream_of = [](uintptr_t stream) { return reinterpret_cast<Stream>(stream); };
  m.attr("GRADIENT_LIFT") = kGradientLift;
  m.attr("EMBEDDING_LIFT") = kEmbeddingLift;
  py::class_<ChunkOfAny>(m, "Chunk", py::module_local())
      .def(py::init([](std::optional<Array> dot, int64_t classes, int64_t first_class, Array x_inv_norm,
                       Array w_inv_norm, Array targets, Array scale, int64_t segments, std::optional<Array> tau,
                       std::optional<Array> coefficients, std::optional<Array> kept, int64_t kept_stride) {
        return ChunkOfAny{
            std::move(dot),     classes,          first_class, std::move(x_inv_norm), std::move(w_inv_norm),
            std::move(targets), std::move(scale), segments,    std::move(tau),        std::move(coefficients),
            std::move(kept),    kept_stride};
      }));
  m.def("row_norms", [=](Given v, Given inv_norm, uintptr_t stream) {
    on(v);
    in_dtype_of(inv_norm, [&]<typename T>(T) { row_norms<T>(rows_of(v), inv_norm.data<T>(), stream_of(stream)); });
  });
  m.def("normalize_rows", [=](Given v, Given inv_norm, GivenIf factor, Given hat, uintptr_t stream) {
    on(v);
    in_dtype_of(inv_norm, [&]<typename T>(T) {
      normalize_rows<T>(rows_of(v), inv_norm.data<T>(), data_of<T>(factor), hat.data<void>(), stream_of(stream));
    });
  });
  m.def("class_statistics", [=](const ChunkOfAny& chunk, const std::array<std::optional<Array>, 4>& running,
                                Given target_cos, uintptr_t stream) {
    on(target_cos);
    in_dtype_of(target_cos, [&]<typename T>(T) {
      class_statistics<T>(chunk.in<T>(), running_in<T>(running), target_cos.data<T>(), stream_of(stream));
    });
  });
  m.def("merge_statistics", [=](const std::array<std::optional<Array>, 4>& running, Given targets, Given scale,
                                double margin, const std::array<Array, 6>& results, uintptr_t stream) {
    on(scale);
    in_dtype_of(scale, [&]<typename T>(T) {
      const auto& [loss, top, log_sum, target_cos, max_neg, moments] = results;
      merge_statistics<T>(running_in<T>(running), running[0]->size(0), scale.size(0), targets.data<int64_t>(),
                          scale.data<T>(), static_cast<T>(margin),
                          {loss.data<T>(), top.data<T>(), log_sum.data<T>(), target_cos.data<T>(),
                           max_neg.data<T>(), moments.data<T>()},
                          stream_of(stream));
    });
  });
  m.def("logit_gradients", [=](const ChunkOfAny& chunk, const GivenUpstream& upstream, Given unit, Given g,
                               Given of_rows, uintptr_t stream) {
    on(g);
    in_dtype_of(unit, [&]<typename T>(T) {
      logit_gradients<T>(chunk.in<T>(), upstream_in<T>(upstream), unit.data<T>(), g.data<void>(), g.dtype(),
                         of_rows.data<double>(), stream_of(stream));
    });
  });
  m.def("sigmoid_gradients", [=](const ChunkOfAny& chunk, const GivenUpstream& upstream, GivenIf polynomials,
                                 Given unit, Given g, Given of_rows, uintptr_t stream) {
    on(g);
    in_dtype_of(unit, [&]<typename T>(T) {
      sigmoid_gradients<T>(chunk.in<T>(), upstream_in<T>(upstream), data_of<T>(polynomials), unit.data<T>(),
                           g.data<void>(), g.dtype(), of_rows.data<double>(), stream_of(stream));
    });
  });
  m.def("project_rows",
        [=](Given g, bool divided, Given v, Given inv_norm, Given factor, Given out, uintptr_t stream) {
          on(g);
          in_dtype_of(g, [&]<typename T>(T) {  // a factor for each row, or one number
            project_rows<T>(g.data<T>(), divided, rows_of(v), inv_norm.data<T>(), factor.data<T>(), factor.dim(),
                            out.data<void>(), out.dtype(), stream_of(stream));
          });
        });
  m.def("move_rows", [=](Given g, Given w, GivenIf index, int64_t first_row, const Update& numbers,
                         const std::vector<Array>& state, GivenIf finite, uintptr_t stream) {
    on(g);
    Update update = bound(numbers, w, state);
    update.finite = data_of<bool>(finite);
    in_dtype_of(g, [&]<typename T>(T) {
      move_rows<T>(g.data<T>(), g.size(0), g.size(1), weight_of(w), data_of<int64_t>(index), first_row, update,
                   stream_of(stream));
    });
  });
}

}  // namespace cosface::cuda
