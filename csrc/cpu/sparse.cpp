#include "sparse.h"

#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace cosface {
namespace {

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// While lse is not known, what may be dropped is a share of the tolerance for the classes seen so far: as if their
// sum were all there is, and the other classes dropped at the same rate. A cut is chosen for the first share and
// lowered by kNatsPerTile wherever the second is passed: later classes may have larger cosines, and what has been
// dropped is lost. At the end, the rest covers the rounding of cuts.
constexpr double kShareOnTheWay = 0.8, kShareTooMuch = 0.95, kShareAtTheEnd = 0.99;
constexpr double kNatsPerTile = 0.25;

// What is dropped on the way is at most this share of the tolerance each, so that a few entries do not decide.
constexpr double kShareOfOne = 1.0 / 32;

// With more exact rows than that, what is left is not worth a second path.
constexpr double kMostExact = 0.85;

// A row looks spread until its first heavy class has come; if it has but one in a thread's classes, that is among
// the share f of them seen so far with probability f. So all is given up if less than 1 - kMostExact of the dense
// products of the share f of the rows would be saved, once that is a share of kRowsExpected rows.
constexpr double kRowsExpected = 8;

// What is too much to keep, since the dense products are worth no more or there is no more room, is taken of the
// classes seen so far and of this share of all: the largest of a normal distribution are yet to come.
constexpr double kSlack = 1.0 / 32;

// Full buffers are emptied to this share at most, so that they are not full again a tile later.
constexpr double kMostFull = 0.875;

// The bins of one sample from the result on hold at most `budget`, as a sum of e^{-distance}.
int64_t first_dropped(const uint32_t* bins, double budget) {
  static const std::array<double, kBins> heaviest = [] {
    std::array<double, kBins> values;
    for (int64_t b = 0; b < kBins; ++b) values[b] = std::exp(-static_cast<double>(b) / kBinsPerNat);
    return values;
  }();
  for (int64_t b = kBins; b > 0; --b) {
    if (bins[b - 1] == 0) continue;  // most are
    budget -= bins[b - 1] * heaviest[b - 1];
    if (!(budget >= 0)) return b;
  }
  return 0;
}

// The entries of the first bins of one sample.
int64_t count(const uint32_t* bins, int64_t first) { return std::accumulate(bins, bins + first, int64_t{0}); }

// An N(cos) that lies below all entries of bins before b and above the others but for rounding, which keeps more.
template <typename T>
T cut_before(int64_t b, T top, T s) {
  if (b == kBins) return -kInfinity<T>;
  const T below = static_cast<T>(b) / kBinsPerNat / s;
  return top - below - 4 * std::numeric_limits<T>::epsilon() * (std::fabs(top) + below);
}

}  // namespace

// -- the cache ---------------------------------------------------------------------------------------------------

template <typename T>
EntryCache<T>::EntryCache(const Options& options, int64_t n, int64_t classes)
    : classes(classes), n_(n), bytes_(options.gradient_tolerance > 0 ? options.entry_bytes : 0) {
  if (static_cast<int64_t>(2 * n * sizeof(double) + sizeof(Shape)) > bytes_) return;
  dropped = static_cast<double*>(options.entries);
  kept = dropped + n;
  shape = reinterpret_cast<Shape*>(kept + n);
}

template <typename T>
void EntryCache<T>::lay_out(const Partition& partition) const {
  if (dropped == nullptr) return;
  *shape = {partition.tile, partition.parts, 0};
  const int64_t entries = reinterpret_cast<char*>(counts(0)) - reinterpret_cast<char*>(dropped);
  const int64_t left = bytes_ - round_up(entries, 64) - table_bytes(partition.tiles) - 64;
  const int64_t each =
      left / static_cast<int64_t>(sizeof(T) + sizeof(Place)) / std::max<int64_t>(partition.parts, 1);
  const int64_t one_tile = std::min(partition.tile, classes) * std::min(n_, kTileRows) + kKeepSlack;
  if (partition.tile <= kPlaceClasses && each >= 2 * one_tile) shape->capacity = each / 64 * 64;
}

