// The nearest classes of every sample, without the cosines of all.
//
// Each thread goes over its classes in tiles, as forward does, and collects what may be among the best k of a
// sample in a list twice as long; when that is full, the better half stays, and its last is what later ones must
// exceed.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "operands.h"

namespace cosface {
namespace {

constexpr int64_t kRoom = 32 << 20;  // bytes of candidates
constexpr int64_t kLeast = 64;       // samples

template <typename T>
struct Candidate {
  T cos;
  int64_t j;
};

// A total order, so that no result depends on how the classes are cut.
template <typename T>
bool precedes(const Candidate<T>& a, const Candidate<T>& b) {
  if (std::isnan(a.cos) || std::isnan(b.cos)) {
    return std::isnan(a.cos) && (!std::isnan(b.cos) || a.j < b.j);
  }
  return a.cos > b.cos || (a.cos == b.cos && a.j < b.j);
}

// What every part of the classes offers to every sample.
template <typename T>
class Lists {
 public:
  Lists(const Partition& partition, int64_t n, int64_t k)
      : n_(n),
        k_(k),
        parts_(partition.parts),
        room_(std::min(2 * k, divide_up(partition.tiles, std::max<int64_t>(partition.parts, 1)) * partition.tile)),
        candidates_(parts_ * n * room_),
        count_(parts_ * n),
        limit_(parts_ * n, std::numeric_limits<T>::quiet_NaN()) {}  // which no cosine is at most

  // Of a part's samples.
  const T* limit(int64_t part) const { return limit_.data() + part * n_; }

  void add(int64_t part, int64_t i, Candidate<T> candidate) {
    const int64_t at = part * n_ + i;
    Candidate<T>* const list = candidates_ + at * room_;
    list[count_[at]++] = candidate;
    if (count_[at] == room_ && room_ > k_) {
      std::nth_element(list, list + k_ - 1, list + room_, precedes<T>);
      count_[at] = k_;
      limit_[at] = list[k_ - 1].cos;  // a later one that is equal has a higher number
    }
  }

  // The best k of a sample.
  void best(int64_t i, T* cos, int64_t* classes) const {
    std::vector<Candidate<T>> all;
    for (int64_t part = 0; part < parts_; ++part) {
      const Candidate<T>* const list = candidates_ + (part * n_ + i) * room_;
      all.insert(all.end(), list, list + count_[part * n_ + i]);
    }
    std::partial_sort(all.begin(), all.begin() + k_, all.end(), precedes<T>);
    for (int64_t rank = 0; rank < k_; ++rank) {
      cos[rank] = all[rank].cos;
      classes[rank] = all[rank].j;
    }
  }

 private:
  const int64_t n_, k_, parts_, room_;
  Buffer<Candidate<T>> candidates_;
  std::vector<int64_t> count_;
  std::vector<T> limit_;
};

template <typename T, typename Operand>
void nearest(const Batch<T>& batch, const Weight& weight, const Options& options, int64_t k,
             const Runtime& runtime, T* cos, int64_t* classes) {
  const Partition partition(weight.classes, runtime, kTileOf<T, Operand>);
  const Embeddings<T, Operand> x(batch, runtime, Embeddings<T, Operand>::kColumns, [](int64_t) { return true; });
  Lists<T> lists(partition, batch.n, k);
  runtime.parallel(partition.parts, [&](int64_t part) {
    ClassRows<T, Operand> w(weight, options, x, partition.tile, false);
    Buffer<T> z(partition.tile * x.tile_stride());
    uint8_t where[kTileRows];
    partition.each_tile(part, [&](int64_t first, int64_t count) {
      w.load(first, count);
      x.each_block([&](int64_t i, int64_t rows) {
        w.dot(x, i, count, z, i == 0 ? w.ahead(first + count, count) : Ahead{});
        for (int64_t j = 0; j < count; ++j) {
          const T *const row = z + j * x.tile_stride(), inv_norm = w.inv_norm[j];
          const int64_t found = kernels<T>().exceeding(row, rows, inv_norm, lists.limit(part) + i, where);
          for (int64_t f = 0; f < found; ++f) {
            lists.add(part, i + where[f], {row[where[f]] * inv_norm, first + j});
          }
        }
      });
    });
  });
  share(batch.n, 2 * k * partition.parts, runtime, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) lists.best(i, cos + i * k, classes + i * k);
  });
}

}  // namespace

template <typename T>
void nearest_classes(const Batch<T>& batch, const Weight& weight, const Options& options, int64_t k,
                     const Runtime& runtime, T* cos, int64_t* classes) {
  // As many samples at a time as candidates fit, but enough for every pass over the weight to be worth it.
  const int64_t each =
      std::min(2 * k * runtime.threads, weight.classes) * static_cast<int64_t>(sizeof(Candidate<T>));
  const int64_t some = std::max(kRoom / each, kLeast);
  for (int64_t i = 0; i < batch.n; i += some) {
    Batch<T> part = batch;
    part.x += i * batch.d;
    part.n = std::min(some, batch.n - i);
    const auto run = [&](auto operand) {
      nearest<T, decltype(operand)>(part, weight, options, k, runtime, cos + i * k, classes + i * k);
    };
    if constexpr (std::is_same_v<T, float>) {
      // a weight in float32 would be rounded, and other classes be the nearest
      if (weight.dtype != DType::kFloat32 && in_bfloat16(batch, weight, options)) {
        run(BFloat16{});
        continue;
      }
    }
    run(T{});
  }
}

template void nearest_classes(const Batch<float>&, const Weight&, const Options&, int64_t, const Runtime&, float*,
                              int64_t*);
template void nearest_classes(const Batch<double>&, const Weight&, const Options&, int64_t, const Runtime&,
                              double*, int64_t*);

}  // namespace cosface
