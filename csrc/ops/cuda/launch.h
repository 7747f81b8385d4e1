// Between ATen and the launchers of kernels/*.cuh.
#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

namespace dynplan {

// Makes the device of an op's tensors current while it lasts, and refuses one that the kernels are not built
// for.
class DeviceScope {
 public:
  DeviceScope(const char* op, c10::Device device) : guard_(device) {
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
    TORCH_CHECK_NOT_IMPLEMENTED(major >= 8, op,
                                ": expected a CUDA device of compute capability 8.0 or newer, got ", major,
                                ".", minor);
  }

  // The stream that PyTorch's own kernels would run on now.
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

 private:
  c10::cuda::CUDAGuard guard_;
};

}  // namespace dynplan
