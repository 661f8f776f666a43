// The interface of the kernels: raw pointers, no torch.
//
// Notation: x (N, D) embeddings, w (C, D) class weights, y (N) targets with -1 for "no target among these
// classes", s (N) scale, m margin, cos_ij = <x_i, w_j> / (|x_i| |w_j|), z_ij = s_i cos_ij. T is the dtype of all
// arithmetic and of every result but dw: double if x or w is float64, else float. A sample may have a second
// target, different from the first; "j != y_i" is then neither of them. With K sub-centres w is (C K, D), and
// cos_ij the largest of those of the rows jK .. jK + K - 1, of equal ones the first, which alone has a gradient.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

namespace cosface {

// kFloat8 is float8_e4m3fn, of a weight and an optimizer's state alone: row j is 2^e_j times what is stored, with
// an exponent of its own, which a cosine does not depend on.
enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16, kFloat8 };

constexpr int64_t size_of(DType dtype) {
  constexpr int64_t kSizes[] = {8, 4, 2, 2, 1};
  return kSizes[static_cast<int>(dtype)];
}

constexpr double kEps = 1e-12;  // smallest norm that is divided by, as in torch.nn.functional.normalize

constexpr int64_t kMostSubcenters = 64;  // of a class, all of whose rows are in one tile

// What the driver borrows from its host.
struct Runtime {
  int threads;
  // body(part) for every part in [0, parts), on any thread, in any order
  std::function<void(int64_t parts, const std::function<void(int64_t part)>& body)> parallel;
  // classes per tile, 0 for the default; results agree to rounding
  int64_t tile_classes;
};

// How negatives enter the softmax: N(c) = (q c + a) c + b where c > tau_i, else r c. Their slopes in backward are
// u c + v and r; N's own are those with u = 2 q and v = a.
template <typename T>
struct Negatives {
  const T* tau = nullptr;  // (N), null where N(c) = c
  T q = 0, a = 1, b = 0, r = 1, u = 2 * q, v = a;

  Negatives from(int64_t i) const { return {tau == nullptr ? nullptr : tau + i, q, a, b, r, u, v}; }
};

// In place of a softmax, each class on its own: p_ij = 1 / (1 + e^-z_ij) with z_ij = s_i N(cos_ij) + bias_i.
// A negative adds log(1 + e^z_ij), where N and the slope that backward takes for it are polynomials; or, by
// angles, p_ij cos_ij, where N(cos) = -arccos(cos) and p_ij is a constant.
template <typename T>
struct Sigmoid {
  bool by_angle = false;
  T value[5] = {}, slope[5] = {};  // coefficients of 1, c, c^2, c^3 and c^4
};

template <typename T>
struct Batch {
  const T* x;        // (N, D) contiguous
  const int64_t* y;  // (N)
  const T* s;        // (N)
  int64_t n, d;
  Negatives<T> negatives = {};
  bool bfloat16 = false;                   // x was given in it, so that products may multiply it as it is
  const int64_t* second = nullptr;         // (N) second targets, or null
  std::optional<Sigmoid<T>> sigmoid = {};  // of backward alone, which nothing precedes then
};

struct Weight {
  const void* data;  // (C, D), elements of a row adjacent
  DType dtype;
  int64_t classes;
  int64_t row_stride;  // in elements
};

// What the op may be asked for beyond plain LMCL, as in cosface_kernels/options.py.
struct Options {
  const int64_t* classes = nullptr;   // (S) ascending: class j is row classes[j] of the weight; null: all rows
  int64_t count = 0;                  // S
  int64_t subcenters = 1;             // K, of which the rows, chosen or all, are a multiple
  bool normalize_weight = true;       // if not, <x_i, w_j> / |x_i| takes the place of cos_ij
  const int8_t* exponents = nullptr;  // (C), of a weight in float8 that is not normalised
  double gradient_tolerance = 0;      // mass of the softmax that backward may leave out of every sample
  // What forward leaves for backward, aligned to 64 bytes: with a tolerance the entries that matter, or nothing if
  // they do not fit or are too many; and cosines of as many tiles as fit, which an exact backward does not compute
  // again.
  void *entries = nullptr, *cosines = nullptr;
  int64_t entry_bytes = 0, cosine_bytes = 0;
  bool exact_cosines = false;  // in T, as they were computed; if not, where T is float, in 16-bit fixed point, off
                               // by at most 2^-16
};

