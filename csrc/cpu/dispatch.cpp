// The instruction sets in order of preference; the baseline is always there.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace cosface {

#ifdef COSFACE_X86
namespace avx512 {
template <typename T>
const Kernels<T>& table();
}
namespace avx2 {
template <typename T>
const Kernels<T>& table();
}
#endif
namespace baseline {
template <typename T>
const Kernels<T>& table();
}

namespace {

struct Isa {
  const char* name;
  bool supported;
  const Kernels<float>& (*single_precision)();
  const Kernels<double>& (*double_precision)();
};

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    static const Isa kIsas[] = {
#ifdef COSFACE_X86
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("fma"),
         avx512::table<float>, avx512::table<double>},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::table<float>,
         avx2::table<double>},
#endif
        {"baseline", true, baseline::table<float>, baseline::table<double>},
    };
    const char* wanted = std::getenv("COSFACE_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    std::string names;
    for (const Isa& isa : kIsas) {
      if (!isa.supported) continue;
      if (any || std::string(wanted) == isa.name) return isa;
      names += names.empty() ? isa.name : std::string(", ") + isa.name;
    }
    throw std::runtime_error("COSFACE_CPU_ISA must be one that this processor runs (" + names + "), got '" +
                             wanted + "'.");
  }();
  return isa;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return chosen().single_precision();
}
template <>
const Kernels<double>& kernels<double>() {
  return chosen().double_precision();
}

const char* instruction_set() { return chosen().name; }

}  // namespace cosface
