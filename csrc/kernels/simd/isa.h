// Which instruction set the hot CPU kernels run on: the best the CPU has, or what DYNPLAN_CPU_ISA names.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

// Declares a function of the hot kernels, once per instruction set, each in a namespace of its own.
#if defined(__x86_64__)
#define DYNPLAN_PER_ISA(...)       \
  namespace baseline {             \
  __VA_ARGS__;                     \
  }                                \
  namespace avx2 {                 \
  __VA_ARGS__;                     \
  }                                \
  namespace avx512 {               \
  __VA_ARGS__;                     \
  }
#else
#define DYNPLAN_PER_ISA(...) \
  namespace baseline {       \
  __VA_ARGS__;               \
  }
#endif

// Returns what the call gives in the namespace of `isa`.
#if defined(__x86_64__)
#define DYNPLAN_ON_ISA(isa, ...)                                \
  do {                                                          \
    if ((isa) == CpuIsa::avx512) return avx512::__VA_ARGS__;    \
    if ((isa) == CpuIsa::avx2) return avx2::__VA_ARGS__;        \
    return baseline::__VA_ARGS__;                               \
  } while (false)
#else
#define DYNPLAN_ON_ISA(isa, ...) return static_cast<void>(isa), baseline::__VA_ARGS__
#endif

namespace dynplan::kernels {

enum class CpuIsa { baseline = 0, avx2 = 1, avx512 = 2 };

// What the 16-byte vectors of the baseline compile to: on aarch64 every CPU has NEON.
#if defined(__aarch64__)
inline constexpr const char* kBaselineName = "neon";
inline constexpr const char* kIsaNames = "neon";
#elif defined(__x86_64__)
inline constexpr const char* kBaselineName = "baseline";
inline constexpr const char* kIsaNames = "baseline, avx2 or avx512";
#else
inline constexpr const char* kBaselineName = "baseline";
inline constexpr const char* kIsaNames = "baseline";
#endif

inline const char* name(CpuIsa isa) {
  return isa == CpuIsa::avx512 ? "avx512" : isa == CpuIsa::avx2 ? "avx2" : kBaselineName;
}

inline CpuIsa best_cpu_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return CpuIsa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return CpuIsa::avx2;
#endif
  return CpuIsa::baseline;
}

// Read once per process. Throws std::runtime_error when DYNPLAN_CPU_ISA names an unknown set or one this CPU lacks.
inline CpuIsa cpu_isa() {
  static const CpuIsa chosen = [] {
    const CpuIsa best = best_cpu_isa();
    const char* wanted = std::getenv("DYNPLAN_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return best;
    for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
      if (std::string(wanted) != name(isa)) continue;
      if (isa <= best) return isa;
      throw std::runtime_error(std::string("expected DYNPLAN_CPU_ISA to be at most ") + name(best) +
                               " on this CPU, got " + wanted);
    }
    throw std::runtime_error(std::string("expected DYNPLAN_CPU_ISA to be ") + kIsaNames + ", got " + wanted);
  }();
  return chosen;
}

}  // namespace dynplan::kernels
