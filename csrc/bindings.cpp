// The pybind11 module cosface_kernels._C.
#include <ATen/Parallel.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cpu/memory.h"
#include "environment.h"
#include "lmcl.h"
#include "tensor.h"
#ifdef COSFACE_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "cuda/bindings.h"
#endif

namespace {

using at::Tensor;

cosface::Runtime runtime() {
  return {
      at::get_num_threads(),
      [](int64_t parts, const std::function<void(int64_t)>& body) {
        at::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
          for (int64_t part = first; part < last; ++part) body(part);
        });
      },
      cosface::classes_in_environment("COSFACE_CPU_TILE").value_or(0),
  };
}

// cosface_kernels/options.py: the fields that the kernels see.
struct Options {
  std::optional<Tensor> classes;
  double gradient_tolerance;
  Tensor cache;         // uint8
  int64_t entry_bytes;  // at its front; the rest is for cosines
  bool exact_cosines, normalize_weight;
  std::optional<Tensor> thresholds, negatives;
  bool moments;
  std::optional<Tensor> g_moments;
  int64_t subcenters;
  cosface::Sigmoids sigmoid;
  std::optional<Tensor> exponents;

  cosface::Options raw() const {
    cosface::Options options{.normalize_weight = normalize_weight, .gradient_tolerance = gradient_tolerance};
    if (classes) options.classes = classes->const_data_ptr<int64_t>(), options.count = classes->numel();
    if (cache.numel() > 0) {
      options.entries = cache.mutable_data_ptr();
      options.entry_bytes = entry_bytes;
      options.cosines = static_cast<char*>(options.entries) + options.entry_bytes;
      options.cosine_bytes = cache.numel() - entry_bytes;
    }
    options.exact_cosines = exact_cosines;
    options.subcenters = subcenters;
    if (exponents) options.exponents = exponents->const_data_ptr<int8_t>();
    return options;
  }

  cosface::Inputs checked(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s) const {
    cosface::check_cache(cache, at::kCPU);
    TORCH_CHECK_VALUE(entry_bytes >= 0 && entry_bytes <= cache.numel() && entry_bytes % 64 == 0,
                      "entry_bytes must be a multiple of 64 and of the ", cache.numel(), " bytes of cache, got ",
                      entry_bytes, ".");
    TORCH_CHECK_VALUE(!moments || gradient_tolerance == 0, "moments cannot have a gradient_tolerance, got ",
                      gradient_tolerance, ".");
    TORCH_CHECK_VALUE(subcenters == 1 || gradient_tolerance == 0,
                      "sub-centres cannot have a gradient_tolerance, got ", gradient_tolerance,
                      " with subcenters ", subcenters, ".");
    if (exponents) cosface::check_exponents(*exponents, w);
    sigmoid.check(x.device(), thresholds || moments || g_moments || gradient_tolerance != 0);
    return cosface::Inputs{x, w, y, s, classes, thresholds, negatives, moments, subcenters}.checked();
  }
};

// The arguments of one call in the compute dtype T. Rows of w that are not adjacent elements are copied.
template <typename T>
struct Arguments {
  Tensor x, w, y, s, tau,
      coefficients;  // tau (N) and coefficients (3) or (6) are undefined where there are no thresholds
  bool bfloat16;
  std::optional<cosface::Sigmoid<T>> sigmoid;

  explicit Arguments(const cosface::Inputs& given, const cosface::Sigmoids& sigmoids = {})
      : x(in_t(given.x)),
        w(cosface::with_adjacent_elements(given.w)),
        y(given.y.contiguous()),
        s(in_t(given.s)),
        bfloat16(given.x.scalar_type() == at::kBFloat16),
        sigmoid(sigmoids.in<T>()) {
    if (!given.thresholds) return;
    tau = in_t(*given.thresholds);
    coefficients = in_t(*given.negatives);
  }

  static Tensor in_t(const Tensor& tensor) { return tensor.to(c10::CppTypeToScalarType<T>::value).contiguous(); }
  cosface::Batch<T> batch() const {
    cosface::Negatives<T> negatives;
    if (tau.defined()) {
      const T* c = coefficients.const_data_ptr<T>();
      negatives = {tau.const_data_ptr<T>(), c[0], c[1], c[2]};
      if (coefficients.numel() == 6) negatives.r = c[3], negatives.u = c[4], negatives.v = c[5];
    }
    return {x.const_data_ptr<T>(),
            y.const_data_ptr<int64_t>(),
            s.const_data_ptr<T>(),
            x.size(0),
            x.size(1),
            negatives,
            bfloat16,
            y.dim() == 2 ? y.const_data_ptr<int64_t>() + x.size(0) : nullptr,
            sigmoid};
  }
  cosface::Weight weight() const { return cosface::weight_of(w); }
};

