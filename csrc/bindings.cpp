// The pybind11 module cosface_kernels._C.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "array.h"
#include "cpu/memory.h"
#include "environment.h"
#include "lmcl.h"
#ifdef COSFACE_CUDA
#include <cuda_runtime_api.h>

#include "cuda/bindings.h"
#endif

namespace py = pybind11;

namespace {

using cosface::Array;
using cosface::torch;
using Polynomials = std::array<std::array<double, 5>, 2>;

void require(int32_t error) {
  if (error != 0) throw std::runtime_error("torch could not run the kernels on its threads.");
}

// What torch's threads run. An exception must not pass through C: the first waits until all have ended.
struct Work {
  const std::function<void(int64_t)>& body;
  std::once_flag failed;
  std::exception_ptr error;

  static void run(int64_t first, int64_t last, void* context) {
    auto* work = static_cast<Work*>(context);
    try {
      for (int64_t part = first; part < last; ++part) work->body(part);
    } catch (...) {
      std::call_once(work->failed, [&] { work->error = std::current_exception(); });
    }
  }
};

cosface::Runtime runtime() {
  uint32_t threads = 1;
  require(torch.count_threads(&threads));
  return {
      static_cast<int>(threads),
      [](int64_t parts, const std::function<void(int64_t)>& body) {
        Work work{body};
        require(torch.parallel_for(0, parts, 1, Work::run, &work));
        if (work.error) std::rethrow_exception(work.error);
      },
      cosface::classes_in_environment("COSFACE_CPU_TILE").value_or(0),
  };
}

// What a call of the op is given, as cosface_kernels/backends/cpu.py prepares it: contiguous, and in the dtype of
// all arithmetic but for w, of whose rows the elements are adjacent.
struct Call {
  Array x, w, targets;
  std::optional<Array> scale;
  bool bfloat16;  // x was given in it
  std::optional<Array> classes, cache, thresholds, exponents;
  int64_t entry_bytes;  // at the front of the cache; the rest is for cosines
  bool exact_cosines, normalize_weight;
  double gradient_tolerance;
  int64_t subcenters;
  std::optional<std::array<double, 6>> negatives;
  std::optional<std::string> sigmoid;
  std::optional<Polynomials> polynomials;

  int64_t samples() const { return x.size(0); }
  bool in_double() const { return x.dtype() == cosface::DType::kFloat64; }

  // scales: of the samples, where the call has none.
  template <typename T>
  cosface::Batch<T> batch(const std::vector<T>& scales = {}) const {
    const int64_t* y = targets.data<int64_t>();
    const T* s = scale ? scale->data<T>() : scales.data();
    cosface::Batch<T> batch{x.data<T>(), y, s, samples(), x.size(1)};
    batch.bfloat16 = bfloat16;
    if (targets.dim() == 2) batch.second = y + samples();
    if (negatives) {
      const auto [q, a, b, r, u, v] = *negatives;
      const auto t = [](double number) { return static_cast<T>(number); };
      batch.negatives = {thresholds->data<T>(), t(q), t(a), t(b), t(r), t(u), t(v)};
    }
    if (sigmoid) {
      batch.sigmoid.emplace().by_angle = *sigmoid == "angle";
      if (polynomials) {
        std::copy_n((*polynomials)[0].begin(), 5, batch.sigmoid->value);
        std::copy_n((*polynomials)[1].begin(), 5, batch.sigmoid->slope);
      }
    }
    return batch;
  }

  cosface::Weight weight() const { return cosface::weight_of(w); }

