#include "ops/cuda/region_cross_entropy_kernels.h"

namespace dynplan::kernels {

DYNPLAN_REGION_LAUNCHERS(, __half)

}  // namespace dynplan::kernels
