// The dispatch of one layer or of all layers, on CUDA: one launch, no host read. Formulas: build_dispatch.h.
//
// Grid (chunks of rows, layers). Every block sums the kept lengths of its layer over the samples, a block's
// width of samples at a time, and writes those rows that fall into its chunk: repeating a sum of B numbers in
// each block costs less than a second launch. Offsets that do not ascend within the capacity are cut to it,
// so that bad input (which the CPU refuses) never leads to a read or write out of bounds.
#pragma once

#include "kernels/cuda/common.cuh"
#include "kernels/packing/build_dispatch.h"

namespace dynplan::kernels {

constexpr int kBuildDispatchThreads = 256;
// 12 layers of 16,384 rows are 96 blocks: all at once on any chip of sm_80 or newer.
constexpr int64_t kBuildDispatchChunk = 2048;

__global__ void __launch_bounds__(kBuildDispatchThreads)
    build_dispatch_kernel(const __grid_constant__ BuildDispatchParams p) {
  __shared__ int32_t scratch[32];
  __shared__ int32_t first_row[kBuildDispatchThreads];
  __shared__ int32_t first_slot[kBuildDispatchThreads];
  __shared__ int32_t length[kBuildDispatchThreads];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t layer = blockIdx.y;
  const int64_t chunk = blockIdx.x * kBuildDispatchChunk;
  const int64_t chunk_end = min(chunk + kBuildDispatchChunk, p.capacity);
  const bool writes_offsets = blockIdx.x == 0;
  int32_t* rows = p.rows + layer * p.capacity;
  int32_t* offsets = p.active_cu_seqlens + layer * (p.samples + 1);
  const auto cut = [&](int64_t value, int64_t low) { return min(max(value, low), p.capacity); };

  int32_t active = 0;
  int32_t filled = 0;
  for (int64_t base = 0; base < p.samples; base += kBuildDispatchThreads) {
    const int64_t sample = base + thread;
    int64_t begin = 0, end = 0;
    bool kept = false;
    if (sample < p.samples) {
      kept = is_set(p.keep[sample * p.sample_stride + layer * p.layer_stride]);
      begin = cut(p.cu_seqlens[sample], 0);
      end = cut(p.cu_seqlens[sample + 1], begin);
    }
    const int32_t tokens = kept ? static_cast<int32_t>(end - begin) : 0;
    const BlockSum samples = block_exclusive_sum(kept, scratch);
    const BlockSum slots = block_exclusive_sum(tokens, scratch);
    if (kept && writes_offsets)
      offsets[active + samples.before + 1] = static_cast<int32_t>(cut(filled + slots.before + tokens, 0));
    first_row[thread] = static_cast<int32_t>(begin);
    first_slot[thread] = filled + slots.before;
    length[thread] = tokens;
    __syncthreads();
    for (int other = warp; other < kBuildDispatchThreads; other += kBuildDispatchThreads / 32) {
      const int64_t slot = first_slot[other];
      const int64_t last = min(slot + length[other], chunk_end);
      for (int64_t t = max(slot, chunk) + lane; t < last; t += 32)
        rows[t] = static_cast<int32_t>(first_row[other] + (t - slot));
    }
    __syncthreads();
    active += samples.total;
    filled = static_cast<int32_t>(cut(filled + static_cast<int64_t>(slots.total), 0));
  }

  for (int64_t t = max(static_cast<int64_t>(filled), chunk) + thread; t < chunk_end;
       t += kBuildDispatchThreads)
    rows[t] = -1;
  if (!writes_offsets) return;
  for (int64_t b = active + 1 + thread; b <= p.samples; b += kBuildDispatchThreads) offsets[b] = filled;
  if (thread == 0) {
    offsets[0] = 0;
    p.counts[2 * layer] = active;
    p.counts[2 * layer + 1] = filled;
  }
}

inline cudaError_t build_dispatch_cuda(const BuildDispatchParams& p, cudaStream_t stream) {
  if (p.layers == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(max(ceil_div(p.capacity, kBuildDispatchChunk), int64_t{1})),
                  static_cast<unsigned>(p.layers));
  return launch(build_dispatch_kernel, grid, dim3(kBuildDispatchThreads), 0, stream, p);
}

}  // namespace dynplan::kernels
