// The chunk driver. Nothing in it is specific to a GPU but what a Device says, so that it also runs over the
// kernels on the host. It never waits for the device, and allocates through torch: a CUDA graph can capture it.
#include "cuda/driver.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>

#include "environment.h"
#include "tensor.h"

namespace cosface::cuda {
namespace {

using at::Tensor;

constexpr int64_t kChunkStep = 256;          // classes; rows of a chunk stay aligned to any load
constexpr int64_t kKeptStep = 8;             // cosines; rows of the cache stay aligned to any load
constexpr int64_t kLaunchFlops = 1ll << 36;  // of a product with a chunk, as in triton_tiles.py
constexpr int64_t kBlocksPerProcessor = 4;   // that share the rows of a chunk
constexpr double kLeastUnit = 0x1p-100, kLargestUnit = 0x1p100;  // kGradientLift over a unit is finite in float

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

// What the matrix products multiply: the common dtype; a float32 weight is rounded to the bfloat16 of its
// embeddings, as autocast would do. Not to float16, whose range a short row of an un-normalised weight would
// leave.
at::ScalarType operand_dtype(at::ScalarType x, at::ScalarType w) {
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
  return Inputs{x, w, y, s, options.classes, options.thresholds, options.negatives}.checked();
}

// The cosines that forward leaves for backward: (n, stride), of the first `classes` classes in order. No chunk
// shows in it, for those of backward may be others than forward's.
template <typename T>
struct Cache {
  Kept<T>* const cosines;
  const int64_t stride, classes;

  Cache(const Tensor& bytes, int64_t n, int64_t all)
      : cosines(static_cast<Kept<T>*>(bytes.mutable_data_ptr())),
        stride(width(bytes.numel() / (std::max<int64_t>(n, 1) * sizeof(Kept<T>)), round_up(all, kKeptStep))),
        classes(std::min(stride, all)) {}

 private:
  // All, or as many whole kChunkStep as there is room for.
  static int64_t width(int64_t room, int64_t all) { return room < all ? room / kChunkStep * kChunkStep : all; }
};

enum class Cosines { kKeep, kRecall };

// One call's inputs, and a workspace that all chunks share.
template <typename T>
class Step {
 public:
  // A chunk of the classes with its products or its cosines.
  struct Part {
    Chunk<T> chunk;
    Tensor dot;       // (N, classes), or memory for as many
    Tensor w, w_hat;  // (classes, D) operands; w_hat if there is a buffer for it
  };

  Step(const Inputs& given, const Options& options, const Device& device)
      : device(device),
        normalize_weight(options.normalize_weight),
        operand(operand_dtype(given.x.scalar_type(), given.w.scalar_type())),
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
        x_inv_norm(at::empty({n}, sums)),
        w_inv_norm(normalize_weight ? at::empty({chunk}, sums) : at::ones({chunk}, sums)),
        cache_(options.cache, n, classes),
        tau_(given.thresholds ? given.thresholds->to(sums.dtype()).contiguous() : Tensor()),
        polynomial_(given.negatives ? given.negatives->to(sums.dtype()).contiguous() : Tensor()),
        w_(with_adjacent_elements(given.w)),
        chosen_(given.classes ? given.classes->contiguous() : Tensor()),
        w_chosen_(chosen_.defined() ? at::empty({chunk, d}, w_.options()) : Tensor()),
        w_operands_(w_.scalar_type() == operand ? Tensor() : at::empty({chunk, d}, x.options())),
        dot_(at::empty({n * chunk}, sums)) {}

  // Calls body(part) for the chunks in order, each of classes that are all in the cache or none. Where cosines are
  // recalled, products are not made. w_hat: (chunk, D) operands, to be filled, or undefined.
  template <typename Body>
  void each_part(Cosines cosines, const Tensor& w_hat, Body body) const {
    for (int64_t first = 0, count; first < classes; first += count) {
      const bool kept = first < cache_.classes;
      count = std::min(chunk, (kept ? cache_.classes : classes) - first);
      const Tensor raw = raw_rows(first, count);
      const Tensor rows = w_operands_.defined() ? w_operands_.narrow(0, 0, count).copy_(raw) : raw;
      Tensor hat = w_hat.defined() ? w_hat.narrow(0, 0, count) : w_hat;
      if (normalize_weight) {
        normalize_rows<T>(rows_of(rows), nullptr, data<T>(w_inv_norm), any_data(hat), device.stream);
      } else {
        hat = rows;
      }
      const Tensor dot = dot_.narrow(0, 0, n * count).view({n, count});
      if (!kept || cosines == Cosines::kKeep) multiply(dot, x, rows.t(), false);
      body(Part{
          {data<T>(dot), n, count, first, data<T>(x_inv_norm), data<T>(w_inv_norm), data<int64_t>(y), data<T>(s),
           segments, data<T>(tau_), data<T>(polynomial_), kept ? cache_.cosines + first : nullptr, cache_.stride},
          dot,
          rows,
          hat});
    }
  }

