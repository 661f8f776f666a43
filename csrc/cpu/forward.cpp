#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cosines.h"
#include "operands.h"
#include "sparse.h"
#include "subcenters.h"

namespace cosface {
namespace {

template <typename T>
T softplus(T z) {
  return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
}

// Of samples from i on; `sums` is (4, parts, N), and `at` their place in a part.
template <typename T>
MomentSums<T> moment_sums(const Batch<T>& batch, const Results<T>& results, std::vector<double>& sums, int64_t at,
                          int64_t i) {
  double* const below = &sums[at];
  const int64_t step = static_cast<int64_t>(sums.size() / 4);
  return {batch.second ? batch.second + i : nullptr,
          results.target_cos + batch.n + i,
          below,
          below + step,
          below + 2 * step,
          below + 3 * step};
}

template <typename T, typename Operand>
void forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options, const Runtime& runtime,
             const Results<T>& results) {
  const int64_t n = batch.n, classes = options.classes ? options.count : weight.classes;
  // one entry at a time is slower than products of bfloat16
  const bool keeps = options.gradient_tolerance > 0 && Embeddings<T, Operand>::kNormalized;
  const Partition partition(classes, runtime, kTileOf<T, Operand>,
                            keeps ? kPlaceClasses : std::numeric_limits<int64_t>::max(), options.subcenters);
  const EntryCache<T> cache(options, n, classes);
  CosineCache<T>::begin(options, partition, n);
  const Embeddings<T, Operand> x(batch, runtime, Embeddings<T, Operand>::kColumns, [](int64_t) { return true; });
  constexpr T kLowest = std::numeric_limits<T>::lowest();  // finite, so that the difference of two is 0
  std::vector<T> row_max(partition.parts * n, kLowest);
  std::vector<T> max_cos(batch.negatives.tau ? row_max.size() : 0, kLowest);  // where row_max is of N(cos)
  std::vector<double> row_sum(partition.parts * n);
  std::vector<double> sums(results.moments ? 4 * row_sum.size() : 0);  // (4, parts, N)
  std::fill_n(results.target_cos, batch.second ? 2 * n : n, T(0));
  // With s = 0 the left-out target, s (-inf), would be nan; e^{s cos} is 1 for the smallest s as well.
  std::vector<T> s(batch.s, batch.s + n);
  for (T& scale : s) scale = scale == 0 ? std::numeric_limits<T>::min() : scale;
  const CosineCache<T> cosines(options, partition, n);
  std::optional<Keeper<T>> keeper;
  if (keeps) {
    cache.lay_out(partition);
    keeper.emplace(cache, partition, batch, s.data(), row_max.data(), max_cos.empty() ? nullptr : max_cos.data(),
                   row_sum.data(), results.target_cos, options.gradient_tolerance, cosines.share());
  } else {
    cache.clear();
  }

  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassRows<T, Operand> w(weight, options, x, partition.tile, false);
    const Subcenters<T> subcenters(options.subcenters, partition.tile, 0);
    Buffer<T> z(partition.tile * x.tile_stride());
    partition.each_tile(part, [&](int64_t first, int64_t classes) {
      w.load(first, classes);
      x.each_block([&](int64_t i, int64_t rows) {
        w.dot(x, i, classes, z, i == 0 ? w.ahead(first + classes, classes) : Ahead{});
        cosines.keep(first, i, z, classes, rows, x.tile_stride(), w.inv_norm);
        if (keeper) {
          keeper->forward_tile(part, z, first, classes, i, rows, x.tile_stride(), w.inv_norm);
          return;
        }
        const int64_t at = part * n + i;
        T* const max_cos_at = max_cos.empty() ? nullptr : &max_cos[at];
        const auto epilogue = [&](int64_t classes, int64_t first, const T* inv_norm) {
          if (results.moments) {
            kernels<T>().forward_moments(z, classes, rows, x.tile_stride(), inv_norm, batch.y + i, first, &s[i],
                                         batch.negatives.from(i), &row_max[at], max_cos_at, &row_sum[at],
                                         results.target_cos + i, moment_sums(batch, results, sums, at, i));
            return;
          }
          kernels<T>().forward_tile(z, classes, rows, x.tile_stride(), inv_norm, batch.y + i, first, &s[i],
                                    batch.negatives.from(i), &row_max[at], max_cos_at, &row_sum[at],
                                    results.target_cos + i);
        };
        subcenters.forward(z, first, classes, rows, x.tile_stride(), w.inv_norm, epilogue);
      });
    });
  });
  if (keeper) keeper->finish(runtime);

  for (int64_t i = 0; i < n; ++i) {
    const auto largest = [&](const std::vector<T>& running) {
      T top = kLowest;
      for (int64_t part = 0; part < partition.parts; ++part) top = std::max(top, running[part * n + i]);
      return top;
    };
    const T top = largest(row_max), top_cos = max_cos.empty() ? top : largest(max_cos);
    double sum = 0, below = 0;
    for (int64_t part = 0; part < partition.parts; ++part) {
      const int64_t at = part * n + i;
      const double factor = std::exp(s[i] * (row_max[at] - top));
      sum += row_sum[at] * factor;
      if (results.moments) below += factor * (sums[at] + row_sum[at] * (double{top} - double{row_max[at]}));
    }
    if (results.moments) {
      results.moments[i] = static_cast<T>(sum > 0 ? below / sum : 0);
      for (int64_t k = 1; k < 4; ++k) {
        double all = 0;
        for (int64_t part = 0; part < partition.parts; ++part) all += sums[(k * partition.parts + part) * n + i];
        results.moments[k * n + i] = static_cast<T>(all);
      }
    }
    results.max_neg[i] = top_cos == kLowest ? -std::numeric_limits<T>::infinity() : top_cos;
    results.top[i] = top == kLowest ? 0 : top;
    // No exponential here is above 1, as those of a negative scale are: no loss rather than a wrong one.
    results.log_sum[i] = batch.s[i] < 0 ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(std::log(sum));
    const T z = results.log_sum[i] + batch.s[i] * (results.top[i] - (results.target_cos[i] - margin));
    results.loss[i] = batch.y[i] < 0 ? 0 : softplus(z);
  }
}

}  // namespace

template <typename T>
void lmcl_forward(const Batch<T>& batch, const Weight& weight, T margin, const Options& options,
                  const Runtime& runtime, const Results<T>& results) {
  if constexpr (std::is_same_v<T, float>) {
    if (in_bfloat16(batch, weight, options)) {
      return forward<T, BFloat16>(batch, weight, margin, options, runtime, results);
    }
  }
  forward<T, T>(batch, weight, margin, options, runtime, results);
}

template void lmcl_forward(const Batch<float>&, const Weight&, float, const Options&, const Runtime&,
                           const Results<float>&);
template void lmcl_forward(const Batch<double>&, const Weight&, double, const Options&, const Runtime&,
                           const Results<double>&);

}  // namespace cosface
