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

#include "kernels/cpu_isa.h"
#include "kernels/parallel.h"
#include "kernels/region_cross_entropy.h"
#include "kernels/region_cross_entropy_cpu.h"

#pragma GCC target("avx2,fma,f16c")

#define DYNPLAN_ISA avx2
#define DYNPLAN_VECTOR_BYTES 32
#include "kernels/region_cross_entropy_entry.h"
#endif
