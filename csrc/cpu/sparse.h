// The sparse backward: forward keeps the entries of the softmax that matter, and backward visits no other.
//
// An entry is cos_ij with its place, for j != y_i. With z_ij = s_i N(cos_ij), where N(c) = c unless negatives are
// reshaped, which may also turn their order round, and p_ij = e^{z_ij - lse_i}, which sums to 1 over j != y_i,
// forward keeps of sample i so many entries that dropped_i, the p of the others, is at most the tolerance; it sums
// dropped_i itself, not 1 - sum of the kept, so that no cancellation enters. A sample of which this is not true,
// or that would keep so many entries that the dense products are faster, is exact: backward recomputes its row.
//
// Error: a gradient without the dropped entries lacks D_i = s_i g_lse_i sum_{j dropped} p_ij N'(cos_ij) w_hat_j,
// whose length is at most s_i |g_lse_i| L_i dropped_i with L_i = max_{j dropped} |N'(cos_ij)|, which is 1 for
// N(c) = c, and the projection onto the complement of x_hat_i does not lengthen it. So
//
//     |x_i| |delta dx_i|           <= s_i |g_lse_i| L_i dropped_i
//     sum_j |w_j| |delta dw_j|     <= sum_i s_i |g_lse_i| L_i dropped_i
//     |delta dscale_i|             <= |g_lse_i| dropped_i max_{j dropped} |N(cos_ij)|
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "partition.h"

namespace cosface {

// A row of which more than min(kMostKept, D / 1000) of the negatives would be kept is exact. All are if they would
// keep more than that on average, or half of it where an exact backward finds all cosines. Measured with 256
// samples: of what an exact step without cosines takes, one that keeps a share x takes 0.30 + 1.29 x at D = 512
// and 0.52 + 1.13 x at D = 128 on one core of an EPYC (Zen 4), since forward stores an entry, and backward adds up
// two rows out of L2 for it in place of its part of three products: even at 0.54 and 0.42. On two of a Xeon
// (Sapphire Rapids), C = 30,000, D = 128, least times: 46 ms exact, 36 to 52 with all cosines, and by entries 23,
// 26, 34 and 54 for x = 0.003, 0.014, 0.056 and 0.147, so even near 0.11. D = 512: 323 exact, 248 with all
// cosines, 122 and 143 for x = 0.13 and 0.185; but at C = 10,000 with cosines of a larger spread 54 with all
// cosines, 53 for 0.19.
constexpr double kMostKept = 0.4;

// What forward leaves for backward, in Options::entries:
//   double dropped[N]                  0 of an exact sample
//   double kept[N]                     share of the negatives; 1 of an exact sample
//   Shape shape
//   uint32_t counts[tiles][blocks]     entries of a tile and a block of kTileRows samples
//   T cos[parts][capacity]             of a thread's tiles in order, class by class
//   Place place[parts][capacity]
template <typename T>
class EntryCache {
 public:
  struct Shape {
    int64_t tile, parts, capacity;  // capacity 0: every sample is exact
  };

  EntryCache(const Options& options, int64_t n, int64_t classes);

  // For forward: room for the entries of this partition, or none if there is too little.
  void lay_out(const Partition& partition) const;

  bool empty() const { return dropped == nullptr || shape->capacity == 0; }
  bool exact(int64_t i) const { return kept[i] == 1; }
  Partition partition() const { return {classes, shape->tile, shape->parts}; }

  // For backward: throws std::invalid_argument if the sizes that forward left cannot be of these tensors.
  void check() const;

  // Every sample is exact; nothing without a tolerance.
  void clear() const;

  int64_t blocks() const { return divide_up(n_, kTileRows); }
  uint32_t* counts(int64_t tile) const { return reinterpret_cast<uint32_t*>(shape + 1) + tile * blocks(); }
  T* cos(int64_t part) const;
  Place* place(int64_t part) const;

  double *dropped = nullptr, *kept = nullptr;
  Shape* shape = nullptr;
  const int64_t classes;

 private:
  int64_t table_bytes(int64_t tiles) const { return round_up(tiles * blocks() * sizeof(uint32_t), 64); }

