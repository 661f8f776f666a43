#include <algorithm>

#include "row_update.h"

namespace cosface {

template <typename T>
void apply_update(const Weight& weight, const void* dw, int64_t d, const Update& update, const Runtime& runtime) {
  const DType of_g = weight.dtype == DType::kFloat8 ? DType::kFloat32 : weight.dtype;
  share(weight.classes, d, runtime, [&](int64_t first, int64_t last) {
    const RowUpdate<T> rows(update, weight, {}, d);
    Buffer<T> w(d), g(d);
    for (int64_t j = first; j < last; ++j) {
      kernels<T>().load(static_cast<const char*>(weight.data) + j * weight.row_stride * size_of(weight.dtype),
                        weight.dtype, d, w);
      kernels<T>().load(static_cast<const char*>(dw) + j * d * size_of(of_g), of_g, d, g);
      rows.move(j, g, 0, w);
    }
  });
}

template void apply_update<float>(const Weight&, const void*, int64_t, const Update&, const Runtime&);
template void apply_update<double>(const Weight&, const void*, int64_t, const Update&, const Runtime&);

void fill_normal(void* data, DType dtype, int64_t start, int64_t n, uint64_t seed, double std,
                 const Runtime& runtime) {
  constexpr int64_t kGroup = 256;  // elements that one call of the kernel makes
  const int64_t skipped = start / kGroup;
  share(divide_up(start + n, kGroup) - skipped, kGroup, runtime, [&](int64_t first, int64_t last) {
    float values[kGroup];
    for (int64_t group = skipped + first; group < skipped + last; ++group) {
      const int64_t from = std::max(start, group * kGroup), to = std::min(start + n, (group + 1) * kGroup);
      kernels<float>().normal(seed, group, to - group * kGroup, static_cast<float>(std), values);
      kernels<float>().store(values + (from - group * kGroup), to - from,
                             static_cast<char*>(data) + (from - start) * size_of(dtype), dtype);
    }
  });
}

}  // namespace cosface
