// Compiled once for every instruction set, with COSFACE_ISA naming its namespace. Plain loops that the compiler
// vectorises (`omp simd` allows the reductions); nothing here or in inner/ may call an inline function of the
// standard library, because the linker could then keep a copy that an older processor cannot run.
#include "kernels.h"

#include "inner/arithmetic.h"
#include "inner/entries.h"
#include "inner/optimizers.h"
#include "inner/products.h"
#include "inner/random.h"
#include "inner/rows.h"
#include "inner/sigmoids.h"
#include "inner/subcenters.h"
#include "inner/tiles.h"

namespace cosface::COSFACE_ISA {
namespace {

template <typename T, bool kReshaped>
constexpr SparseKernels<T> kSparse{forward_and_keep<T, kReshaped>, tally<T, kReshaped>, prune<T, kReshaped>,
                                   gradients<T, kReshaped>, weighted_sum<T>};

template <typename T>
constexpr Kernels<T> kTable{{kPanel<T>, 1, matmul<T>, pack_transposed<T>, pack<T>},
                            normalize<T>,
                            inverse_norms<T>,
                            load<T>,
                            store<T>,
                            forward_tile<T>,
                            exceeding<T>,
                            backward_tile<T>,
                            forward_moments<T>,
                            backward_moments<T>,
                            sigmoid_tile<T>,
                            fold<T>,
                            unfold<T>,
                            keep_cosines<T>,
                            recall_cosines<T>,
                            project<T>,
                            gradient_norm<T>,
                            sgd<T>,
                            adamw<T>,
                            store_stochastic<T>,
                            largest<T>,
                            times<T>,
                            roots<T>,
                            squares<T>,
                            finish_dx<T>,
                            normal,
                            {kSparse<T, false>, kSparse<T, true>}};

}  // namespace

template <typename T>
const Kernels<T>& table() {
  return kTable<T>;
}
template const Kernels<float>& table<float>();
template const Kernels<double>& table<double>();

}  // namespace cosface::COSFACE_ISA
