#include "kernels/encoder/cuda/layer.cuh"

template cudaError_t dynplan::kernels::cuda::conditional_encoder_layer<__half>(
    const ConditionalEncoderLayerParams<__half>&, cudaStream_t);
