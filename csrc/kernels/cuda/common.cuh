// What every CUDA kernel here needs beside <cuda_runtime.h>. Kernels are launched by `launch`, not by <<<>>>,
// and take dynamic shared memory from `dynamic_shared`: so plain g++ compiles them too, against
// csrc/tests/cuda_emulation.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// A failed assertion stops the kernel and makes the next synchronising call raise, as PyTorch's own kernels
// do.
#ifdef __CUDACC__
// Declared here too: <cassert> declares it only without NDEBUG.
extern "C" __host__ __device__ void __assert_fail(const char*, const char*, unsigned, const char*) noexcept;
#define DYNPLAN_DEVICE_ASSERT(condition) \
  ((condition) ? void() : __assert_fail(#condition, __FILE__, static_cast<unsigned>(__LINE__), __func__))
#else
#define DYNPLAN_DEVICE_ASSERT(condition) \
  ((condition) ? void() : cuda_emulation::device_assert_failed(#condition, __FILE__, __LINE__))
#endif

namespace dynplan::kernels {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

template <typename T>
__host__ __device__ constexpr T ceil_div(T value, T by) {
  return (value + by - 1) / by;
}

#ifdef __CUDACC__
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynplan_dynamic_shared[];
  return reinterpret_cast<T*>(dynplan_dynamic_shared);
}
#else
using cuda_emulation::dynamic_shared;
#endif

// Launches on `stream`; `shared_bytes` may exceed the 48 KiB that a kernel gets unasked.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Sum of `value` over the lanes up to and including this one.
__device__ __forceinline__ int32_t warp_inclusive_sum(int32_t value) {
  const int lane = threadIdx.x % 32;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

struct BlockSum {
  int32_t before;  // over the threads before this one
  int32_t total;   // over the block
};

// Exclusive sum over a block of at most 1024 threads, whole warps; every thread must come here, and `scratch`
// (32 numbers of shared memory) must not be in use by the previous call: the function ends with a barrier for
// that.
__device__ __forceinline__ BlockSum block_exclusive_sum(int32_t value, int32_t* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int32_t inclusive = warp_inclusive_sum(value);
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int32_t before = inclusive - value, total = 0;
  for (int other = 0; other < warps; ++other) {
    if (other < warp) before += scratch[other];
    total += scratch[other];
  }
  __syncthreads();
  return {before, total};
}

}  // namespace dynplan::kernels
