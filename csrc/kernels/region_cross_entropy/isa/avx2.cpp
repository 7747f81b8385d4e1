#if defined(__x86_64__)
// The standard headers come first: their inline functions must keep the baseline instruction set.
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

#pragma GCC target("avx2,fma,f16c")

#define DYNPLAN_ISA avx2
#define DYNPLAN_VECTOR_BYTES 32
#include "kernels/region_cross_entropy/entry.h"
#endif
