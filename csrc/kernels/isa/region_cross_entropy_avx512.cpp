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
// 32, not 64, but where vectors are aligned and may hold several labels: at odd offsets those of 64 bytes
// always straddle two cache lines, and windows round more of them hold several labels.
#define DYNPLAN_VECTOR_BYTES 32
#define DYNPLAN_VECTOR_MASKS 1
#include "kernels/region_cross_entropy_entry.h"
#endif