template <typename T>
void EntryCache<T>::check() const {
  if (dropped == nullptr || shape->capacity == 0) return;
  const auto [tile, parts, capacity] = *shape;
  bool fits = tile > 0 && tile <= kPlaceClasses && parts > 0 && parts <= partition().tiles && capacity > 0 &&
              capacity <= bytes_;
  if (fits) {
    const int64_t entries = reinterpret_cast<char*>(counts(0)) - reinterpret_cast<char*>(dropped);
    const int64_t left = bytes_ - round_up(entries, 64) - table_bytes(partition().tiles);
    fits = parts <= left / (capacity * static_cast<int64_t>(sizeof(T) + sizeof(Place)));
  }
  for (int64_t part = 0; fits && part < parts; ++part) {
    const uint32_t *begin = counts(partition().first_tile(part)), *end = counts(partition().first_tile(part + 1));
    fits = std::accumulate(begin, end, int64_t{0}) <= capacity;
  }
  if (!fits) throw std::invalid_argument(kForeignCache);
}

template <typename T>
void EntryCache<T>::clear() const {
  if (dropped == nullptr) return;
  std::fill_n(dropped, n_, 0);
  std::fill_n(kept, n_, 1);
  shape->capacity = 0;
}

template <typename T>
T* EntryCache<T>::cos(int64_t part) const {
  const int64_t before = reinterpret_cast<char*>(counts(0)) - reinterpret_cast<char*>(dropped);
  char* entries = reinterpret_cast<char*>(dropped) + round_up(before, 64) + table_bytes(partition().tiles);
  return reinterpret_cast<T*>(entries) + part * shape->capacity;
}

template <typename T>
Place* EntryCache<T>::place(int64_t part) const {
  return reinterpret_cast<Place*>(cos(shape->parts)) + part * shape->capacity;
}

// -- forward -----------------------------------------------------------------------------------------------------

template <typename T>
Keeper<T>::Keeper(const EntryCache<T>& cache, const Partition& partition, const Batch<T>& batch, const T* s,
                  T* row_max, T* max_cos, double* row_sum, T* target_cos, double tolerance, double cosines)
    : cache_(cache),
      partition_(partition),
      batch_(batch),
      sparse_(kernels<T>().sparse_for(batch.negatives)),
      s_(s),
      row_max_(row_max),
      max_cos_(max_cos),
      row_sum_(row_sum),
      target_cos_(target_cos),
      tolerance_(tolerance),
      most_of_row_(std::min(kMostKept, static_cast<double>(batch.d) / 1000)),
      most_kept_(most_of_row_ / (1 + cosines)),
      parts_(partition.parts),
      hopeless_(cache.empty()) {
  for (int64_t part = 0; part < partition.parts; ++part) {
    parts_[part].first_tile = partition.first_tile(part);
    parts_[part].cut.assign(batch.n, -kInfinity<T>);
    parts_[part].tail.assign(batch.n, 0);
    parts_[part].rows.resize(batch.n);
  }
}

template <typename T>
void Keeper<T>::forward_tile(int64_t part, T* z, int64_t first, int64_t classes, int64_t i, int64_t rows,
                             int64_t stride, const T* inv_norm) {
  const int64_t at = part * batch_.n + i;
  T* const max_cos = max_cos_ == nullptr ? nullptr : max_cos_ + at;
  if (!has_room(part, classes * rows + kKeepSlack)) {
    kernels<T>().forward_tile(z, classes, rows, stride, inv_norm, batch_.y + i, first, s_ + i,
                              batch_.negatives.from(i), row_max_ + at, max_cos, row_sum_ + at, target_cos_ + i);
    return;
  }
  Part& p = parts_[part];
  const int64_t kept =
      sparse_.forward_and_keep(z, classes, rows, stride, inv_norm, batch_.y + i, first, s_ + i,
                               batch_.negatives.from(i), row_max_ + at, max_cos, row_sum_ + at, target_cos_ + i,
                               &p.cut[i], &p.tail[i], cache_.cos(part) + p.count, cache_.place(part) + p.count);
  cache_.counts(p.first_tile)[p.segments++] = static_cast<uint32_t>(kept);
  p.count += kept;
  if (i + rows == batch_.n) ++p.tiles;
  const double too_much = kShareTooMuch * tolerance_ * seen(part);
  for (int64_t r = 0; r < rows; ++r) {
    if (p.tail[i + r] > too_much * row_sum_[at + r]) p.cut[i + r] -= static_cast<T>(kNatsPerTile) / s_[i + r];
  }
  if (p.tiles < p.tighten_at) return;
  const int64_t before = p.count;
  tighten(part);
  p.tighten_at *= p.count > before / 2 ? 4 : 2;  // less often where it gains little
  const auto tiles = static_cast<double>(partition_.first_tile(part + 1) - p.first_tile);
  const auto enough = static_cast<int64_t>(std::ceil(kRowsExpected / static_cast<double>(batch_.n) * tiles));
  if (p.tiles < enough) p.tighten_at = std::min(p.tighten_at, enough);
}