// lse_i = log sum_{j != y_i} e^{z_ij} = s_i top_i + log_sum_i with top_i = max_{j != y_i} N(cos_ij), 0 if there is
// no j; apart, because where z is large there is no place for log_sum_i in their sum. loss_i = softplus(lse_i -
// s_i (target_cos_i - m));  max_neg_i = max cos_ij
// moments: sum_{j != y_i} p_ij (top_i - N(cos_ij)) with p_ij = e^{z_ij - lse_i}, sum_{j != y_i} N(cos_ij), and of
// the cos_ij above tau_i, if there is one, their sum and how many they are
template <typename T>
struct Results {
  T *loss, *top, *log_sum, *target_cos, *max_neg;  // (N) each, target_cos (2, N) where there are second targets
  T* moments = nullptr;                            // (4, N), or null if not wanted
};

template <typename T>
void lmcl_forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options,
                  const Runtime& runtime, const Results<T>& results);

template <typename T>
struct Upstream {
  // (N) each, g_cos (2, N) where there are second targets; a row whose gradients are all 0 has none, whatever x
  // holds
  const T *top, *log_sum, *g_lse, *g_cos;
  // With a sigmoid g_lse is the gradient of what the negatives add, and log_sum is -bias; top is not looked at.
  const T* g_moments = nullptr;  // (2, N), b and c of cosface_kernels/reference.py, or null
};

// How rows of the weight move once their gradient g is known, which is multiplied by gradient_factor and then,
// where it is longer, scaled down to max_row_norm. The rules are torch.optim.SGD's and AdamW's.
struct Update {
  enum class Rule { kSgd, kAdamW };

  struct State {
    void* data;  // (C, D) contiguous, or null
    DType dtype;
    int8_t* exponents = nullptr;  // (C), of float8
  };

  Rule rule;
  void* weight;                        // the memory of Weight::data
  int8_t* weight_exponents = nullptr;  // (C), of float8
  State state[3];  // SGD: momentum. AdamW: mean, mean square and its running maximum of g; float8 has the roots of
                   // these two
  int64_t step;    // 1 for the first
  uint64_t seed;   // of the rounding to bfloat16 and float8, which is stochastic: it keeps the expected value
  double gradient_factor, max_row_norm;
  double weight_norm = 0;  // length that every row is given as it is written, or 0
  double lr, weight_decay;
  double momentum, dampening;  // SGD
  bool nesterov;
  double beta1, beta2, eps;      // AdamW
  const bool* finite = nullptr;  // on a GPU, in its memory: nothing moves if it is there and false
};

template <typename T>
struct Gradients {
  T* dx;      // (N, D), or null if not wanted
  void* dw;   // (C, D), or (S, D) of the chosen classes, contiguous in the weight's dtype, or null if not wanted
  T* dscale;  // (N), the part that flows through lse
  const Update* update = nullptr;  // moves the rows of the weight tile by tile; dw is null then and never exists
  T* sums = nullptr;  // (2, N), with a sigmoid: what the negatives add, and their p_ij; or null if not wanted
};

template <typename T>
void lmcl_backward(const Batch<T>& batch, const Weight& weight, const Upstream<T>& upstream,
                   const Options& options, const Runtime& runtime, const Gradients<T>& gradients);

// The k <= C classes with the largest cos_ij of every sample, the largest first and of equal ones the lower class;
// a nan is larger than any number. Of the batch, x alone is read.
template <typename T>
void nearest_classes(const Batch<T>& batch, const Weight& weight, const Options& options, int64_t k,
                     const Runtime& runtime, T* cos, int64_t* classes);  // (N, k) each

// Moves all rows by a gradient (C, D), contiguous in the weight's dtype; of float8 by that of what is stored, in
// float32.
template <typename T>
void apply_update(const Weight& weight, const void* dw, int64_t d, const Update& update, const Runtime& runtime);

// Fills n elements with N(0, std^2); element k depends on seed and k alone.
void fill_normal(void* data, DType dtype, int64_t start, int64_t n, uint64_t seed, double std,
                 const Runtime& runtime);

// The instruction set in use: the best that this processor has, or the one named in COSFACE_CPU_ISA.
const char* instruction_set();

// Whether products of embeddings in bfloat16 with a weight in bfloat16 or float32, which is then rounded, are of
// numbers in bfloat16, without a gradient_tolerance.
bool multiplies_bfloat16(double gradient_tolerance = 0);

}  // namespace cosface