  cosface::Options options() const {
    cosface::Options options{.subcenters = subcenters,
                             .normalize_weight = normalize_weight,
                             .exponents = cosface::data_of<int8_t>(exponents),
                             .gradient_tolerance = gradient_tolerance,
                             .exact_cosines = exact_cosines};
    if (classes) options.classes = classes->data<int64_t>(), options.count = classes->numel();
    if (cache && cache->numel() > 0) {
      options.entries = cache->data<char>();
      options.entry_bytes = entry_bytes;
      options.cosines = cache->data<char>() + entry_bytes;
      options.cosine_bytes = cache->numel() - entry_bytes;
    }
    return options;
  }
};

// body(a T), of the dtype of all arithmetic.
template <typename Body>
void in_dtype(const Call& call, Body body) {
  call.in_double() ? body(double{}) : body(float{});
}

// loss, top, log_sum, target_cos, max_neg and, if wanted, moments.
void forward(const Call& call, double margin, const std::array<Array, 5>& results,
             const std::optional<Array>& moments) {
  in_dtype(call, [&]<typename T>(T) {
    const auto& [loss, top, log_sum, target_cos, max_neg] = results;
    cosface::lmcl_forward<T>(call.batch<T>(), call.weight(), static_cast<T>(margin), call.options(), runtime(),
                             {loss.data<T>(), top.data<T>(), log_sum.data<T>(), target_cos.data<T>(),
                              max_neg.data<T>(), cosface::data_of<T>(moments)});
  });
}

// upstream: top, log_sum, g_lse and g_cos. Of the others, what is not given is not wanted.
void backward_with(const cosface::Update* update, const Call& call, const std::array<Array, 4>& upstream,
                   const std::optional<Array>& g_moments, const std::optional<Array>& dx,
                   const std::optional<Array>& dw, const Array& dscale, const std::optional<Array>& sums) {
  in_dtype(call, [&]<typename T>(T) {
    const auto& [top, log_sum, g_lse, g_cos] = upstream;
    cosface::lmcl_backward<T>(
        call.batch<T>(), call.weight(),
        {top.data<T>(), log_sum.data<T>(), g_lse.data<T>(), g_cos.data<T>(), cosface::data_of<T>(g_moments)},
        call.options(), runtime(),
        {cosface::data_of<T>(dx), cosface::data_of(dw), dscale.data<T>(), update, cosface::data_of<T>(sums)});
  });
}

void backward(const Call& call, const std::array<Array, 4>& upstream, const std::optional<Array>& g_moments,
              const std::optional<Array>& dx, const std::optional<Array>& dw, const Array& dscale,
              const std::optional<Array>& sums) {
  backward_with(nullptr, call, upstream, g_moments, dx, dw, dscale, sums);
}

// Plain LMCL from labels to the reduced loss, and back: what cosface_kernels/stages.py and ops.fold_loss
// define, in two calls, because their small tensor operations take longer than the kernels do for a thousand
// classes.
struct Rule {
  double scale, margin;
  int64_t ignore_index;
  bool validate_labels;
  std::string reduction;

  static constexpr int64_t kIgnored = -1, kInvalid = -2;

  // Of labels in place, as ops.targets.
  void to_targets(int64_t* labels, int64_t n, int64_t classes) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = labels[i];
      if (label >= 0 && label < classes && label != ignore_index) continue;
      if (label != ignore_index && validate_labels) {
        throw std::invalid_argument("labels must be in [0, " + std::to_string(classes) +
                                    ") or equal to ignore_index " + std::to_string(ignore_index) + ", got " +
                                    std::to_string(label) + " at row " + std::to_string(i) + ".");
      }
      labels[i] = label == ignore_index ? kIgnored : kInvalid;
    }
  }

  // What the sum of the losses is divided by.
  double divisor(const int64_t* target, int64_t n) const {
    return reduction == "mean" ? static_cast<double>(n - std::count(target, target + n, kIgnored)) : 1;
  }
};

// What the sum of the losses is divided by. The call's targets are labels at first, and it has no scale. rows: (4,
// N), what forward makes beside the losses.
double loss_forward(const Call& call, const Rule& rule, const Array& losses, const Array& rows) {
  in_dtype(call, [&]<typename T>(T) {
    const int64_t n = call.samples();
    int64_t* target = call.targets.data<int64_t>();
    rule.to_targets(target, n, call.w.size(0));
    const std::vector<T> scales(n, static_cast<T>(rule.scale));
    T *loss = losses.data<T>(), *row = rows.data<T>();
    cosface::lmcl_forward<T>(call.batch(scales), call.weight(), static_cast<T>(rule.margin), call.options(),
                             runtime(), {loss, row, row + n, row + 2 * n, row + 3 * n});
    for (int64_t i = 0; i < n; ++i) {
      if (target[i] == Rule::kInvalid) loss[i] = std::numeric_limits<T>::quiet_NaN();
    }
  });
  return rule.divisor(call.targets.data<int64_t>(), call.samples());
}