template <typename T>
std::array<Tensor, 6> forward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                              const Options& options) {
  const Arguments<T> arguments(options.checked(x, w, y, s));
  Tensor loss = at::empty_like(arguments.s), top = at::empty_like(loss), log_sum = at::empty_like(loss),
         target_cos = at::empty(y.sizes(), loss.options()), max_neg = at::empty_like(loss);
  Tensor moments = at::empty({options.moments ? 4 : 0, x.size(0)}, loss.options());
  cosface::lmcl_forward<T>(arguments.batch(), arguments.weight(), static_cast<T>(margin), options.raw(), runtime(),
                           {loss.mutable_data_ptr<T>(), top.mutable_data_ptr<T>(), log_sum.mutable_data_ptr<T>(),
                            target_cos.mutable_data_ptr<T>(), max_neg.mutable_data_ptr<T>(),
                            options.moments ? moments.mutable_data_ptr<T>() : nullptr});
  return {loss, top, log_sum, target_cos, max_neg, moments};
}

// Uninitialised memory: for gigabytes, the pages of a tensor of the same size that was freed.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const size_t bytes = c10::multiply_integers(sizes) * options.dtype().itemsize();
  if (bytes < cosface::kManyBytes) return at::empty(sizes, options);
  if (void* data = cosface::take_pages(bytes)) {
    return at::from_blob(data, sizes, [bytes](void* pages) { cosface::give_pages(pages, bytes); }, options);
  }
  Tensor fresh = at::empty(sizes, options);
  cosface::use_huge_pages(fresh.mutable_data_ptr(), bytes);
  return fresh;
}

template <typename T>
cosface::Upstream<T> upstream(const std::vector<Tensor>& up) {
  return {up[0].const_data_ptr<T>(), up[1].const_data_ptr<T>(), up[2].const_data_ptr<T>(),
          up[3].const_data_ptr<T>(), up[4].defined() ? up[4].const_data_ptr<T>() : nullptr};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                            const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                            const Tensor& g_cos, const Options& options, bool need_dx,
                                            bool need_dw, const Tensor& sums) {
  const Arguments<T> arguments(options.checked(x, w, y, s), options.sigmoid);
  const std::vector<Tensor> up = cosface::upstream_of(x, w, y, top, log_sum, g_lse, g_cos, options.g_moments);
  Tensor dx = need_dx ? at::empty_like(arguments.x) : at::empty({0}, arguments.x.options());
  Tensor dw = need_dw ? empty({options.classes ? options.classes->numel() : w.size(0), w.size(1)}, w.options())
                      : at::empty({0}, w.options());
  Tensor dscale = at::empty_like(up[0]);
  TORCH_CHECK_TYPE(!need_dw || w.scalar_type() != at::kFloat8_e4m3fn,
                   "A weight in float8 has no gradient of its own.");
  cosface::lmcl_backward<T>(
      arguments.batch(), arguments.weight(), upstream<T>(up), options.raw(), runtime(),
      {need_dx ? dx.mutable_data_ptr<T>() : nullptr, need_dw ? dw.mutable_data_ptr() : nullptr,
       dscale.mutable_data_ptr<T>(), nullptr, sums.defined() ? sums.mutable_data_ptr<T>() : nullptr});
  return {dx.to(x.scalar_type()), dw, dscale};
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid(const Tensor& x, const Tensor& w, const Tensor& y,
                                                   const Tensor& s, const Tensor& bias, const Tensor& g,
                                                   const Tensor& g_cos, const Options& options, bool need_dx,
                                                   bool need_dw) {
  TORCH_CHECK_VALUE(options.sigmoid.name.has_value(), "sigmoid must be one of cross_entropy, angle, got None.");
  const Tensor log_sum = -cosface::fitting("bias", bias, {x.size(0)}, x.device());
  const Tensor sums = at::empty({2, x.size(0)}, log_sum.options());
  const auto [dx, dw, dscale] =
      backward<T>(x, w, y, s, at::zeros_like(log_sum), log_sum, g, g_cos, options, need_dx, need_dw, sums);
  return {sums, dx, dw, dscale};
}

// Plain LMCL from labels to the reduced loss, and back: what cosface_kernels/stages.py and ops.fold_loss
// define, in two calls, because their small tensor operations take longer than the kernels do for a thousand
// classes.
struct Rule {
  double scale, margin;
  int64_t ignore_index;
  bool validate_labels;
  std::string reduction;

  // As ops.targets.
  Tensor targets(const Tensor& labels, int64_t classes) const {
    Tensor targets = labels.to(at::kLong, /*non_blocking=*/false, /*copy=*/true).contiguous();
    int64_t* target = targets.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < targets.numel(); ++i) {
      const int64_t label = target[i];
      if (label >= 0 && label < classes && label != ignore_index) continue;
      TORCH_CHECK_VALUE(label == ignore_index || !validate_labels, "labels must be in [0, ", classes,
                        ") or equal to ignore_index ", ignore_index, ", got ", label, " at row ", i, ".");
      target[i] = label == ignore_index ? kIgnored : kInvalid;
    }
    return targets;
  }

  // What the sum of the losses is divided by.
  double divisor(const Tensor& targets) const {
    if (reduction != "mean") return 1;
    const int64_t* target = targets.const_data_ptr<int64_t>();
    return static_cast<double>(targets.numel() - std::count(target, target + targets.numel(), kIgnored));
  }

  static constexpr int64_t kIgnored = -1, kInvalid = -2;
};