// Whether the part's buffer holds so many entries more, if need be at the expense of others.
template <typename T>
bool Keeper<T>::has_room(int64_t part, int64_t entries) {
  const int64_t capacity = cache_.empty() ? 0 : cache_.shape->capacity;
  if (hopeless_.load(std::memory_order_relaxed)) return false;
  if (parts_[part].count + entries <= capacity) return true;
  tighten(part);
  give_up_rows(part);
  if (parts_[part].count + entries > capacity) hopeless_ = true;
  return !hopeless_;
}

// The share of the part's classes that has been seen.
template <typename T>
double Keeper<T>::seen(int64_t part) const {
  const Part& p = parts_[part];
  return static_cast<double>(p.tiles) / static_cast<double>(partition_.first_tile(part + 1) - p.first_tile);
}

// Raises the cuts as far as the entries seen so far allow, and gives up if they promise too little.
template <typename T>
void Keeper<T>::tighten(int64_t part) {
  Part& p = parts_[part];
  const T* top = row_max_ + part * batch_.n;
  const double* sum = row_sum_ + part * batch_.n;
  const auto n = static_cast<double>(batch_.n);
  const auto classes = static_cast<double>((partition_.first_tile(part + 1) - p.first_tile) * partition_.tile);
  const double room = static_cast<double>(cache_.shape->capacity) / n;
  const double most = std::min(most_kept_ * classes, room) * (seen(part) + kSlack);
  const auto is_hopeless = [&](auto wanted) {
    double gain = 0;  // rows' worth of dense products
    for (int64_t i = 0; i < batch_.n; ++i) {
      if (p.cut[i] != kInfinity<T>) gain += std::max(0.0, 1 - wanted(i) / most);
    }
    const double met = seen(part) * n;  // rows that have met their only heavy class
    if (met >= kRowsExpected && gain < (1 - kMostExact) * met) hopeless_ = true;
    return hopeless_.load();
  };
  // The sum is of numbers of at most 1.
  if (is_hopeless([&](int64_t i) { return (1 - tolerance_) * sum[i]; })) return;
  tally(part, top);
  if (is_hopeless([&](int64_t i) {
        const uint32_t* bins = &p.bins[i * kBins];
        return static_cast<double>(count(bins, first_dropped(bins, tolerance_ * sum[i])));
      })) {
    return;
  }
  for (int64_t i = 0; i < batch_.n; ++i) {
    const double all = tolerance_ * sum[i];
    const double budget = kShareOnTheWay * seen(part) * all - p.tail[i];
    const T light = top[i] + static_cast<T>(std::log(kShareOfOne * all)) / s_[i];
    const T cut = std::min(light, cut_before(first_dropped(&p.bins[i * kBins], budget), top[i], s_[i]));
    p.cut[i] = std::max(p.cut[i], cut);
  }
  prune(part, p.cut.data(), top, p.tail.data());
}

