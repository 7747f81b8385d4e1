// The launchers of kernels/region_cross_entropy/cuda/launch.cuh, instantiated one logit type a file:
// torch-free files, since nvcc takes three times as long over torch's headers as over these kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/region_cross_entropy/cuda/launch.cuh"

namespace dynplan::kernels {

// PREFIX is `extern` for a declaration, nothing for the definition.
#define DYNPLAN_REGION_LAUNCHERS(PREFIX, T)                                                           \
  PREFIX template cudaError_t region_cross_entropy_forward<T>(                                        \
      const RegionCrossEntropyParams&, const RegionCrossEntropyState&, RegionPartial*, cudaStream_t); \
  PREFIX template cudaError_t region_cross_entropy_backward<T>(                                       \
      const RegionCrossEntropyParams&, const RegionCrossEntropyState&, const RegionCrossEntropyGrad&, \
      size_t, cudaStream_t);

DYNPLAN_REGION_LAUNCHERS(extern, float)
DYNPLAN_REGION_LAUNCHERS(extern, double)
DYNPLAN_REGION_LAUNCHERS(extern, __half)
DYNPLAN_REGION_LAUNCHERS(extern, __nv_bfloat16)

}  // namespace dynplan::kernels
