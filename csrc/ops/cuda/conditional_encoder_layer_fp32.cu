#include "kernels/encoder/cuda/layer.cuh"

template cudaError_t dynplan::kernels::cuda::conditional_encoder_layer<float>(
    const ConditionalEncoderLayerParams<float>&, cudaStream_t);