// Makes room at the expense of the samples that keep the most: for as many entries as fill it by the last tile.
template <typename T>
void Keeper<T>::give_up_rows(int64_t part) {
  Part& p = parts_[part];
  const double full = std::min(seen(part), kMostFull) * static_cast<double>(cache_.shape->capacity);
  const auto room = static_cast<int64_t>(full);
  if (hopeless_ || p.count <= room) return;
  std::vector<int64_t> order(batch_.n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.rows[a] > p.rows[b]; });
  int64_t left = p.count;
  for (int64_t i : order) {
    if (left <= room) break;
    left -= p.rows[i];
    p.cut[i] = kInfinity<T>;
    p.tail[i] = kInfinity<double>;
  }
  const auto given_up = std::count(p.cut.begin(), p.cut.end(), kInfinity<T>);
  if (static_cast<double>(given_up) > kMostExact * static_cast<double>(batch_.n)) hopeless_ = true;
  if (hopeless_) return;
  std::vector<double> given(batch_.n);  // what is dropped of rows that are given up does not count
  prune(part, p.cut.data(), row_max_ + part * batch_.n, given.data());
}

// Calls body(first sample of its block, number of entries) for the segments in order.
template <typename T>
template <typename Body>
void Keeper<T>::each_segment(const Part& part, Body body) const {
  const int64_t blocks = cache_.blocks();
  for (int64_t segment = 0; segment < part.segments; ++segment) {
    body(segment % blocks * kTileRows, cache_.counts(part.first_tile)[segment]);
  }
}

template <typename T>
void Keeper<T>::tally(int64_t part, const T* top) {
  Part& p = parts_[part];
  p.bins.assign(batch_.n * kBins, 0);
  const T* cos = cache_.cos(part);
  const Place* place = cache_.place(part);
  each_segment(p, [&](int64_t i, uint32_t& count) {
    sparse_.tally(cos, place, count, s_ + i, batch_.negatives.from(i), top + i, &p.bins[i * kBins]);
    cos += count;
    place += count;
  });
  for (int64_t i = 0; i < batch_.n; ++i) {
    p.rows[i] = std::accumulate(&p.bins[i * kBins], &p.bins[i * kBins] + kBins, uint32_t{0});
  }
}

template <typename T>
void Keeper<T>::prune(int64_t part, const T* cut, const T* top, double* tail) {
  Part& p = parts_[part];
  T *cos = cache_.cos(part), *to_cos = cos;
  Place *place = cache_.place(part), *to_place = place;
  each_segment(p, [&](int64_t i, uint32_t& count) {
    const int64_t left = sparse_.prune(cos, place, count, cut + i, s_ + i, batch_.negatives.from(i), top + i,
                                       tail + i, &p.rows[i], to_cos, to_place);
    cos += count;
    place += count;
    to_cos += left;
    to_place += left;
    count = static_cast<uint32_t>(left);
  });
  p.count = to_cos - cache_.cos(part);
}