template <typename T>
std::array<Tensor, 6> loss_forward(const Tensor& x, const Tensor& w, const Tensor& labels, const Rule& rule,
                                   const Options& options) {
  const Tensor targets = rule.targets(labels, w.size(0));
  const int64_t n = targets.numel(), *target = targets.const_data_ptr<int64_t>();
  const Tensor s = at::full({n}, rule.scale, x.options().dtype(c10::CppTypeToScalarType<T>::value));
  auto [loss, top, log_sum, target_cos, max_neg, moments] = forward<T>(x, w, targets, s, rule.margin, options);
  T* losses = loss.template mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    if (target[i] == Rule::kInvalid) losses[i] = std::numeric_limits<T>::quiet_NaN();
  }
  if (rule.reduction != "none") {
    loss = loss.sum() / rule.divisor(targets);
  }
  return {loss, targets, s, top, log_sum, target_cos};
}

template <typename T>
std::array<Tensor, 2> loss_backward(const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& s,
                                    const Tensor& top, const Tensor& log_sum, const Tensor& target_cos,
                                    const Tensor& g_loss, const Rule& rule, const Options& options, bool need_dx,
                                    bool need_dw) {
  const int64_t n = targets.numel(), *target = targets.const_data_ptr<int64_t>();
  const auto rows = [&](const char* name, const Tensor& given, bool per_sample = true) {
    const at::ScalarType dtype = c10::CppTypeToScalarType<T>::value;
    const std::vector<int64_t> shape(per_sample ? 1 : 0, n);
    return cosface::fitting(name, given, shape, at::kCPU, dtype).contiguous();
  };
  const Tensor of_loss = rows("the gradient of the loss", g_loss, rule.reduction == "none");
  const Tensor top_rows = rows("top", top), log_sum_rows = rows("log_sum", log_sum),
               cos_rows = rows("target_cos", target_cos);
  const T *g = of_loss.const_data_ptr<T>(), *tops = top_rows.const_data_ptr<T>(),
          *log_sums = log_sum_rows.const_data_ptr<T>(), *cos = cos_rows.const_data_ptr<T>();
  const T scale = static_cast<T>(rule.scale), margin = static_cast<T>(rule.margin);
  const T divisor = static_cast<T>(rule.divisor(targets));
  Tensor g_lse = at::zeros_like(top), g_cos = at::zeros_like(top);
  T *g_lses = g_lse.mutable_data_ptr<T>(), *g_coses = g_cos.mutable_data_ptr<T>();
  for (int64_t i = 0; i < n; ++i) {
    const T g_i = (rule.reduction == "none" ? g[i] : g[0]) / divisor;
    if (target[i] < 0 || g_i == 0) continue;  // no gradient stays none where the loss is nan
    const T excess = log_sums[i] + scale * (tops[i] - (cos[i] - margin));
    g_lses[i] = g_i / (1 + std::exp(-excess));
    g_coses[i] = -scale * g_lses[i];
  }
  const auto [dx, dw, dscale] =
      backward<T>(x, w, targets, s, top, log_sum, g_lse, g_cos, options, need_dx, need_dw, {});
  return {dx, dw};
}

