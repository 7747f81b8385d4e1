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

#include "kernels/parallel.h"
#include "kernels/region_cross_entropy/cpu.h"
#include "kernels/region_cross_entropy/params.h"
#include "kernels/simd/isa.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define DYNPLAN_ISA avx512
// 32, but for images of stride 1: at odd offsets vectors of 64 bytes always straddle two cache lines, and the
// windows round more of them hold several labels, which only sums by taps and by bands do not mind.
#define DYNPLAN_VECTOR_BYTES 32
#define DYNPLAN_VECTOR_MASKS 1
#include "kernels/region_cross_entropy/entry.h"
#endif