template <typename T>
void Keeper<T>::finish(const Runtime& runtime) {
  if (cache_.dropped == nullptr) return;
  if (hopeless_) return cache_.clear();
  const int64_t n = batch_.n, parts = partition_.parts;
  std::vector<T> top(n), cut(n);
  std::vector<double> sum(n), tail(n);
  for (int64_t i = 0; i < n; ++i) {
    top[i] = row_max_[i];
    for (int64_t part = 1; part < parts; ++part) top[i] = std::max(top[i], row_max_[part * n + i]);
    for (int64_t part = 0; part < parts; ++part) {
      const Part& p = parts_[part];
      sum[i] += row_sum_[part * n + i] * std::exp(s_[i] * (row_max_[part * n + i] - top[i]));
      if (p.tail[i] != 0) tail[i] += p.tail[i] * std::exp(s_[i] * (row_max_[part * n + i] - top[i]));
    }
  }
  runtime.parallel(parts, [&](int64_t part) { tally(part, top.data()); });

  std::vector<double> wanted(n);  // kept entries, or as many as make a sample as dear as an exact one
  share(n, parts * kBins, runtime, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      uint32_t* bins = &parts_[0].bins[i * kBins];
      for (int64_t part = 1; part < parts; ++part) {
        for (int64_t b = 0; b < kBins; ++b) bins[b] += parts_[part].bins[i * kBins + b];
      }
      const int64_t end = first_dropped(bins, kShareAtTheEnd * tolerance_ * sum[i] - tail[i]);
      const double most = most_of_row_ * static_cast<double>(partition_.classes);
      wanted[i] = static_cast<double>(count(bins, end));
      const bool exact = !(tail[i] <= tolerance_ * sum[i]) || wanted[i] > most;
      cut[i] = exact ? kInfinity<T> : cut_before(end, top[i], s_[i]);
      if (exact) wanted[i] = most;
    }
  });
  const double all = most_kept_ * static_cast<double>(partition_.classes) * static_cast<double>(n);
  if (std::accumulate(wanted.begin(), wanted.end(), 0.0) > kMostExact * all) return cache_.clear();

  std::vector<double> pruned(parts * n);
  runtime.parallel(parts, [&](int64_t part) { prune(part, cut.data(), top.data(), pruned.data() + part * n); });
  for (int64_t i = 0; i < n; ++i) {
    double rows = 0;
    for (int64_t part = 0; part < parts; ++part) {
      tail[i] += pruned[part * n + i];
      rows += parts_[part].rows[i];
    }
    const bool exact = cut[i] == kInfinity<T> || !(tail[i] <= tolerance_ * sum[i]);
    const double negatives = static_cast<double>(partition_.classes - (batch_.y[i] >= 0));
    cache_.dropped[i] = exact || tail[i] == 0 ? 0 : tail[i] / sum[i];
    cache_.kept[i] = exact ? 1 : negatives > 0 ? std::min(rows / negatives, 1 - 1e-12) : 0;
  }
}

// -- backward ----------------------------------------------------------------------------------------------------

template <typename T>
SparseGradient<T>::SparseGradient(const EntryCache<T>& cache, const Batch<T>& batch, const Upstream<T>& upstream)
    : cache_(cache),
      batch_(batch),
      sparse_(kernels<T>().sparse_for(batch.negatives)),
      s_(batch.n),
      top_(batch.n),
      log_sum_(batch.n),
      g_lse_(batch.n),
      g_cos_(batch.n) {
  for (int64_t i = 0; i < batch.n; ++i) {
    if (cache.exact(i)) continue;
    s_[i] = batch.s[i];
    top_[i] = upstream.top[i];
    log_sum_[i] = upstream.log_sum[i];
    g_lse_[i] = upstream.g_lse[i];
    g_cos_[i] = upstream.g_cos[i];
  }
}

template <typename T>
SparseGradient<T>::Walk::Walk(const SparseGradient& of, int64_t part, const T* x_hat, int64_t width, T* dx_hat,
                              double* row_dot, double* dscale)
    : of_(of),
      cos_(of.cache_.cos(part)),
      place_(of.cache_.place(part)),
      x_hat_(x_hat),
      width_(width),
      dx_hat_(dx_hat),
      row_dot_(row_dot),
      dscale_(dscale) {}

template <typename T>
void SparseGradient<T>::Walk::tile(int64_t first, int64_t classes, TileRows<T> w, DwRows<T> dw, T* col_dot) {
  std::fill_n(written_, classes, dw.add);
  const uint32_t* counts = of_.cache_.counts(first / of_.cache_.shape->tile);
  for (int64_t i = 0; i < of_.batch_.n; i += kTileRows) block(i, *counts++, classes, w, dw, col_dot);
  for (int64_t i = 0; i < of_.batch_.n; ++i) {
    const int64_t j = of_.batch_.y[i] - first;
    if (of_.g_cos_[i] != 0 && of_.batch_.y[i] >= 0 && j >= 0 && j < classes) target(i, j, w, dw, col_dot);
  }
  for (int64_t j = 0; dw.data != nullptr && j < classes; ++j) {
    if (!written_[j]) std::fill_n(dw.data + j * dw.stride, width_, T(0));
  }
}