template <typename T>
std::tuple<Tensor, Tensor> nearest(const Tensor& x, const Tensor& w, int64_t k, bool normalize_weight,
                                   const std::optional<Tensor>& exponents) {
  const Tensor none = at::full({x.size(0)}, -1, x.options().dtype(at::kLong)), s = at::ones_like(none);
  const std::optional<Tensor> absent;
  const Arguments<T> arguments(cosface::Inputs{x, w, none, s, absent, absent, absent}.checked());
  TORCH_CHECK_VALUE(k >= 1 && k <= w.size(0), "k must be in [1, ", w.size(0), "], got ", k, ".");
  Tensor cos = at::empty({x.size(0), k}, arguments.x.options());
  Tensor classes = at::empty({x.size(0), k}, none.options());
  cosface::Options options{.normalize_weight = normalize_weight};
  if (exponents) options.exponents = cosface::check_exponents(*exponents, w).const_data_ptr<int8_t>();
  cosface::nearest_classes<T>(arguments.batch(), arguments.weight(), options, k, runtime(),
                              cos.mutable_data_ptr<T>(), classes.mutable_data_ptr<int64_t>());
  return {cos, classes};
}

template <typename T>
std::tuple<Tensor, Tensor> backward_update(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                           const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                           const Tensor& g_cos, const Options& options,
                                           const cosface::Update& numbers, const std::vector<Tensor>& state,
                                           bool need_dx) {
  const Arguments<T> arguments(options.checked(x, w, y, s), options.sigmoid);
  const std::vector<Tensor> up = cosface::upstream_of(x, w, y, top, log_sum, g_lse, g_cos, options.g_moments);
  Tensor dx = need_dx ? at::empty_like(arguments.x) : at::empty({0}, arguments.x.options());
  Tensor dscale = at::empty_like(up[0]);
  const cosface::Update update = cosface::bound(numbers, w, state);
  cosface::lmcl_backward<T>(
      arguments.batch(), arguments.weight(), upstream<T>(up), options.raw(), runtime(),
      {need_dx ? dx.mutable_data_ptr<T>() : nullptr, nullptr, dscale.mutable_data_ptr<T>(), &update});
  return {dx.to(x.scalar_type()), dscale};
}

void apply_update(const Tensor& w, const Tensor& dw, const cosface::Update& numbers,
                  const std::vector<Tensor>& state) {
  const auto apply = w.scalar_type() == at::kDouble ? cosface::apply_update<double> : cosface::apply_update<float>;
  const cosface::Update update = cosface::bound(numbers, w, state);
  apply(cosface::weight_of(w), cosface::gradient_of(w, dw).const_data_ptr(), w.size(1), update, runtime());
}

// How many threads a call is spread over: fewer than torch has, if this module was built without OpenMP.
int64_t threads() {
  const int64_t parts = at::get_num_threads();
  std::vector<std::thread::id> ids(parts);
  runtime().parallel(parts, [&](int64_t part) { ids[part] = std::this_thread::get_id(); });
  return static_cast<int64_t>(std::set<std::thread::id>(ids.begin(), ids.end()).size());
}

void normal_(Tensor tensor, uint64_t seed, double std, int64_t start) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "normal_ needs a contiguous tensor, got strides ", tensor.strides(),
                    ".");
  cosface::use_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  cosface::fill_normal(tensor.mutable_data_ptr(), cosface::dtype_of(tensor), start, tensor.numel(), seed, std,
                       runtime());
}

