// The standard headers come first: their inline functions must keep the baseline instruction set.
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

#define DYNPLAN_ISA baseline
#define DYNPLAN_VECTOR_BYTES 16
#include "kernels/region_cross_entropy/entry.h"
