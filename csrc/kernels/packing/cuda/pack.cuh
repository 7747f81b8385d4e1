// Padding out and in, on CUDA. Formulas: pack.h. The capacity of packed is every position, whatever the mask
// holds; no size is read back to the host.
//
// pack: `count_tokens_kernel` counts the tokens of each chunk of positions, `token_indices_kernel` turns
// counts and mask into indices and cu_seqlens, `gather_rows_kernel` copies. The k-th token fills slot k, and
// the k-th padding position marks slot tokens + k as empty: every slot has one writer. unpack inverts the
// indices and gathers too, so that each byte of its result is written once. Rows are copied as bytes, one
// warp a row.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/packing/pack.h"

namespace dynplan::kernels {

constexpr int kPackThreads = 256;
constexpr int kPackChunk = 1024;  // positions a block, four a thread

// ---- mask to indices
// -----------------------------------------------------------------------------------------------

template <class Mask>
struct TokenIndicesParams {
  const Mask* mask;     // (positions,), dense; non-zero = token
  int64_t positions;    // B * S
  int64_t length;       // S
  int32_t* counts;      // (ceil(positions / kPackChunk),), scratch
  int32_t* indices;     // (positions,)
  int32_t* cu_seqlens;  // (B + 1,)
};

template <class Mask>
__global__ void __launch_bounds__(kPackThreads)
    count_tokens_kernel(const __grid_constant__ TokenIndicesParams<Mask> p) {
  __shared__ int32_t scratch[32];
  const int64_t base = blockIdx.x * int64_t{kPackChunk};
  int32_t tokens = 0;
  for (int64_t i = base + threadIdx.x; i < min(base + kPackChunk, p.positions); i += kPackThreads)
    tokens += is_set(p.mask[i]);
  const BlockSum sum = block_exclusive_sum(tokens, scratch);
  if (threadIdx.x == 0) p.counts[blockIdx.x] = sum.total;
}

template <class Mask>
__global__ void __launch_bounds__(kPackThreads)
    token_indices_kernel(const __grid_constant__ TokenIndicesParams<Mask> p) {
  __shared__ int32_t scratch[32];
  int32_t mine_before = 0, mine_all = 0;
  for (int64_t chunk = threadIdx.x; chunk < gridDim.x; chunk += kPackThreads) {
    const int32_t tokens = p.counts[chunk];
    mine_all += tokens;
    if (chunk < blockIdx.x) mine_before += tokens;
  }
  int32_t rank = block_exclusive_sum(mine_before, scratch).total;
  const int32_t total = block_exclusive_sum(mine_all, scratch).total;

  const int64_t base = blockIdx.x * int64_t{kPackChunk};
  for (int64_t step = base; step < min(base + kPackChunk, p.positions); step += kPackThreads) {
    const int64_t position = step + threadIdx.x;
    const bool inside = position < p.positions;
    const bool token = inside && is_set(p.mask[position]);
    const BlockSum sum = block_exclusive_sum(token, scratch);
    const int32_t before = rank + sum.before;
    if (inside) {
      const int64_t slot = token ? before : total + (position - before);
      p.indices[slot] = token ? static_cast<int32_t>(position) : -1;
      if ((position + 1) % p.length == 0) p.cu_seqlens[(position + 1) / p.length] = before + token;
    }
    rank += sum.total;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) p.cu_seqlens[0] = 0;
}

// positions > 0; `counts` has room for pack_chunks(positions).
inline int64_t pack_chunks(int64_t positions) {
  return ceil_div(positions, int64_t{kPackChunk});
}

template <class Mask>
cudaError_t token_indices_cuda(const TokenIndicesParams<Mask>& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(pack_chunks(p.positions)));
  const cudaError_t error = launch(count_tokens_kernel<Mask>, grid, dim3(kPackThreads), 0, stream, p);
  if (error != cudaSuccess) return error;
  return launch(token_indices_kernel<Mask>, grid, dim3(kPackThreads), 0, stream, p);
}

// ---- rows
// ----------------------------------------------------------------------------------------------------------

// PackParams::indices may hold -1 (a row of zeros) and must be below `positions`.
template <class Word>
__global__ void __launch_bounds__(kPackThreads)
    gather_rows_kernel(const __grid_constant__ PackParams p, int64_t positions) {
  const int lane = threadIdx.x % 32;
  const int64_t words = p.row_bytes / sizeof(Word);
  const int64_t warps = gridDim.x * int64_t{kPackThreads / 32};
  for (int64_t t = blockIdx.x * int64_t{kPackThreads / 32} + threadIdx.x / 32; t < p.tokens; t += warps) {
    const int64_t index = p.indices[t];
    DYNPLAN_DEVICE_ASSERT(index >= -1 && index < positions);
    Word* row = reinterpret_cast<Word*>(p.packed + t * p.row_bytes);
    if (index < 0) {
      for (int64_t i = lane; i < words; i += 32) row[i] = Word{};
      continue;
    }
    const Word* source = reinterpret_cast<const Word*>(p.hidden + (index / p.length) * p.batch_stride +
                                                       (index % p.length) * p.length_stride);
    for (int64_t i = lane; i < words; i += 32) row[i] = source[i];
  }
}

// packed[t] = hidden at indices[t], zeros where that is -1; any other index outside of `positions` is an
// assertion.
inline cudaError_t gather_rows_cuda(const PackParams& p, int64_t positions, cudaStream_t stream) {
  if (p.tokens == 0 || p.row_bytes == 0) return cudaSuccess;
  // The widest word that divides every row's address and length.
  const uint64_t all = reinterpret_cast<uintptr_t>(p.hidden) | reinterpret_cast<uintptr_t>(p.packed) |
                       static_cast<uint64_t>(p.row_bytes) | static_cast<uint64_t>(p.batch_stride) |
                       static_cast<uint64_t>(p.length_stride);
  // 2^15 blocks fill any chip many times over; the loop in the kernel takes the rest.
  const int64_t blocks = min(ceil_div(p.tokens, int64_t{kPackThreads / 32}), int64_t{1} << 15);
  const auto start = [&](auto kernel) {
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kPackThreads), 0, stream, p, positions);
  };
  if (all % 16 == 0) return start(gather_rows_kernel<uint4>);
  if (all % 4 == 0) return start(gather_rows_kernel<uint32_t>);
  if (all % 2 == 0) return start(gather_rows_kernel<uint16_t>);
  return start(gather_rows_kernel<uint8_t>);
}

__global__ void __launch_bounds__(kPackThreads)
    invert_indices_kernel(const int32_t* indices, int64_t tokens, int64_t positions, int32_t* slots) {
  const int64_t t = blockIdx.x * int64_t{kPackThreads} + threadIdx.x;
  if (t >= tokens) return;
  const int64_t index = indices[t];
  DYNPLAN_DEVICE_ASSERT(index >= -1 && index < positions);
  if (index >= 0) slots[index] = static_cast<int32_t>(t);
}

// slots[indices[t]] = t, -1 where no index points.
inline cudaError_t invert_indices_cuda(const int32_t* indices, int64_t tokens, int64_t positions,
                                       int32_t* slots, cudaStream_t stream) {
  if (positions == 0 && tokens == 0) return cudaSuccess;
  const cudaError_t error = cudaMemsetAsync(slots, 0xFF, positions * sizeof(int32_t), stream);
  if (error != cudaSuccess || tokens == 0) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(tokens, int64_t{kPackThreads})));
  return launch(invert_indices_kernel, grid, dim3(kPackThreads), 0, stream, indices, tokens, positions,
                slots);
}

}  // namespace dynplan::kernels