  // The rows of the weight that are chosen classes from `first` on; null where all rows take part in order.
  const int64_t* chosen(int64_t first) const {
    return chosen_.defined() ? chosen_.const_data_ptr<int64_t>() + first : nullptr;
  }

  const Device& device;
  const bool normalize_weight;
  const at::ScalarType operand;
  const at::TensorOptions sums;                  // dtype T
  const Tensor x, y, s;                          // (N, D) operands, (N), (N)
  const int64_t n, d, classes, chunk, segments;  // segments: blocks that share a row of a chunk
  const Tensor x_inv_norm, w_inv_norm;           // (N), which the caller fills; (chunk)

 private:
  // What a chunk takes for each of its classes, in backward: its products, G, the gradient of its row, and its row
  // as operands, normalised, and apart from those that are not chosen.
  int64_t class_bytes(const Inputs& given) const {
    const int64_t operand_bytes = x.element_size(), w_bytes = given.w.element_size();
    return n * (sizeof(T) + operand_bytes) + d * (sizeof(T) + 2 * operand_bytes + (given.classes ? w_bytes : 0));
  }

  Tensor raw_rows(int64_t first, int64_t count) const {
    if (!chosen_.defined()) return w_.narrow(0, first, count);
    Tensor rows = w_chosen_.narrow(0, 0, count);
    return at::index_select_out(rows, w_, 0, chosen_.narrow(0, first, count));
  }