  const int64_t n_, bytes_;
};

// Forward's side. Every thread calls forward_tile() for its tiles, in order; then one calls finish().
template <typename T>
class Keeper {
 public:
  // s (N); row_max, max_cos and row_sum (parts, N), as forward_tile updates them.
  // An exact backward would find the share `cosines` of what it needs.
  Keeper(const EntryCache<T>& cache, const Partition& partition, const Batch<T>& batch, const T* s, T* row_max,
         T* max_cos, double* row_sum, T* target_cos, double tolerance, double cosines);

  // Kernels::forward_tile for the block of samples from i on of the part's next tile, which begins at class
  // `first`.
  void forward_tile(int64_t part, T* z, int64_t first, int64_t classes, int64_t i, int64_t rows, int64_t stride,
                    const T* inv_norm);

  // Chooses what is kept, now that lse is known.
  void finish(const Runtime& runtime);

 private:
  struct Part {
    int64_t first_tile = 0, segments = 0;  // of a tile and a block each
    int64_t tiles = 0, tighten_at = 1, count = 0;
    std::vector<T> cut;          // (N), of N(cos)
    std::vector<double> tail;    // (N)
    std::vector<uint32_t> bins;  // (N, kBins)
    std::vector<uint32_t> rows;  // (N) entries
  };

  bool has_room(int64_t part, int64_t entries);
  double seen(int64_t part) const;
  void tighten(int64_t part);
  void give_up_rows(int64_t part);
  void tally(int64_t part, const T* top);
  void prune(int64_t part, const T* cut, const T* top, double* tail);
  template <typename Body>
  void each_segment(const Part& part, Body body) const;
  const EntryCache<T>& cache_;
  const Partition& partition_;
  const Batch<T>& batch_;
  const SparseKernels<T>& sparse_;
  const T* const s_;
  T *const row_max_, *const max_cos_;
  double* const row_sum_;
  T* const target_cos_;
  const double tolerance_, most_of_row_, most_kept_;  // the last two: shares of the negatives
  std::vector<Part> parts_;
  std::atomic<bool> hopeless_ = false;
};

// Rows of w of a tile: row j at data + j stride.
template <typename T>
struct TileRows {
  const T* data;
  int64_t stride;
  const T* inv_norm;  // 1 / |w_j|
};

// Rows of dw of a tile, or null.
template <typename T>
struct DwRows {
  T* data;
  int64_t stride;
  bool add;  // to what they hold
};

// Backward's side: the samples that are not exact.
template <typename T>
class SparseGradient {
 public:
  SparseGradient(const EntryCache<T>& cache, const Batch<T>& batch, const Upstream<T>& upstream);

  // Whether sample i has a gradient and is not exact.
  bool active(int64_t i) const { return g_lse_[i] != 0 || g_cos_[i] != 0; }

  // One thread's walk over its tiles, in order.
  class Walk {
   public:
    // x_hat (N, width), 0 where a sample is not active. Adds to dx_hat (N, width) if not null, and to row_dot and
    // dscale (N) as backward_tile does.
    Walk(const SparseGradient& of, int64_t part, const T* x_hat, int64_t width, T* dx_hat, double* row_dot,
         double* dscale);

    void tile(int64_t first, int64_t classes, TileRows<T> w, DwRows<T> dw, T* col_dot);

    // After the last tile.
    void finish();

   private:
    void block(int64_t i, int64_t count, int64_t classes, TileRows<T> w, DwRows<T> dw, T* col_dot);
    void target(int64_t i, int64_t j, TileRows<T> w, DwRows<T> dw, T* col_dot);

    const SparseGradient& of_;
    const T* cos_;
    const Place* place_;
    const T* const x_hat_;
    const int64_t width_;
    T* const dx_hat_;
    double *const row_dot_, *const dscale_;
    std::vector<T> g_, sorted_g_;  // of the entries of a block: class by class, and sample by sample
    std::vector<uint8_t> class_, sorted_class_, sample_;
    bool written_[kPlaceClasses];  // rows of dw
  };

 private:
  const EntryCache<T>& cache_;
  const Batch<T>& batch_;
  const SparseKernels<T>& sparse_;
  std::vector<T> s_, top_, log_sum_, g_lse_, g_cos_;  // (N), 0 where a sample is exact
};

}  // namespace cosface
