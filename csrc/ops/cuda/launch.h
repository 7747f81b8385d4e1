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
    const int major = attribute(cudaDevAttrComputeCapabilityMajor);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor);
    TORCH_CHECK_NOT_IMPLEMENTED(major >= 8, op,
                                ": expected a CUDA device of compute capability 8.0 or newer, got ", major,
                                ".", minor);
  }

  // The stream that PyTorch's own kernels would run on now.
  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream().stream(); }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, guard_.current_device().index()));
    return value;
  }

  // What one block may ask for: 99 KiB on sm_86 and sm_89, 163 on sm_80, 227 on sm_90.
  size_t most_shared_bytes() const {
    return static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  }

 private:
  c10::cuda::CUDAGuard guard_;
};

}  // namespace dynplan
