#include "kernels/encoder/cuda/layer.cuh"

template cudaError_t dynplan::kernels::cuda::conditional_encoder_layer<__nv_bfloat16>(
    const ConditionalEncoderLayerParams<__nv_bfloat16>&, cudaStream_t);
