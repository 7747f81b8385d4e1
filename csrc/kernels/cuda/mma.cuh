// The four PTX instructions that the tensor-core kernels are made of, and the number types they take. All of
// them are in sm_80; under plain g++ the same names come from tests/cuda_emulation/mma_emulation.h.
#pragma once

#include "kernels/cuda/numbers.cuh"

#ifndef __CUDACC__
#include "mma_emulation.h"
#endif

namespace dynplan::kernels::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

// Two 16-bit numbers in one register, `low` in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(sizeof(T) == 2);
  uint32_t bits;
  if constexpr (std::is_same_v<T, BFloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

// 16 bytes, the width of one load and store.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class T>
__device__ __forceinline__ Vector<T> load_vector(const T* address) {
  return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
__device__ __forceinline__ void store_vector(T* address, const Vector<T>& vector) {
  *reinterpret_cast<Vector<T>*>(address) = vector;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of 16 bytes into shared memory past the first-level cache; not `valid` writes zeros and reads
// nothing.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most the last `kPending` groups of this thread are under way. Other threads' copies need a
// barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l brings the address of row l % 8 of matrix l / 8, and gets of
// each matrix columns 2 * (l % 4) and the next of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, each matrix transposed: rows 2 * (l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum (16x8, fp32) += a (16x16) b (16x8). Lane l holds of sum rows l / 4 and l / 4 + 8, columns 2 * (l % 4)
// and the next.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

#else

using cuda_emulation::commit_copies;
using cuda_emulation::copy_async;
using cuda_emulation::load_matrices;
using cuda_emulation::load_matrices_transposed;
using cuda_emulation::wait_copies;

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  cuda_emulation::multiply_add(sum, a, b0, b1, [](uint16_t bits) { return widen(T{bits}); });
}

#endif

}  // namespace dynplan::kernels::cuda
