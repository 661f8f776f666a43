// The instruction sets in order of preference; the baseline is always there.
#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef COSFACE_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
namespace amx {
const Bfloat16Kernels& bfloat16_table();
}
namespace avx512_bf16 {
const Bfloat16Kernels& bfloat16_table();
}
namespace emulated_amx {
const Bfloat16Kernels& bfloat16_table();
}
namespace emulated_avx512_bf16 {
const Bfloat16Kernels& bfloat16_table();
}
#endif
namespace baseline {
template <typename T>
const Kernels<T>& table();
}

namespace {

struct Isa {
  const char* name;
  bool (*supported)();
  bool preferred;  // to those that follow
  const Kernels<float>& (*single_precision)();
  const Kernels<double>& (*double_precision)();
  const Bfloat16Kernels& (*bfloat16)();
};

#ifdef COSFACE_X86
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  explicit Leaf(unsigned sub) { __get_cpuid_count(7, sub, &a, &b, &c, &d); }
};

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512_bf16() { return has_avx512() && (Leaf(1).a >> 5 & 1); }

// The system must have been asked for the tiles' registers.
bool has_amx() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const unsigned leaf = Leaf(0).d;
  return has_avx512_bf16() && (leaf >> 22 & 1) && (leaf >> 24 & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTiles) == 0;
#else
  return false;
#endif
}
#endif

const Isa& chosen() {
  static const Isa& isa = []() -> const Isa& {
    static const Isa kIsas[] = {
#ifdef COSFACE_X86
        {"amx", has_amx, true, avx512::table<float>, avx512::table<double>, amx::bfloat16_table},
        // on Intel's it multiplies bfloat16 no faster than float
        {"avx512_bf16", has_avx512_bf16, __builtin_cpu_is("amd") != 0, avx512::table<float>, avx512::table<double>,
         avx512_bf16::bfloat16_table},
        {"avx512", has_avx512, true, avx512::table<float>, avx512::table<double>, nullptr},
        {"avx2", has_avx2, true, avx2::table<float>, avx2::table<double>, nullptr},
#endif
        {"baseline", [] { return true; }, true, baseline::table<float>, baseline::table<double>, nullptr},
#ifdef COSFACE_X86
        {"emulated_amx", has_avx2, false, avx2::table<float>, avx2::table<double>, emulated_amx::bfloat16_table},
        {"emulated_avx512_bf16", has_avx2, false, avx2::table<float>, avx2::table<double>,
         emulated_avx512_bf16::bfloat16_table},
#endif
    };
    const char* wanted = std::getenv("COSFACE_CPU_ISA");
    const bool any = wanted == nullptr || *wanted == '\0';
    for (const Isa& isa : kIsas) {
      if ((any ? isa.preferred : std::string(wanted) == isa.name) && isa.supported()) return isa;
    }
    std::string names;
    for (const Isa& isa : kIsas) {
      if (isa.supported()) names += names.empty() ? isa.name : std::string(", ") + isa.name;
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

const Bfloat16Kernels* bfloat16_kernels() {
  const auto table = chosen().bfloat16;
  return table ? &table() : nullptr;
}

bool multiplies_bfloat16(double gradient_tolerance) {
  const Bfloat16Kernels* const table = bfloat16_kernels();
  return table != nullptr && (gradient_tolerance == 0 || table->outruns_entries);
}

const char* instruction_set() { return chosen().name; }

}  // namespace cosface