  const Cache<T> cache_;
  const Tensor tau_, polynomial_;  // (N) and q, a, b; undefined where negatives are not reshaped
  const Tensor w_, chosen_;        // chosen_: (S), undefined where all rows take part
  const Tensor w_chosen_;          // (chunk, D), if there are chosen classes
  const Tensor w_operands_, dot_;  // w_operands_: (chunk, D), if w has another dtype
};

template <typename T>
std::array<Tensor, 5> forward_in(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                                 const Options& options, const Device& device) {
  const Step<T> step(checked(x, w, y, s, options), options, device);
  const Tensor loss = at::empty({step.n}, step.sums), top = at::empty_like(loss), log_sum = at::empty_like(loss),
               target_cos = at::zeros_like(loss), max_neg = at::empty_like(loss);
  const Tensor tops = at::full({step.segments, step.n}, std::numeric_limits<T>::lowest(), step.sums);
  const Tensor max_cos = options.thresholds ? tops.clone() : tops;
  const Tensor sum_exp = at::zeros({step.segments, step.n}, step.sums.dtype(at::kDouble));
  const RunningStatistics<T> running{data<T>(tops), data<T>(max_cos), data<double>(sum_exp)};
  normalize_rows<T>(rows_of(step.x), nullptr, data<T>(step.x_inv_norm), nullptr, device.stream);
  step.each_part(Cosines::kKeep, Tensor(), [&](const auto& part) {
    class_statistics(part.chunk, running, data<T>(target_cos), device.stream);
  });
  merge_statistics(running, step.segments, step.n, data<int64_t>(step.y), data<T>(step.s), static_cast<T>(margin),
                   {data<T>(loss), data<T>(top), data<T>(log_sum), data<T>(target_cos), data<T>(max_neg)},
                   device.stream);
  return {loss, top, log_sum, target_cos, max_neg};
}

// (N) powers of two that bound |G_ij| of each row. One per row: then no row of dx depends on the rest of the
// batch.
Tensor units(const Tensor& s, const Tensor& g_lse, const Tensor& g_cos) {
  const Tensor bound = at::maximum((s * g_lse).abs(), g_cos.abs());
  const Tensor clamped =
      at::where(bound < std::numeric_limits<double>::infinity(), bound, 0).clamp(kLeastUnit, kLargestUnit);
  return at::ldexp(at::ones_like(clamped), std::get<1>(at::frexp(clamped)));
}

// out from the gradient g_hat of v_hat; where the kernel does not write the dtype of out, over g_hat and by a
// copy.
template <typename T>
void unnormalize(const Tensor& g_hat, const Tensor& v, const Tensor& inv_norm, const Tensor& factor,
                 const Tensor& out, Stream stream) {
  const bool direct = out.scalar_type() == v.scalar_type() || out.scalar_type() == g_hat.scalar_type();
  const Tensor result = direct ? out : g_hat;
  const int64_t factor_step = factor.dim();  // (N), or one number
  unnormalize_rows<T>(data<T>(g_hat), rows_of(v), data<T>(inv_norm), data<T>(factor), factor_step,
                      any_data(result), dtype_of(result), stream);
  if (!direct) out.copy_(result);
}

// dx, dw and dscale; with an update the rows of w move by dw, of which no more than a chunk exists.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> backward_in(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                               const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                               const Tensor& g_cos, const Options& options, bool need_dx,
                                               bool need_dw, const Update* update, const Device& device) {
  const Step<T> step(checked(x, w, y, s, options), options, device);
  const std::vector<Tensor> up = upstream_of(x, w, top, log_sum, g_lse, g_cos);
  const Upstream<T> upstream{data<T>(up[0]), data<T>(up[1]), data<T>(up[2]), data<T>(up[3])};
  const Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const Tensor dw = need_dw ? at::empty({step.classes, step.d}, w.options()) : at::empty({0}, w.options());

  // Where a factor is 0, so is what it makes: a row without gradient takes no part, even if its x is not finite.
  const Tensor active = up[2].ne(0).logical_or(up[3].ne(0)), unit = units(step.s, up[2], up[3]);
  const Tensor largest_unit = step.n > 0 ? unit.amax() : at::ones({}, step.sums);
  const Tensor to_x_hat = unit / largest_unit * kEmbeddingLift * active,
               from_dx_hat = unit / kGradientLift * active;
  const Tensor from_dw_hat = largest_unit / (kGradientLift * kEmbeddingLift);

  const auto operands = step.x.options();
  const Tensor x_hat = at::empty({step.n, step.d}, operands);
  const Tensor w_hat = need_dx && step.normalize_weight ? at::empty({step.chunk, step.d}, operands) : Tensor();
  const Tensor g_apart = step.operand == step.sums.dtype() ? Tensor() : at::empty({step.n * step.chunk}, operands);
  const Tensor dx_hat = need_dx ? at::zeros({step.n, step.d}, step.sums) : Tensor();
  const Tensor dw_hat = need_dw || update ? at::empty({step.chunk, step.d}, step.sums) : Tensor();
  const Tensor negative_dot = at::zeros({step.segments, step.n}, step.sums.dtype(at::kDouble));
  normalize_rows<T>(rows_of(step.x), data<T>(to_x_hat), data<T>(step.x_inv_norm), any_data(x_hat), device.stream);
  step.each_part(Cosines::kRecall, w_hat, [&](const auto& part) {
    const Tensor g = g_apart.defined() ? g_apart.narrow(0, 0, part.dot.numel()).view_as(part.dot) : part.dot;
    logit_gradients(part.chunk, upstream, data<T>(unit), any_data(g), dtype_of(g), data<double>(negative_dot),
                    device.stream);
    if (need_dx) multiply(dx_hat, g, part.w_hat, true);
    if (!dw_hat.defined()) return;
    const int64_t first = part.chunk.first_class, count = part.chunk.classes;
    const Tensor rows = dw_hat.narrow(0, 0, count);
    multiply(rows, g.t(), x_hat, false);
    Tensor out = update ? rows : dw.narrow(0, first, count);
    if (step.normalize_weight) {
      unnormalize<T>(rows, part.w, step.w_inv_norm, from_dw_hat, out, device.stream);
    } else {
      at::mul_out(out, rows, from_dw_hat);
    }
    if (update) {  // nothing after this reads these rows
      move_rows<T>(data<T>(rows), count, step.d, weight_of(w), step.chosen(first), first, *update, device.stream);
    }
  });
  if (need_dx) unnormalize<T>(dx_hat, step.x, step.x_inv_norm, from_dx_hat, dx, device.stream);
  return {dx, dw, negative_dot.sum(0).to(step.sums.dtype())};
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

std::array<Tensor, 5> forward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s, double margin,
                              const Options& options, const Device& device) {
  return (in_double(x, w) ? forward_in<double> : forward_in<float>)(x, w, y, s, margin, options, device);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                            const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                            const Tensor& g_cos, const Options& options, bool need_dx,
                                            bool need_dw, const Device& device) {
  return (in_double(x, w) ? backward_in<double> : backward_in<float>)(x, w, y, s, top, log_sum, g_lse, g_cos,
                                                                      options, need_dx, need_dw, nullptr, device);
}

std::tuple<Tensor, Tensor> backward_update(const Tensor& x, const Tensor& w, const Tensor& y, const Tensor& s,
                                           const Tensor& top, const Tensor& log_sum, const Tensor& g_lse,
                                           const Tensor& g_cos, const Options& options, const Update& numbers,
                                           const std::vector<Tensor>& state, const std::optional<Tensor>& finite,
                                           bool need_dx, const Device& device) {
  Update update = bound(numbers, w, state);
  if (finite) update.finite = fitting("finite", *finite, {}, w.device(), at::kBool).const_data_ptr<bool>();
  const auto run = in_double(x, w) ? backward_in<double> : backward_in<float>;
  const auto [dx, dw, dscale] =
      run(x, w, y, s, top, log_sum, g_lse, g_cos, options, need_dx, false, &update, device);
  return {dx, dscale};
}

void apply_update(const Tensor& w, const Tensor& dw, const Update& numbers, const std::vector<Tensor>& state,
                  const Device& device) {
  (in_double(w, w) ? apply_in<double> : apply_in<float>)(w, dw, bound(numbers, w, state), device);
}

}  // namespace cosface::cuda
