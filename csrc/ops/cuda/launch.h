// Between ATen and the launchers of kernels/*.cuh.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

namespace dynplan {

// The stream that PyTorch's own kernels would run on now, of the current device.
inline cudaStream_t current_stream() {
  return c10::cuda::getCurrentCUDAStream().stream();
}

}  // namespace dynplan