#ifdef COSFACE_CUDA
cosface::cuda::Device cuda_device(int index) {
  int processors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  return {c10::cuda::getCurrentCUDAStream().stream(), processors};
}
#endif

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("torch_version") = TORCH_VERSION;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<Options>(m, "Options")
      .def(py::init([](std::optional<Tensor> classes, double gradient_tolerance, Tensor cache, int64_t entry_bytes,
                       bool exact_cosines, bool normalize_weight, std::optional<Tensor> thresholds,
                       std::optional<Tensor> negatives, bool moments, std::optional<Tensor> g_moments,
                       int64_t subcenters, std::optional<std::string> sigmoid, std::optional<Tensor> polynomials,
                       std::optional<Tensor> exponents) {
             return Options{cosface::contiguous(classes),
                            gradient_tolerance,
                            std::move(cache),
                            entry_bytes,
                            exact_cosines,
                            normalize_weight,
                            std::move(thresholds),
                            std::move(negatives),
                            moments,
                            std::move(g_moments),
                            subcenters,
                            {std::move(sigmoid), std::move(polynomials)},
                            std::move(exponents)};
           }),
           py::kw_only(), py::arg("classes"), py::arg("gradient_tolerance"), py::arg("cache"),
           py::arg("entry_bytes"), py::arg("exact_cosines"), py::arg("normalize_weight"), py::arg("thresholds"),
           py::arg("negatives"), py::arg("moments"), py::arg("g_moments"), py::arg("subcenters"),
           py::arg("sigmoid"), py::arg("polynomials"), py::arg("exponents"));
  m.def(
      "lmcl_forward",
      [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
         const Options& options) {
        return (cosface::in_double(x, w) ? forward<double> : forward<float>)(x, w, y, s, margin, options);
      },
      no_gil);
  m.def(
      "lmcl_backward",
      [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& top,
         const Tensor& log_sum, const Tensor& g_lse, const Tensor& g_cos, const Options& options, bool need_dx,
         bool need_dw) {
        return (cosface::in_double(x, w) ? backward<double> : backward<float>)(x, w, y, s, top, log_sum, g_lse,
                                                                               g_cos, options, need_dx, need_dw,
                                                                               {});
      },
      no_gil);
  m.def(
      "sigmoid",
      [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& bias, const Tensor& g,
         const Tensor& g_cos, const Options& options, bool need_dx, bool need_dw) {
        return (cosface::in_double(x, w) ? sigmoid<double> : sigmoid<float>)(x, w, y, s, bias, g, g_cos, options,
                                                                             need_dx, need_dw);
      },
      no_gil);
  m.def(
      "nearest",
      [](const Tensor& x, const Tensor& w, int64_t k, bool normalize_weight,
         const std::optional<Tensor>& exponents) {
        return (cosface::in_double(x, w) ? nearest<double> : nearest<float>)(x, w, k, normalize_weight, exponents);
      },
      no_gil);
  py::class_<Rule>(m, "Rule").def(py::init<double, double, int64_t, bool, std::string>(), py::kw_only(),
                                  py::arg("scale"), py::arg("margin"), py::arg("ignore_index"),
                                  py::arg("validate_labels"), py::arg("reduction"));
  m.def(
      "loss_forward",
      [](const Tensor& x, const Tensor& w, const Tensor& labels, const Rule& rule, const Options& options) {
        return (cosface::in_double(x, w) ? loss_forward<double> : loss_forward<float>)(x, w, labels, rule,
                                                                                       options);
      },
      no_gil);
  m.def(
      "loss_backward",
      [](const Tensor& x, const Tensor& w, const Tensor& targets, const Tensor& s, const Tensor& top,
         const Tensor& log_sum, const Tensor& target_cos, const Tensor& g_loss, const Rule& rule,
         const Options& options, bool need_dx, bool need_dw) {
        return (cosface::in_double(x, w) ? loss_backward<double>
                                         : loss_backward<float>)(x, w, targets, s, top, log_sum, target_cos,
                                                                 g_loss, rule, options, need_dx, need_dw);
      },
      no_gil);
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
  m.def(
      "lmcl_backward_update",
      [](const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Tensor& top,
         const Tensor& log_sum, const Tensor& g_lse, const Tensor& g_cos, const Options& options,
         const cosface::Update& update, const std::vector<Tensor>& state, bool need_dx) {
        return (cosface::in_double(x, w) ? backward_update<double>
                                         : backward_update<float>)(x, w, y, s, top, log_sum, g_lse, g_cos, options,
                                                                   update, state, need_dx);
      },
      no_gil);
  m.def("empty_bytes", [](int64_t bytes) { return empty({bytes}, at::kByte); });
  m.def("apply_update", apply_update, no_gil);
  m.def("normal_", normal_, no_gil);
  m.def("use_huge_pages",
        [](const Tensor& fresh) { cosface::use_huge_pages(fresh.mutable_data_ptr(), fresh.nbytes()); });
  m.def("threads", threads, no_gil);
  m.def("instruction_set", cosface::instruction_set);
  m.def("multiplies_bfloat16", cosface::multiplies_bfloat16, py::arg("gradient_tolerance"));
#ifdef COSFACE_CUDA
  cosface::cuda::define(m, [](const Tensor& tensor, auto body) {
    const c10::cuda::CUDAGuard guard(tensor.device());
    return body(cuda_device(tensor.get_device()));
  });
  m.attr("cuda_version") = CUDART_VERSION;
#endif
}
