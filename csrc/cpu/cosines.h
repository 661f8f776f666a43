// Cosines that forward leaves for backward.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernels.h"
#include "partition.h"

namespace cosface {

// The tiles whose cosines are kept from forward to backward: spread evenly, so that every thread has its share.
template <typename T>
class CosineCache {
 public:
  static bool wanted(const Options& options) { return options.cosine_bytes >= kHeader; }

  // Forward says how it cut the classes; backward must do so too, whatever the number of threads is by now. What
  // no tile will fill is 0, so that the cache depends on the inputs alone: the last slot may be for fewer classes.
  static void begin(const Options& options, const Partition& partition, int64_t n) {
    if (!wanted(options)) return;
    const CosineCache cache(options, partition, n);
    char* const header = static_cast<char*>(options.cosines);
    char* const last_slot = cache.first_ + std::max<int64_t>(cache.kept_ - 1, 0) * cache.slot_bytes_;
    std::memset(header, 0, kHeader);
    std::memset(last_slot, 0, header + options.cosine_bytes - last_slot);
    *reinterpret_cast<int64_t*>(header) = partition.tile;
  }
  static Partition partition(const Options& options, int64_t classes, const Runtime& runtime, TileSize size) {
    if (!wanted(options)) return {classes, runtime, size, INT64_MAX, options.subcenters};
    const int64_t tile = *static_cast<const int64_t*>(options.cosines);
    const int64_t most = std::max({size.classes, runtime.tile_classes, options.subcenters});
    if (tile < 1 || tile > most || tile % options.subcenters != 0) {
      throw std::invalid_argument(kForeignCache);
    }
    return {classes, tile, std::min<int64_t>(runtime.threads, divide_up(classes, tile))};
  }

  CosineCache(const Options& options, const Partition& partition, int64_t n)
      : partition_(partition),
        first_(wanted(options) ? static_cast<char*>(options.cosines) + kHeader : nullptr),
        exact_(options.exact_cosines),
        element_(exact_ || sizeof(T) == 8 ? sizeof(T) : 2),
        slot_bytes_(partition.tile * n * element_),
        kept_(!wanted(options) || slot_bytes_ == 0
                  ? 0
                  : std::min(partition.tiles, (options.cosine_bytes - kHeader) / slot_bytes_)) {}

  bool holds_all() const { return kept_ == partition_.tiles; }

  // Of the tiles.
  double share() const {
    return static_cast<double>(kept_) / static_cast<double>(std::max<int64_t>(partition_.tiles, 1));
  }

  // z (classes, rows), <w_j, x_hat_i> of the samples from i on with the classes from `first` on, if their tile is
  // one of those that are kept.
  void keep(int64_t first, int64_t i, const T* z, int64_t classes, int64_t rows, int64_t stride,
            const T* inv_norm) const {
    void* to = at(first, i);
    if (to == nullptr) return;
    if (exact_) {
      for (int64_t j = 0; j < classes; ++j) std::copy_n(z + j * stride, rows, static_cast<T*>(to) + j * rows);
    } else {
      kernels<T>().keep_cosines(z, classes, rows, stride, inv_norm, to);
    }
  }

  // z as it was, or false.
  bool recall(int64_t first, int64_t i, T* z, int64_t classes, int64_t rows, int64_t stride,
              const T* inv_norm) const {
    const void* from = at(first, i);
    if (from == nullptr) return false;
    if (exact_) {
      for (int64_t j = 0; j < classes; ++j)
        std::copy_n(static_cast<const T*>(from) + j * rows, rows, z + j * stride);
    } else {
      kernels<T>().recall_cosines(from, classes, rows, stride, inv_norm, z);
    }
    return true;
  }

 private:
  static constexpr int64_t kHeader = 64;

  // Where the block of samples from row i on of the tile from class `first` on is kept, or null.
  void* at(int64_t first, int64_t i) const {
    const int64_t t = first / partition_.tile, slot = t * kept_ / partition_.tiles;
    if ((t + 1) * kept_ / partition_.tiles == slot) return nullptr;
    return first_ + slot * slot_bytes_ + i * partition_.tile * element_;
  }

  const Partition& partition_;
  char* const first_;
  const bool exact_;
  const int64_t element_, slot_bytes_, kept_;
};

}  // namespace cosface
