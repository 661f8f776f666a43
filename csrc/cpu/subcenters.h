// A tile of rows as one of classes, for the epilogues, where classes have several rows.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "partition.h"

namespace cosface {

// What one thread has of the rows of a tile and the samples of one block. Nothing, where a class is a row.
template <typename T>
class Subcenters {
 public:
  // cos_stride: of the tile in backward; 0 in forward.
  Subcenters(int64_t subcenters, int64_t tile, int64_t cos_stride)
      : k_(subcenters),
        classes_(subcenters > 1 ? tile / subcenters : 0),
        ones_(classes_),
        col_dot_(cos_stride > 0 ? classes_ : 0),
        winner_(classes_ * kTileRows),
        cos_(classes_ * cos_stride) {
    std::fill_n(static_cast<T*>(ones_), classes_, T(1));
  }

  // Calls epilogue(classes, their first, inv_norm) once z is of classes.
  template <typename Epilogue>
  void forward(T* z, int64_t first, int64_t rows, int64_t n, int64_t stride, const T* inv_norm,
               Epilogue epilogue) const {
    if (k_ == 1) return epilogue(rows, first, inv_norm);
    kernels<T>().fold(z, rows, n, stride, inv_norm, k_, winner_);
    epilogue(rows / k_, first / k_, ones_);
  }

  // Calls epilogue(classes, their first, inv_norm, col_dot) that makes G of z, which is then made that of rows.
  template <typename Epilogue>
  void backward(T* z, int64_t first, int64_t rows, int64_t n, int64_t stride, const T* inv_norm, T* col_dot,
                Epilogue epilogue) const {
    if (k_ == 1) return epilogue(rows, first, inv_norm, col_dot);
    const int64_t classes = rows / k_;
    kernels<T>().fold(z, rows, n, stride, inv_norm, k_, winner_);
    for (int64_t j = 0; j < classes; ++j) std::copy_n(z + j * stride, n, cos_ + j * stride);
    std::fill_n(static_cast<T*>(col_dot_), classes, T(0));
    epilogue(classes, first / k_, ones_, col_dot_);
    kernels<T>().unfold(z, rows, n, stride, inv_norm, k_, winner_, cos_, col_dot);
  }

 private:
  const int64_t k_, classes_;
  Buffer<T> ones_, col_dot_;
  Buffer<uint8_t> winner_;
  Buffer<T> cos_;
};

}  // namespace cosface
