// The chunk driver. Nothing in it is specific to a GPU but what a Device says, so that it also runs over the
// kernels on the host. It never waits for the device, and allocates through torch: a CUDA graph can capture it.
#include "cuda/driver.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <initializer_list>
#include <limits>

#include "environment.h"
#include "tensor.h"

namespace cosface::cuda {
namespace {

using at::Tensor;

constexpr int64_t kChunkStep = 256;          // classes; rows of a chunk stay aligned to any load
constexpr int64_t kKeptStep = 8;             // cosines; rows of the cache stay aligned to any load
constexpr int64_t kCacheStep = 64;           // bytes; where cosines begin in the cache
constexpr int64_t kLaunchFlops = 1ll << 36;  // of a product with a chunk, as in backends/triton/tiles.py
constexpr int64_t kBlocksPerProcessor = 4;   // that share the rows of a chunk
constexpr double kLeastUnit = 0x1p-100, kLargestUnit = 0x1p100;  // kGradientLift over a unit is finite in float

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

// What the matrix products multiply: the common dtype; a float32 weight is rounded to the bfloat16 of its
// embeddings, as autocast would do. Not to float16, whose range a short row of an un-normalised weight would
// leave. Both hold what float8 holds, until it is multiplied by a power of two.
at::ScalarType operand_dtype(at::ScalarType x, at::ScalarType w, bool scaled) {
  if (w == at::kFloat8_e4m3fn) return scaled && x == at::kHalf ? at::kFloat : x;
  if (x == w || (x == at::kBFloat16 && w == at::kFloat)) return x;
  return at::promoteTypes(at::promoteTypes(x, w), at::kFloat);
}

// Classes per chunk: as few chunks as the workspace and kLaunchFlops allow, of even sizes. COSFACE_CUDA_CHUNK
// overrides it.
int64_t chunk_classes(int64_t n, int64_t d, int64_t classes, int64_t class_bytes, int64_t workspace_bytes) {
  const int64_t long_enough = ceil_div(kLaunchFlops, 2 * std::max<int64_t>(n, 1) * d);
  const int64_t largest = std::max<int64_t>(std::min(workspace_bytes / class_bytes, long_enough) / kChunkStep, 1);
  const int64_t chunks = ceil_div(classes, largest * kChunkStep);
  const int64_t chunk = classes_in_environment("COSFACE_CUDA_CHUNK").value_or(ceil_div(classes, chunks));
  return round_up(std::min(chunk, classes), kChunkStep);
}

// out = a b, or out += a b, with sums in the dtype of out.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, bool accumulate) {
  Tensor result = out;
  if (a.scalar_type() == out.scalar_type()) {
    accumulate ? at::addmm_out(result, out, a, b) : at::mm_out(result, a, b);
  } else if (a.is_cuda()) {
    accumulate ? at::addmm_out(result, out, a, b, out.scalar_type()) : at::mm_out(result, a, b, out.scalar_type());
  } else {  // torch has this product on GPUs alone
    multiply(out, a.to(out.scalar_type()), b.to(out.scalar_type()), accumulate);
  }
}

Rows rows_of(const Tensor& v) { return {v.const_data_ptr(), dtype_of(v), v.size(0), v.size(1), v.stride(0)}; }

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

void* any_data(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

Inputs checked(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, const Options& options) {
  check_cache(options.cache, x.device());
  options.sigmoid.check(x.device(), options.thresholds || options.moments || options.g_moments);
  if (options.exponents) check_exponents(*options.exponents, w);
  return Inputs{x, w, y, s, options.classes, options.thresholds, options.negatives, options.moments}.checked();
}

// What forward leaves for backward: 1 / |w_j| of all classes, if weights are normalised; 1 / |x_i|; and cosines,
// (n, stride), of the first `kept` classes in order. No chunk shows in it, for those of backward may be others
// than forward's. Its size is that of backends/cuda.py.
template <typename T>
struct Cache {
  Tensor w_inv_norm, x_inv_norm;
  Kept<T>* cosines;
  int64_t stride, kept;

  Cache(const Tensor& bytes, int64_t n, int64_t classes, bool normalize_weight) {
    const int64_t norms = normalize_weight ? classes : 0, size = bytes.numel(), needed = (norms + n) * sizeof(T);
    TORCH_CHECK_VALUE(needed <= size, "cache must hold the norms of ", norms, " classes and ", n,
                      " embeddings in ", needed, " bytes, got ", size, ".");
    const Tensor numbers = bytes.narrow(0, 0, needed).view(c10::CppTypeToScalarType<T>::value);
    w_inv_norm = numbers.narrow(0, 0, norms), x_inv_norm = numbers.narrow(0, norms, n);
    const int64_t first = std::min(round_up(needed, kCacheStep), size), all = round_up(classes, kKeptStep);
    cosines = reinterpret_cast<Kept<T>*>(bytes.mutable_data_ptr<uint8_t>() + first);
    const int64_t room = (size - first) / (std::max<int64_t>(n, 1) * sizeof(Kept<T>));
    stride = room < all ? room / kChunkStep * kChunkStep : all;
    kept = std::min(stride, classes);
  }
};

// (6) coefficients of negatives in a dtype, as cosface_kernels/options.py completes them.
Tensor coefficients_of(const Tensor& negatives, at::ScalarType dtype) {
  const Tensor given = negatives.to(dtype);
  if (given.numel() == 6) return given.contiguous();
  const Tensor q = given.narrow(0, 0, 1);
  return at::cat({given, at::ones_like(q), 2 * q, given.narrow(0, 1, 1)});
}

enum class Pass { kForward, kBackward, kAlone };  // kAlone: backward that no forward precedes

// One call's inputs, and a workspace that all chunks share.
template <typename T>
class Step {
 public:
  Step(const Inputs& given, const Options& options, const Device& device, Pass pass)
      : device(device),
        pass(pass),
        normalize_weight(options.normalize_weight),
        operand(operand_dtype(given.x.scalar_type(), given.w.scalar_type(), !normalize_weight)),
        sums(given.x.options().dtype(c10::CppTypeToScalarType<T>::value)),
        x(given.x.to(operand).contiguous()),
        y(given.y.contiguous()),
        s(given.s.to(sums.dtype()).contiguous()),
        n(x.size(0)),
        d(x.size(1)),
        classes(given.classes ? given.classes->numel() : given.w.size(0)),
        chunk(chunk_classes(n, d, classes, class_bytes(given),
                            std::min(options.workspace_bytes, device.largest_workspace))),
        segments(std::clamp<int64_t>(kBlocksPerProcessor * device.processors / std::max<int64_t>(n, 1), 1,
                                     chunk / kChunkStep)),
        cache(pass == Pass::kAlone ? norms_alone() : options.cache, n, classes, normalize_weight),
        dot(pass == Pass::kForward || cache.kept < classes ? at::empty({n * chunk}, sums) : Tensor()),
        exponents(normalize_weight ? Tensor() : options.exponents.value_or(Tensor())),
        ones_(normalize_weight ? Tensor() : at::ones({chunk}, sums)),
        tau_(given.thresholds ? given.thresholds->to(sums.dtype()).contiguous() : Tensor()),
        coefficients_(given.negatives ? coefficients_of(*given.negatives, sums.dtype().toScalarType()) : Tensor()),
        w_(with_adjacent_elements(given.w)),
        chosen_(given.classes ? given.classes->contiguous() : Tensor()),
        w_chosen_(chosen_.defined() ? at::empty({chunk, d}, w_.options()) : Tensor()),
        w_operands_(w_.scalar_type() == operand ? Tensor() : at::empty({chunk, d}, x.options())) {}

  // Calls body(chunk, its (classes, D) rows of w as operands) for the chunks in order, each of classes that are
  // all in the cache or none. The first pass fills the cache's norms of a chunk before; backward makes products
  // only where there are no cosines.
  template <typename Body>
  void each_chunk(Body body) const {
    for (int64_t first = 0, count; first < classes; first += count) {
      const bool kept = first < cache.kept;
      count = std::min(chunk, (kept ? cache.kept : classes) - first);
      const Tensor rows = operand_rows(first, count);
      T* w_inv_norm = normalize_weight ? data<T>(cache.w_inv_norm) + first : data<T>(ones_);
      if (pass != Pass::kBackward && normalize_weight) row_norms<T>(rows_of(rows), w_inv_norm, device.stream);
      if (pass == Pass::kForward || !kept) multiply(beginning(dot, count), x, rows.t(), false);
      body(Chunk<T>{data<T>(dot), n, count, first, data<T>(cache.x_inv_norm), w_inv_norm, data<int64_t>(y),
                    data<T>(s), segments, data<T>(tau_), data<T>(coefficients_),
                    kept ? cache.cosines + first : nullptr, cache.stride,
                    y.dim() == 2 ? data<int64_t>(y) + n : nullptr},
           rows);
    }
  }

  // (N, count), of memory for a chunk.
  Tensor beginning(const Tensor& memory, int64_t count) const {
    return memory.narrow(0, 0, n * count).view({n, count});
  }

  // (count, 1) 2^e_j of a weight in float8 whose length counts.
  Tensor row_units(int64_t first, int64_t count) const {
    const Tensor of_chunk = chosen_.defined() ? exponents.index_select(0, chosen_.narrow(0, first, count))
                                              : exponents.narrow(0, first, count);
    return at::ldexp(at::ones({count, 1}, sums), of_chunk.unsqueeze(1));
  }

  // The rows of the weight that are chosen classes from `first` on; null where all rows take part in order.
  const int64_t* chosen(int64_t first) const {
    return chosen_.defined() ? chosen_.const_data_ptr<int64_t>() + first : nullptr;
  }

  const Device& device;
  const Pass pass;
  const bool normalize_weight;
  const at::ScalarType operand;
  const at::TensorOptions sums;                  // dtype T
  const Tensor x, y, s;                          // (N, D) operands, (N) or (2, N), (N)
  const int64_t n, d, classes, chunk, segments;  // segments: blocks that share a row of a chunk
  const Cache<T> cache;
  const Tensor dot;        // memory for the products of a chunk, in a pass that makes some
  const Tensor exponents;  // (C), of a weight in float8 whose length counts

 private:
  // What a chunk takes for each of its classes, in backward: its products, G, the gradient of its row, and its row
  // as operands or normalised, of float8 in float16 both, and apart from those that are not chosen.
  int64_t class_bytes(const Inputs& given) const {
    const int64_t operand_bytes = x.element_size(), w_bytes = given.w.element_size();
    const int64_t copies = given.w.scalar_type() == at::kFloat8_e4m3fn && operand == at::kHalf ? 2 : 1;
    return n * (sizeof(T) + operand_bytes) +
           d * (sizeof(T) + copies * operand_bytes + (given.classes ? w_bytes : 0));
  }

  // Memory for the norms alone, where none was left.
  Tensor norms_alone() const {
    const int64_t norms = n + (normalize_weight ? classes : 0);
    return at::empty({norms * static_cast<int64_t>(sizeof(T))}, sums.dtype(at::kByte));
  }

  Tensor raw_rows(int64_t first, int64_t count) const {
    if (!chosen_.defined()) return w_.narrow(0, first, count);
    Tensor rows = w_chosen_.narrow(0, 0, count);
    return at::index_select_out(rows, w_, 0, chosen_.narrow(0, first, count));
  }

  // Of a weight in float8 whose length counts, what is stored times 2^e_j.
  Tensor operand_rows(int64_t first, int64_t count) const {
    const Tensor raw = raw_rows(first, count);
    if (!w_operands_.defined()) return raw;
    const Tensor rows = w_operands_.narrow(0, 0, count).copy_(raw);
    return exponents.defined() ? rows.mul_(row_units(first, count)) : rows;
  }

  const Tensor ones_;                // (chunk), in place of norms if weights are not normalised
  const Tensor tau_, coefficients_;  // (N) and (6); undefined where negatives are not reshaped
  const Tensor w_, chosen_;          // chosen_: (S), undefined where all rows take part
  const Tensor w_chosen_;            // (chunk, D), if there are chosen classes
  const Tensor w_operands_;          // (chunk, D), if w has another dtype
};

template <typename T>
std::array<Tensor, 6> forward_in(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                                 const Options& options, const Device& device) {
  const Step<T> step(checked(x, w, y, s, options), options, device, Pass::kForward);
  const Tensor loss = at::empty({step.n}, step.sums), top = at::empty_like(loss), log_sum = at::empty_like(loss),
               target_cos = at::zeros(y.sizes(), step.sums), max_neg = at::empty_like(loss);
  const Tensor moments = at::empty({options.moments ? 4 : 0, step.n}, step.sums);
  const Tensor tops = at::full({step.segments, step.n}, std::numeric_limits<T>::lowest(), step.sums);
  const Tensor max_cos = options.thresholds ? tops.clone() : tops;
  const Tensor sum_exp = at::zeros({step.segments, step.n}, step.sums.dtype(at::kDouble));
  const Tensor sums = options.moments ? at::zeros({4, step.segments, step.n}, sum_exp.options()) : Tensor();
  const RunningStatistics<T> running{data<T>(tops), data<T>(max_cos), data<double>(sum_exp), data<double>(sums)};
  row_norms<T>(rows_of(step.x), data<T>(step.cache.x_inv_norm), device.stream);
  step.each_chunk([&](const Chunk<T>& chunk, const Tensor&) {
    class_statistics(chunk, running, data<T>(target_cos), device.stream);
  });
  merge_statistics(
      running, step.segments, step.n, data<int64_t>(step.y), data<T>(step.s), static_cast<T>(margin),
      {data<T>(loss), data<T>(top), data<T>(log_sum), data<T>(target_cos), data<T>(max_neg), data<T>(moments)},
      device.stream);
  return {loss, top, log_sum, target_cos, max_neg, moments};
}

// (N): whether the row of any of these, (N) or (2, N) each or undefined, is not 0.
Tensor any_of(std::initializer_list<Tensor> gradients) {
  Tensor any;
  for (const Tensor& g : gradients) {
    if (!g.defined()) continue;
    const Tensor flows = g.dim() == 2 ? g.ne(0).any(0) : g.ne(0);
    any = any.defined() ? any.logical_or(flows) : flows;
  }
  return any;
}

// (N) powers of two that bound |G_ij| of each row. One per row: then no row of dx depends on the rest of the
// batch. of_lse: what p_ij multiplies at most. What b_i adds, b_i p_ij (1 - s_i (top_i - N(cos_ij))), is at most
// |b_i|: |1 - v| e^-v <= 1.
Tensor units(const Tensor& of_lse, const Tensor& g_cos, const Tensor& g_moments) {
  Tensor of_negatives = of_lse.abs(), of_targets = g_cos.abs();
  if (g_moments.defined()) of_negatives = of_negatives + g_moments.abs().sum(0);
  if (of_targets.dim() == 2) of_targets = of_targets.amax(0);
  const Tensor bound = at::maximum(of_negatives, of_targets);
  const Tensor clamped =
      at::where(bound < std::numeric_limits<double>::infinity(), bound, 0).clamp(kLeastUnit, kLargestUnit);
  return at::ldexp(at::ones_like(clamped), std::get<1>(at::frexp(clamped)));
}

// out from g; where the kernel does not write the dtype of out, over g and by a copy.
template <typename T>
void project(const Tensor& g, bool divided, const Tensor& v, const T* inv_norm, const Tensor& factor,
             const Tensor& out, Stream stream) {
  const bool direct = out.scalar_type() == v.scalar_type() || out.scalar_type() == g.scalar_type();
  const Tensor result = direct ? out : g;
  const int64_t factor_step = factor.dim();  // a row each, or one number
  project_rows<T>(data<T>(g), divided, rows_of(v), inv_norm, data<T>(factor), factor_step, any_data(result),
                  dtype_of(result), stream);
  if (!direct) out.copy_(result);
}

// dx, dw, dscale and, with a sigmoid, its sums, (2, N); with an update the rows of w move by dw, of which no more
// than a chunk exists.
template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_in(const Tensor& x, const Tensor& w, const Tensor& y,
                                                       const Tensor& s, const Tensor& top, const Tensor& log_sum,
                                                       const Tensor& g_lse, const Tensor& g_cos,
                                                       const Options& options, bool need_dx, bool need_dw,
                                                       const Update* update, const Device& device) {
  TORCH_CHECK_TYPE(!need_dw || w.scalar_type() != at::kFloat8_e4m3fn,
                   "A weight in float8 has no gradient of its own.");
  const bool sigmoid = options.sigmoid.name.has_value();
  const Step<T> step(checked(x, w, y, s, options), options, device, sigmoid ? Pass::kAlone : Pass::kBackward);
  const std::vector<Tensor> up = upstream_of(x, w, y, top, log_sum, g_lse, g_cos, options.g_moments);
  const Upstream<T> upstream{data<T>(up[0]), data<T>(up[1]), data<T>(up[2]), data<T>(up[3]), data<T>(up[4])};
  const Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor dw = need_dw ? at::empty({step.classes, step.d}, w.options()) : at::empty({0}, w.options());
  const auto operands = step.x.options();
  const Tensor& x_inv_norm = step.cache.x_inv_norm;
  const bool divided = is_divided(dtype_of(step.x)), needs_w_hat = step.normalize_weight && !divided;

  const auto& given = options.sigmoid.polynomials;
  const Tensor polynomials = given ? given->to(step.sums.dtype()).contiguous() : Tensor();
  Tensor of_lse = sigmoid && !given ? up[2] : step.s * up[2];
  if (given) of_lse = of_lse * polynomials[1].abs().sum();  // of the slope, where |cos_ij| <= 1

  // Where a factor is 0, so is what it makes: a row without gradient takes no part, even if its x is not finite.
  const Tensor active = any_of({up[2], up[3], up[4]}), unit = units(of_lse, up[3], up[4]);
  const Tensor largest_unit = step.n > 0 ? unit.amax() : at::ones({}, step.sums);
  const Tensor to_x_hat = unit / largest_unit * kEmbeddingLift * active,
               from_dx_hat = unit / kGradientLift * active;
  const Tensor from_dw_hat = largest_unit / (kGradientLift * kEmbeddingLift);

  const Tensor x_hat = at::empty({step.n, step.d}, operands);
  const Tensor w_hat = need_dx && needs_w_hat ? at::empty({step.chunk, step.d}, operands) : Tensor();
  const bool over_dot = step.dot.defined() && step.operand == step.sums.dtype();
  const Tensor g_memory = over_dot ? step.dot : at::empty({step.n * step.chunk}, operands);
  const Tensor dx_hat = need_dx ? at::zeros({step.n, step.d}, step.sums) : Tensor();
  const Tensor dw_hat = need_dw || update ? at::empty({step.chunk, step.d}, step.sums) : Tensor();
  const Tensor of_rows = at::zeros({sigmoid ? 3 : 1, step.segments, step.n}, step.sums.dtype(at::kDouble));
  if (sigmoid) row_norms<T>(rows_of(step.x), data<T>(x_inv_norm), device.stream);
  normalize_rows<T>(rows_of(step.x), data<T>(x_inv_norm), data<T>(to_x_hat), any_data(x_hat), device.stream);
  step.each_chunk([&](const Chunk<T>& chunk, const Tensor& rows) {
    const int64_t first = chunk.first_class, count = chunk.classes;
    const Tensor g = step.beginning(g_memory, count);
    if (sigmoid) {
      sigmoid_gradients<T>(chunk, upstream, data<T>(polynomials), data<T>(unit), any_data(g), dtype_of(g),
                           data<double>(of_rows), device.stream);
    } else {
      logit_gradients(chunk, upstream, data<T>(unit), any_data(g), dtype_of(g), data<double>(of_rows),
                      device.stream);
    }
    if (w_hat.defined()) {
      normalize_rows<T>(rows_of(rows), chunk.w_inv_norm, nullptr, any_data(w_hat), device.stream);
    }
    if (need_dx) multiply(dx_hat, g, w_hat.defined() ? w_hat.narrow(0, 0, count) : rows, true);
    if (!dw_hat.defined()) return;
    const Tensor sums = dw_hat.narrow(0, 0, count);
    multiply(sums, g.t(), x_hat, false);
    Tensor out = update ? sums : dw.narrow(0, first, count);
    if (step.normalize_weight) {
      project(sums, divided, rows, chunk.w_inv_norm, from_dw_hat, out, device.stream);
    } else {
      at::mul_out(out, sums, from_dw_hat);
      if (step.exponents.defined()) out.mul_(step.row_units(first, count));  // for what is stored of them
    }
    if (update) {  // nothing after this reads these rows
      move_rows<T>(data<T>(sums), count, step.d, weight_of(w), step.chosen(first), first, *update, device.stream);
    }
  });
  if (need_dx) project(dx_hat, false, step.x, data<T>(x_inv_norm), from_dx_hat, dx, device.stream);
  const Tensor sums = sigmoid ? of_rows.narrow(0, 1, 2).sum(1).to(step.sums.dtype()) : Tensor();
  return {dx, dw, of_rows[0].sum(0).to(step.sums.dtype()), sums};
}

template <typename T>
void apply_in(const Tensor& w, const Tensor& dw, const Update& update, const Device& device) {
  const Tensor gradient = gradient_of(w, dw);
  const int64_t classes = w.size(0), d = w.size(1);
  const int64_t chunk =
      chunk_classes(0, d, classes, d * sizeof(T), std::min(Options().workspace_bytes, device.largest_workspace));
  for (int64_t first = 0; first < classes; first += chunk) {
    const int64_t count = std::min(chunk, classes - first);
    const Tensor g = gradient.narrow(0, first, count).to(c10::CppTypeToScalarType<T>::value).contiguous();
    move_rows<T>(data<T>(g), count, d, weight_of(w), nullptr, first, update, device.stream);
  }
}

}  // namespace

std::array<Tensor, 6> forward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                              const Options& options, const Device& device) {
  return (in_double(x, w) ? forward_in<double> : forward_in<float>)(x, w, y, s, margin, options, device);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                            const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                            const Tensor& g_cos, const Options& options, bool need_dx,
                                            bool need_dw, const Device& device) {
  const auto run = in_double(x, w) ? backward_in<double> : backward_in<float>;
  const auto [dx, dw, dscale, sums] =
      run(x, w, y, s, top, log_sum, g_lse, g_cos, options, need_dx, need_dw, nullptr, device);
  return {dx, dw, dscale};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid(const Tensor& x, const Tensor& w, const Tensor& y,
                                                   const Tensor& s, const Tensor& bias, const Tensor& g,
                                                   const Tensor& g_cos, const Options& options, bool need_dx,
                                                   bool need_dw, const Device& device) {
  TORCH_CHECK_VALUE(options.sigmoid.name.has_value(), "sigmoid must be one of cross_entropy, angle, got None.");
  const Tensor log_sum = -fitting("bias", bias, {x.size(0)}, x.device());
  const auto run = in_double(x, w) ? backward_in<double> : backward_in<float>;
  const auto [dx, dw, dscale, sums] =
      run(x, w, y, s, at::zeros_like(log_sum), log_sum, g, g_cos, options, need_dx, need_dw, nullptr, device);
  return {sums, dx, dw, dscale};
}

std::tuple<Tensor, Tensor> backward_update(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                           const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                           const Tensor& g_cos, const Options& options, const Update& numbers,
                                           const std::vector<Tensor>& state, const std::optional<Tensor>& finite,
                                           bool need_dx, const Device& device) {
  Update update = bound(numbers, w, state);
  if (finite) update.finite = fitting("finite", *finite, {}, w.device(), at::kBool).const_data_ptr<bool>();
  const auto run = in_double(x, w) ? backward_in<double> : backward_in<float>;
  const auto [dx, dw, dscale, sums] =
      run(x, w, y, s, top, log_sum, g_lse, g_cos, options, need_dx, false, &update, device);
  return {dx, dscale};
}

void apply_update(const Tensor& w, const Tensor& dw, const Update& numbers, const std::vector<Tensor>& state,
                  const Device& device) {
  (in_double(w, w) ? apply_in<double> : apply_in<float>)(w, dw, bound(numbers, w, state), device);
}

}  // namespace cosface::cuda
