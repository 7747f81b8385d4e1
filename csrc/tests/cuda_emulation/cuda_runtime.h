// A stand-in for CUDA's <cuda_runtime.h> that lets g++ compile the device code of
// csrc/kernels/*.cuh as it is and run it on the CPU: for tests of its logic, not of its speed.
//
// Put this folder first on the include path. What is emulated: the thread hierarchy, static and
// dynamic shared memory (poisoned before each block, guarded behind its end), block and warp
// barriers, shuffles, votes, integer atomics, launches through cudaLaunchKernelEx. Not emulated:
// memory ordering between blocks, streams (a launch has ended when it returns), rounding of the
// approximate functions.
#pragma once

#include <cmath>
#include <tuple>
#include <utility>

#include "fibers.h"

#define DYNPLAN_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define DYNPLAN_EMULATED_VECTOR(T, N, bytes, ...) \
  struct alignas(bytes) N {                       \
    T __VA_ARGS__;                                \
  };
DYNPLAN_EMULATED_VECTOR(float, float2, 8, x, y)
DYNPLAN_EMULATED_VECTOR(float, float4, 16, x, y, z, w)
DYNPLAN_EMULATED_VECTOR(double, double2, 16, x, y)
DYNPLAN_EMULATED_VECTOR(int, int2, 8, x, y)
DYNPLAN_EMULATED_VECTOR(int, int4, 16, x, y, z, w)
DYNPLAN_EMULATED_VECTOR(unsigned, uint2, 8, x, y)
DYNPLAN_EMULATED_VECTOR(unsigned, uint4, 16, x, y, z, w)
#undef DYNPLAN_EMULATED_VECTOR

inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline int2 make_int2(int x, int y) {
  return {x, y};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_emulation {

inline GuardedBytes* shared_memory = nullptr;
inline size_t shared_bytes = 0;

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(shared_memory->get());
}

[[noreturn]] inline void device_assert_failed(const char* condition, const char* file, int line) {
  Block::current().fail(std::string(file) + ":" + std::to_string(line) + ": " + condition);
}

inline std::string last_failure;

}  // namespace cuda_emulation

// ---- host side ---------------------------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorAssert = 710
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct EmulatedStream;
using cudaStream_t = EmulatedStream*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  // What an H100 or H200 lets one block use; an A100 has 163 KiB.
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaMemsetAsync(void* bytes, int value, size_t count, cudaStream_t) {
  std::memset(bytes, value, count);
  return cudaSuccess;
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  namespace emu = cuda_emulation;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const unsigned threads = block.x * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  std::tuple<std::decay_t<Expected>...> arguments(std::forward<Actual>(actual)...);
  ::blockDim = block;
  ::gridDim = grid;
  std::mt19937 random(20240229);
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  std::vector<size_t> order(blocks);
  std::iota(order.begin(), order.end(), size_t{0});
  if (emu::schedule == emu::Schedule::reverse) std::reverse(order.begin(), order.end());
  if (emu::schedule == emu::Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
  emu::GuardedBytes shared(config->dynamicSmemBytes, /*at_end=*/true, /*alignment=*/16);
  emu::shared_memory = &shared;
  for (size_t index : order) {
    ::blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                  static_cast<unsigned>(index / grid.x / grid.y)};
    // All-ones bytes are a NaN in every float format and -1 in every integer.
    std::memset(shared.get(), 0xFF, config->dynamicSmemBytes);
    emu::Block fibers(
        threads, [&] { std::apply(kernel, arguments); },
        [&](unsigned t) {
          ::threadIdx = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        });
    emu::last_failure = fibers.run(random);
    if (!emu::last_failure.empty()) return cudaErrorAssert;
    if (!shared.intact()) {
      emu::last_failure = "a write outside of dynamic shared memory";
      return cudaErrorAssert;
    }
  }
  return cudaSuccess;
}

// ---- device side -------------------------------------------------------------------------------

inline void __syncthreads() {
  cuda_emulation::Block::current().barrier(0);
}
inline int __syncthreads_count(int predicate) {
  return cuda_emulation::Block::current().barrier(predicate != 0);
}
inline int __syncthreads_or(int predicate) {
  return __syncthreads_count(predicate) != 0;
}
inline int __syncthreads_and(int predicate) {
  return __syncthreads_count(predicate == 0) == 0;
}
inline void __threadfence() {}

namespace cuda_emulation {

inline unsigned lane() {
  return Block::current().running() % 32;
}

// The whole-warp functions require every named lane to be a thread of the block.
template <typename T>
const T* exchange(unsigned mask, const T& value) {
  return Block::current().exchange(mask, value);
}

template <typename Combine>
unsigned reduce(unsigned mask, unsigned value, unsigned start, Combine combine) {
  const unsigned* values = exchange(mask, value);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) start = combine(start, values[i]);
  return start;
}

}  // namespace cuda_emulation

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  cuda_emulation::exchange(mask, 0);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const int* values = cuda_emulation::exchange(mask, predicate);
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && values[i]) ballot |= 1u << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int base = static_cast<int>(cuda_emulation::lane()) / width * width;
  return cuda_emulation::exchange(mask, value)[base + (source & (width - 1))];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int source = static_cast<int>(cuda_emulation::lane()) ^ lanes;
  const int end = static_cast<int>(cuda_emulation::lane()) / width * width + width;
  return cuda_emulation::exchange(mask,
                                  value)[source < end ? source : static_cast<int>(cuda_emulation::lane())];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = static_cast<int>(cuda_emulation::lane()), source = lane - static_cast<int>(lanes);
  return cuda_emulation::exchange(mask, value)[source >= lane / width * width ? source : lane];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
  const int lane = static_cast<int>(cuda_emulation::lane()), source = lane + static_cast<int>(lanes);
  return cuda_emulation::exchange(mask, value)[source < lane / width * width + width ? source : lane];
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, 0u, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, 0u, [](unsigned a, unsigned b) { return std::max(a, b); });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "dynplan's kernels are deterministic: no float atomics");
  const T old = *address;
  *address = static_cast<T>(old + value);
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  static_assert(std::is_integral_v<T>);
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}
inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}
inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}
inline float __expf(float x) {
  return std::exp(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline void __trap() {
  cuda_emulation::Block::current().fail("__trap");
}
using std::max;
using std::min;