void loss_backward(const Call& call, const Rule& rule, const Array& rows, const Array& g_loss,
                   const std::optional<Array>& dx, const std::optional<Array>& dw) {
  in_dtype(call, [&]<typename T>(T) {
    const int64_t n = call.samples(), *target = call.targets.data<int64_t>();
    const T *g = g_loss.data<T>(), *top = rows.data<T>(), *log_sum = top + n, *target_cos = log_sum + n;
    const T scale = static_cast<T>(rule.scale), margin = static_cast<T>(rule.margin);
    const T divisor = static_cast<T>(rule.divisor(target, n));
    const std::vector<T> scales(n, scale);
    std::vector<T> g_lse(n), g_cos(n), dscale(n);
    for (int64_t i = 0; i < n; ++i) {
      const T g_i = (rule.reduction == "none" ? g[i] : g[0]) / divisor;
      if (target[i] < 0 || g_i == 0) continue;  // no gradient stays none where the loss is nan
      const T excess = log_sum[i] + scale * (top[i] - (target_cos[i] - margin));
      g_lse[i] = g_i / (1 + std::exp(-excess));
      g_cos[i] = -scale * g_lse[i];
    }
    cosface::lmcl_backward<T>(call.batch(scales), call.weight(), {top, log_sum, g_lse.data(), g_cos.data()},
                              call.options(), runtime(),
                              {cosface::data_of<T>(dx), cosface::data_of(dw), dscale.data()});
  });
}

// Of the call, x and w alone are read, and whether w is normalised.
void nearest(const Call& call, int64_t k, const Array& cos, const Array& classes) {
  in_dtype(call, [&]<typename T>(T) {
    cosface::nearest_classes<T>(call.batch<T>(), call.weight(), call.options(), k, runtime(), cos.data<T>(),
                                classes.data<int64_t>());
  });
}

void backward_update(const Call& call, const std::array<Array, 4>& upstream, const std::optional<Array>& g_moments,
                     const std::optional<Array>& dx, const Array& dscale, const cosface::Update& numbers,
                     const std::vector<Array>& state) {
  const cosface::Update update = cosface::bound(numbers, call.w, state);
  backward_with(&update, call, upstream, g_moments, dx, {}, dscale, {});
}

void apply_update(const Array& w, const Array& dw, const cosface::Update& numbers,
                  const std::vector<Array>& state) {
  const auto apply =
      w.dtype() == cosface::DType::kFloat64 ? cosface::apply_update<double> : cosface::apply_update<float>;
  apply(cosface::weight_of(w), dw.data<void>(), w.size(1), cosface::bound(numbers, w, state), runtime());
}

// How many threads a call is spread over: fewer than torch has, if this module was built without OpenMP.
int64_t threads() {
  const cosface::Runtime torch_threads = runtime();
  std::vector<std::thread::id> ids(torch_threads.threads);
  torch_threads.parallel(torch_threads.threads, [&](int64_t part) { ids[part] = std::this_thread::get_id(); });
  return static_cast<int64_t>(std::set<std::thread::id>(ids.begin(), ids.end()).size());
}

void use_huge_pages(const Array& fresh) { cosface::use_huge_pages(fresh.data<void>(), fresh.bytes()); }

void normal_(const Array& tensor, uint64_t seed, double std, int64_t start) {
  use_huge_pages(tensor);
  cosface::fill_normal(tensor.data<void>(), tensor.dtype(), start, tensor.numel(), seed, std, runtime());
}

