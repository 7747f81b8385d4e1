#if defined(__x86_64__)
// The standard headers come first: their inline functions must keep the baseline instruction set.
#include <immintrin.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "kernels/cpu_isa.h"
#include "kernels/parallel.h"
#include "kernels/region_cross_entropy.h"
#include "kernels/region_cross_entropy_cpu.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define DYNPLAN_ISA avx512
// 32, not 64: vectors of 64 bytes at odd offsets always straddle two cache lines, and more of them hold
// several labels; they took 5 to 10 % longer (Zen 4).
#define DYNPLAN_VECTOR_BYTES 32
#define DYNPLAN_VECTOR_MASKS 1
#include "kernels/region_cross_entropy_entry.h"
#endif
