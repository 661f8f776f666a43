// How the class axis is cut and shared out among threads.
//
// A tile is a range of classes, taken up to kTileRows samples at a time and laid out class by class. Forward is
// one matrix product, z = w x_hat^T, and an epilogue; backward is the same product, an epilogue that turns z into
// G, and two more products, dw = G x_hat and dx_hat += G^T w. Each thread owns a range of tiles and keeps partial
// results of its own, which are combined in the order of the threads, so that a result depends on the inputs, the
// number of threads, the size of a tile and the instruction set, and on nothing else.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "lmcl.h"

namespace cosface {

// The most classes of a tile, and what its classes are a multiple of. 252 classes x 256 samples x 4 B = 252 KiB of
// z and, at D = 512, 504 KiB of class rows stay in an L2 of 1 MiB. 252 is a multiple of every kBlockRows, and 14
// of that of AVX-512, so that the matrix products have few blocks that are partly empty.
struct TileSize {
  int64_t classes, step;
};
constexpr TileSize kTile{252, 14};
constexpr TileSize kBfloat16Tile{256, 32};

// Uninitialised memory, aligned for the widest registers; of no numbers a null pointer, as what is not wanted has.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(n > 0 ? static_cast<T*>(operator new(sizeof(T) * n, kAlign)) : nullptr) {}
  operator T*() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Delete {
    void operator()(T* p) const { operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Delete> data_;
};

constexpr char kForeignCache[] = "cache must be what lmcl returned for these tensors and options.";

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

// Runs body(first, last) on even shares of [0, n), one per thread; of what is little work each, on fewer threads.
template <typename Body>
void share(int64_t n, int64_t numbers_each, const Runtime& runtime, Body body) {
  constexpr int64_t kLeast = 1 << 15;  // numbers that take about as long as to wake a thread
  const int64_t most = n * numbers_each / kLeast + 1;
  const int64_t parts = std::min({static_cast<int64_t>(runtime.threads), n, most});
  runtime.parallel(parts, [&](int64_t part) { body(n * part / parts, n * (part + 1) / parts); });
}

// How the class axis is cut: into tiles, and the tiles into one contiguous part per thread.
struct Partition {
  int64_t classes, tile, tiles, parts;

  Partition(int64_t classes, int64_t tile, int64_t parts)
      : classes(classes), tile(tile), tiles(divide_up(classes, tile)), parts(parts) {}

  // Tiles are multiples of `whole`, of which the classes are one too.
  Partition(int64_t classes, const Runtime& runtime, TileSize size, int64_t most = INT64_MAX, int64_t whole = 1)
      : classes(classes) {
    const int64_t fair = divide_up(std::max<int64_t>(classes, 1), runtime.threads);  // classes of a thread
    const int64_t each = divide_up(fair, size.classes);                              // its tiles
    tile = runtime.tile_classes > 0 ? runtime.tile_classes : round_up(divide_up(fair, each), size.step);
    tile = std::min({tile, most, std::max<int64_t>(classes, 1)});  // buffers are as large as a tile
    tile = std::max<int64_t>(tile / whole, 1) * whole;
    tiles = divide_up(classes, tile);
    parts = std::min<int64_t>(runtime.threads, tiles);
  }

  int64_t first_tile(int64_t part) const { return tiles * part / parts; }

  // Calls body(first class, number of classes) for the tiles of one part, in order.
  template <typename Body>
  void each_tile(int64_t part, Body body) const {
    for (int64_t t = first_tile(part); t < first_tile(part + 1); ++t) {
      body(t * tile, std::min(tile, classes - t * tile));
    }
  }
};

}  // namespace cosface