// A tensor of this shape and the dtype of another, in the pages of one of its size that was freed or in fresh
// ones; None if the system has no such pages.
py::object take_pages(std::vector<int64_t> shape, const Array& like) {
  struct Pages {
    cosface::dlpack::Managed managed;
    std::vector<int64_t> shape, strides;
    size_t bytes;
  };
  auto pages = std::make_unique<Pages>();
  pages->strides.resize(shape.size());
  int64_t numel = 1;
  for (size_t k = shape.size(); k-- > 0; numel *= shape[k]) pages->strides[k] = numel;
  pages->bytes = numel * like.view().dtype.bits / 8;
  void* data = cosface::take_pages(pages->bytes);
  if (data == nullptr) return py::none();
  pages->shape = std::move(shape);
  pages->managed = {.major = torch.exchange->major, .minor = torch.exchange->minor, .context = pages.get()};
  pages->managed.deleter = [](cosface::dlpack::Managed* managed) {
    const std::unique_ptr<Pages> pages(static_cast<Pages*>(managed->context));
    cosface::give_pages(managed->tensor.data, pages->bytes);
  };
  pages->managed.tensor = {.data = data,
                           .device = {cosface::dlpack::kCpu, 0},
                           .dim = static_cast<int32_t>(pages->shape.size()),
                           .dtype = like.view().dtype,
                           .shape = pages->shape.data(),
                           .strides = pages->strides.data()};
  void* tensor = nullptr;
  if (torch.exchange->to_python(&pages->managed, &tensor) != 0) throw py::error_already_set();
  pages.release();  // the tensor has it
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  m.def("use_torch", cosface::use_torch);
  m.attr("compiler") = COSFACE_COMPILER;
  py::class_<Call>(m, "Call")
      .def(py::init([](Array x, Array w, Array targets, std::optional<Array> scale, bool bfloat16,
                       std::optional<Array> classes, std::optional<Array> cache, std::optional<Array> thresholds,
                       std::optional<Array> exponents, int64_t entry_bytes, bool exact_cosines,
                       bool normalize_weight, double gradient_tolerance, int64_t subcenters,
                       std::optional<std::array<double, 6>> negatives, std::optional<std::string> sigmoid,
                       const std::optional<Polynomials>& polynomials) {
             return Call{
                 std::move(x),       std::move(w),     std::move(targets),    std::move(scale),     bfloat16,
                 std::move(classes), std::move(cache), std::move(thresholds), std::move(exponents), entry_bytes,
                 exact_cosines,      normalize_weight, gradient_tolerance,    subcenters,           negatives,
                 std::move(sigmoid), polynomials};
           }),
           py::arg("x"), py::arg("w"), py::arg("targets"), py::arg("scale"), py::kw_only(), py::arg("bfloat16"),
           py::arg("classes"), py::arg("cache"), py::arg("thresholds"), py::arg("exponents"),
           py::arg("entry_bytes"), py::arg("exact_cosines"), py::arg("normalize_weight"),
           py::arg("gradient_tolerance"), py::arg("subcenters"), py::arg("negatives"), py::arg("sigmoid"),
           py::arg("polynomials"))
      .def("forward", forward, no_gil)
      .def("backward", backward, no_gil)
      .def("backward_update", backward_update, no_gil)
      .def("loss_forward", loss_forward, no_gil)
      .def("loss_backward", loss_backward, no_gil)
      .def("nearest", nearest, no_gil);
  py::class_<Rule>(m, "Rule")
      .def(py::init<double, double, int64_t, bool, std::string>(), py::kw_only(), py::arg("scale"),
           py::arg("margin"), py::arg("ignore_index"), py::arg("validate_labels"), py::arg("reduction"))
      .def_readonly("reduction", &Rule::reduction);
  py::class_<cosface::Update>(m, "Update")
      .def(py::init<>())
      .def_property(
          "rule", [](const cosface::Update& u) { return u.rule == cosface::Update::Rule::kSgd ? "sgd" : "adamw"; },
          [](cosface::Update& u, const std::string& rule) {
            u.rule = rule == "sgd" ? cosface::Update::Rule::kSgd : cosface::Update::Rule::kAdamW;
          })
      .def_readwrite("step", &cosface::Update::step)
      .def_readwrite("seed", &cosface::Update::seed)
      .def_readwrite("gradient_factor", &cosface::Update::gradient_factor)
      .def_readwrite("max_row_norm", &cosface::Update::max_row_norm)
      .def_readwrite("weight_norm", &cosface::Update::weight_norm)
      .def_readwrite("lr", &cosface::Update::lr)
      .def_readwrite("weight_decay", &cosface::Update::weight_decay)
      .def_readwrite("momentum", &cosface::Update::momentum)
      .def_readwrite("dampening", &cosface::Update::dampening)
      .def_readwrite("nesterov", &cosface::Update::nesterov)
      .def_readwrite("beta1", &cosface::Update::beta1)
      .def_readwrite("beta2", &cosface::Update::beta2)
      .def_readwrite("eps", &cosface::Update::eps);
  m.def("apply_update", apply_update, no_gil);
  m.def("normal_", normal_, no_gil);
  m.def("take_pages", take_pages);
  m.attr("MANY_BYTES") = cosface::kManyBytes;
  m.def("use_huge_pages", use_huge_pages);
  m.def("threads", threads, no_gil);
  m.def("instruction_set", cosface::instruction_set);
  m.def("multiplies_bfloat16", cosface::multiplies_bfloat16, py::arg("gradient_tolerance"));
#ifdef COSFACE_CUDA
  // This module's runtime has a current device of its own.
  cosface::cuda::define(m, [](const Array& tensor) {
    const int device = tensor.view().device.index;
    if (cudaSetDevice(device) != cudaSuccess) {
      throw std::runtime_error("CUDA device " + std::to_string(device) +
                               " cannot be used: " + cudaGetErrorString(cudaGetLastError()) + ".");
    }
  });
  m.attr("cuda_version") = CUDART_VERSION;
#endif
}