// The kept entries come class by class: dw_j is summed while x_hat of the block stays in L2. Sorted by sample,
// they give dx_hat_i while the rows of the tile do.
template <typename T>
void SparseGradient<T>::Walk::block(int64_t i, int64_t count, int64_t classes, TileRows<T> w, DwRows<T> dw,
                                    T* col_dot) {
  const auto& sparse = of_.sparse_;
  Place last_class = 0, last_sample = 0;
  for (int64_t k = 0; k < count; ++k) {
    last_class = std::max<Place>(last_class, place_[k] / kTileRows);
    last_sample = std::max<Place>(last_sample, place_[k] % kTileRows);
  }
  if (count > 0 && (last_class >= classes || i + last_sample >= of_.batch_.n)) {
    throw std::runtime_error(kForeignCache);  // not std::invalid_argument: rows of other tiles may have moved
  }
  if (static_cast<int64_t>(g_.size()) < count) {
    for (auto* v : {&g_, &sorted_g_}) v->resize(count);
    for (auto* v : {&class_, &sorted_class_, &sample_}) v->resize(count);
  }
  const int64_t left = sparse.gradients(cos_, place_, count, w.inv_norm, &of_.s_[i], of_.batch_.negatives.from(i),
                                        &of_.top_[i], &of_.log_sum_[i], &of_.g_lse_[i], col_dot, row_dot_ + i,
                                        dscale_ + i, g_.data(), class_.data(), sample_.data());
  cos_ += count;
  place_ += count;
  for (int64_t k = 0; dw.data != nullptr && k < left;) {
    const int64_t j = class_[k], begin = k;
    while (k < left && class_[k] == j) ++k;
    sparse.weighted_sum(x_hat_ + i * width_, width_, &sample_[begin], &g_[begin], k - begin, width_,
                        dw.data + j * dw.stride, written_[j]);
    written_[j] = true;
  }
  if (dx_hat_ == nullptr) return;
  int64_t end[kTileRows] = {};
  for (int64_t k = 0; k < left; ++k) ++end[sample_[k]];
  std::exclusive_scan(end, end + kTileRows, end, int64_t{0});
  for (int64_t k = 0; k < left; ++k) {
    const int64_t to = end[sample_[k]]++;
    sorted_g_[to] = g_[k];
    sorted_class_[to] = class_[k];
  }
  for (int64_t r = 0, begin = 0; r < kTileRows; begin = end[r++]) {
    if (begin == end[r]) continue;
    sparse.weighted_sum(w.data, w.stride, &sorted_class_[begin], &sorted_g_[begin], end[r] - begin, width_,
                        dx_hat_ + (i + r) * width_, true);
  }
}

template <typename T>
void SparseGradient<T>::Walk::target(int64_t i, int64_t j, TileRows<T> w, DwRows<T> dw, T* col_dot) {
  const T *x_hat = x_hat_ + i * width_, *row = w.data + j * w.stride;
  double dot = 0;
  for (int64_t k = 0; k < width_; ++k) dot += static_cast<double>(x_hat[k]) * static_cast<double>(row[k]);
  const T cos = static_cast<T>(dot) * w.inv_norm[j], g = of_.g_cos_[i], factor = g * w.inv_norm[j];
  const uint8_t only = 0;
  col_dot[j] += g * cos;
  row_dot_[i] += g * cos;
  if (dw.data != nullptr) {
    of_.sparse_.weighted_sum(x_hat, 0, &only, &factor, 1, width_, dw.data + j * dw.stride, written_[j]);
    written_[j] = true;
  }
  if (dx_hat_ != nullptr) {
    of_.sparse_.weighted_sum(row, 0, &only, &factor, 1, width_, dx_hat_ + i * width_, true);
  }
}

template <typename T>
void SparseGradient<T>::Walk::finish() {
  if (of_.batch_.negatives.tau != nullptr) return;
  for (int64_t i = 0; i < of_.batch_.n; ++i) row_dot_[i] += of_.s_[i] * dscale_[i];
}

template class EntryCache<float>;
template class EntryCache<double>;
template class Keeper<float>;
template class Keeper<double>;
template class SparseGradient<float>;
template class SparseGradient<double>;

}  // namespace cosface
