// Matrix product of the active rows with a weight, on CUDA:
//
//   out[i, :] = activation(a[row(i), :] weight^T + bias),  i < counts[1],  row(i) = rows[i], or i where rows
//   is null
//
// a (., k), weight (n, k), bias (n) or null, out (capacity, n), all dense; k and n multiples of 8. The number
// of rows is read on the device: blocks walk the tiles that exist, so a layer that no sample takes costs one
// wave of blocks that see counts[1] == 0 and leave. Rows of `a` are gathered by the load itself.
//
// One block makes a tile of out from slabs of 64 bytes of k, which cp.async brings through four buffers.
// 16-bit numbers are multiplied on the tensor cores (fp32 sums), fp32 by fused multiply-adds: TF32 is never
// used. Every sum runs over k in ascending order in one thread: the bits do not depend on the tile's place,
// on the plan or on the batch.
#pragma once

#include "kernels/conditional_encoder_layer_cuda.h"
#include "kernels/cuda_mma.cuh"

namespace dynplan::kernels::cuda {

template <class T>
struct ProductParams {
  const T* a;
  const int32_t* rows;  // (capacity,) or null
  const T* weight;
  const T* bias;
  T* out;
  int32_t n;
  int32_t k;
  Activation activation;
  const int32_t* counts;  // (2,): active samples, active rows
  int64_t capacity;       // bounds counts[1] and what rows holds
};

// Tile of `rows` x `columns` of out; each warp has `warp` x `warp` of it. `blocks`: resident on one
// multiprocessor.
template <int kRows_, int kColumns_, int kWarp_, int kBlocks_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kWarp = kWarp_, kBlocks = kBlocks_;
  static constexpr int kWarpsAcross = kColumns / kWarp;
  static constexpr int kThreads = 32 * (kRows / kWarp) * kWarpsAcross;
};
using SmallTile = ProductTile<64, 64, 32, 4>;
using MiddleTile = ProductTile<128, 128, 64, 2>;
using LargeTile = ProductTile<128, 256, 64, 1>;

constexpr int kSlabBytes = 64;
constexpr int kSlabBuffers = 4;
constexpr int kStagedRows = 16;

// Where chunk `chunk` (16 bytes, four a row) of row `row` of a slab lies. Eight rows of one chunk, which is
// what a phase of ldmatrix reads, and two whole rows, which is what a phase of the copy writes, both meet all
// 32 banks once.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
  return row * kSlabBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

// One warp's kWarp x kWarp sums.
template <class T, int kWarp>
struct WarpSums {
  float sums[kWarp / 16][kWarp / 8][4] = {};

  // Adds one slab of k; `a` and `b` are the warp's first rows of the two slabs.
  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[kWarp / 16][4];
#pragma unroll
      for (int i = 0; i < kWarp / 16; ++i)
        load_matrices(left[i], a + slab_offset(16 * i + lane % 16, 2 * half + lane / 16));
#pragma unroll
      for (int j = 0; j < kWarp / 16; ++j) {
        uint32_t right[4];
        load_matrices(right, b + slab_offset(16 * j + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kWarp / 16; ++i) {
          multiply_add<T>(sums[i][2 * j], left[i], right[0], right[1]);
          multiply_add<T>(sums[i][2 * j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  // Writes the kStagedRows rows of group `group`, `stride` floats apart.
  __device__ __forceinline__ void stage(int group, float* staged, int stride) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kWarp / 8; ++j) {
      float* place = staged + lane / 4 * stride + 8 * j + 2 * (lane % 4);
      *reinterpret_cast<float2*>(place) = make_float2(sums[group][j][0], sums[group][j][1]);
      *reinterpret_cast<float2*>(place + 8 * stride) = make_float2(sums[group][j][2], sums[group][j][3]);
    }
  }
};

// fp32: lane l has rows l / 8 + 4 i and columns l % 8 + 8 j.
template <int kWarp>
struct WarpSums<float, kWarp> {
  float sums[kWarp / 4][kWarp / 8] = {};

  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1  // one chunk is enough to hide a load; two at once spill
    for (int chunk = 0; chunk < 4; ++chunk) {
      float4 right[kWarp / 8];
#pragma unroll
      for (int j = 0; j < kWarp / 8; ++j)
        right[j] = *reinterpret_cast<const float4*>(b + slab_offset(lane % 8 + 8 * j, chunk));
#pragma unroll
      for (int i = 0; i < kWarp / 4; ++i) {
        const float4 left = *reinterpret_cast<const float4*>(a + slab_offset(lane / 8 + 4 * i, chunk));
#pragma unroll
        for (int j = 0; j < kWarp / 8; ++j) {
          sums[i][j] = fmaf(left.x, right[j].x, sums[i][j]);
          sums[i][j] = fmaf(left.y, right[j].y, sums[i][j]);
          sums[i][j] = fmaf(left.z, right[j].z, sums[i][j]);
          sums[i][j] = fmaf(left.w, right[j].w, sums[i][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void stage(int group, float* staged, int stride) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kStagedRows / 4; ++i)
#pragma unroll
      for (int j = 0; j < kWarp / 8; ++j)
        staged[(lane / 8 + 4 * i) * stride + lane % 8 + 8 * j] = sums[group * (kStagedRows / 4) + i][j];
  }
};

__device__ __forceinline__ float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::relu:
      return x > 0.0f || x != x ? x : 0.0f;  // a NaN stays one, as in PyTorch
    case Activation::silu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

template <class Tile>
constexpr int product_shared_bytes() {
  const int buffers = kSlabBuffers * (Tile::kRows + Tile::kColumns) * kSlabBytes;
  const int staged = Tile::kThreads / 32 * kStagedRows * (Tile::kWarp + 8) * int{sizeof(float)};
  return buffers > staged ? buffers : staged;
}

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    product_kernel(const __grid_constant__ ProductParams<T> p) {
  constexpr int kChunk = Vector<T>::kSize;      // numbers in 16 bytes
  constexpr int kSlab = 4 * kChunk;             // numbers of k in a slab
  constexpr int kRowStep = Tile::kThreads / 4;  // rows that one pass of all threads copies
  constexpr int kBufferBytes = (Tile::kRows + Tile::kColumns) * kSlabBytes;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int copy_row = thread / 4, copy_chunk = thread % 4;
  const int copy_offset = slab_offset(copy_row, copy_chunk);
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarp,
            warp_column = warp % Tile::kWarpsAcross * Tile::kWarp;
  const int32_t count = static_cast<int32_t>(min(int64_t{p.counts[1]}, p.capacity));
  const int32_t slabs = ceil_div(p.k, int32_t{kSlab});
  const int64_t row_tiles = ceil_div(count, int32_t{Tile::kRows});
  const int64_t tiles = row_tiles * ceil_div(p.n, int32_t{Tile::kColumns});

  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int32_t row0 = static_cast<int32_t>(tile % row_tiles) * Tile::kRows;
    const int32_t column0 = static_cast<int32_t>(tile / row_tiles) * Tile::kColumns;

    // Where this thread's copies begin. What `has_row` and the widths rule out is never read, so addresses of
    // those may be any.
    const T* a_rows[Tile::kRows / kRowStep];
    uint32_t has_row = 0;
#pragma unroll
    for (int i = 0; i < Tile::kRows / kRowStep; ++i) {
      const int32_t i_row = row0 + copy_row + i * kRowStep;
      const int64_t row = i_row >= count ? -1 : p.rows ? p.rows[i_row] : i_row;
      const bool valid = row >= 0 && row < p.capacity;
      a_rows[i] = p.a + (valid ? row : 0) * p.k + copy_chunk * kChunk;
      has_row |= uint32_t{valid} << i;
    }
    const int32_t column_rows = p.n - column0 - copy_row;  // weights from this thread's first on
    const T* const b_rows = p.weight + static_cast<int64_t>(column0 + copy_row) * p.k + copy_chunk * kChunk;
    const auto copy_slab = [&](int32_t slab) {
      unsigned char* const a = shared + slab % kSlabBuffers * kBufferBytes + copy_offset;
      unsigned char* const b = a + Tile::kRows * kSlabBytes;
      const int32_t k = slab * kSlab;
      const bool inside = k + copy_chunk * kChunk < p.k;
#pragma unroll
      for (int i = 0; i < Tile::kRows / kRowStep; ++i)
        copy_async(a + i * kRowStep * kSlabBytes, a_rows[i] + k, inside && (has_row >> i & 1));
#pragma unroll
      for (int i = 0; i < Tile::kColumns / kRowStep; ++i)
        copy_async(b + i * kRowStep * kSlabBytes, b_rows + static_cast<int64_t>(i * kRowStep) * p.k + k,
                   inside && i * kRowStep < column_rows);
    };

    WarpSums<T, Tile::kWarp> sums;
#pragma unroll
    for (int slab = 0; slab < kSlabBuffers - 1; ++slab) {
      if (slab < slabs) copy_slab(slab);
      commit_copies();
    }
    for (int32_t slab = 0; slab < slabs; ++slab) {
      wait_copies<kSlabBuffers - 2>();
      __syncthreads();  // slab is here for all, and all are done with the buffer that is filled next
      if (slab + kSlabBuffers - 1 < slabs) copy_slab(slab + kSlabBuffers - 1);
      commit_copies();
      const unsigned char* const a = shared + slab % kSlabBuffers * kBufferBytes;
      sums.add(a + warp_row * kSlabBytes, a + (Tile::kRows + warp_column) * kSlabBytes);
    }
    wait_copies<0>();
    __syncthreads();  // the buffers become the place where sums turn into whole rows

    constexpr int kStride = Tile::kWarp + 8;
    constexpr int kRowChunks = Tile::kWarp / kChunk;
    float* const staged = reinterpret_cast<float*>(shared) + warp * kStagedRows * kStride;
#pragma unroll
    for (int group = 0; group < Tile::kWarp / kStagedRows; ++group) {
      sums.stage(group, staged, kStride);
      __syncwarp();
#pragma unroll 1
      for (int item = lane; item < kStagedRows * kRowChunks; item += 32) {
        const int32_t row = row0 + warp_row + group * kStagedRows + item / kRowChunks;
        const int32_t column = column0 + warp_column + item % kRowChunks * kChunk;
        if (row >= count || column >= p.n) continue;
        const float* const source = staged + item / kRowChunks * kStride + item % kRowChunks * kChunk;
        Vector<T> bias = {}, out;
        if (p.bias) bias = load_vector(p.bias + column);
#pragma unroll
        for (int quarter = 0; quarter < kChunk; quarter += 4) {
          const Vector<float> sum = load_vector(source + quarter);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            out.values[quarter + e] =
                from_float<T>(activate(sum.values[e] + to_float(bias.values[quarter + e]), p.activation));
        }
        store_vector(p.out + static_cast<int64_t>(row) * p.n + column, out);
      }
      __syncwarp();
    }
    __syncthreads();  // before the next tile's copies
  }
}

// Launches on `stream`, on a chip of `multiprocessors`.
template <class T, class Tile>
cudaError_t launch_product(const ProductParams<T>& p, int multiprocessors, cudaStream_t stream) {
  const int64_t tiles =
      ceil_div(p.capacity, int64_t{Tile::kRows}) * ceil_div(int64_t{p.n}, int64_t{Tile::kColumns});
  const int64_t resident = int64_t{multiprocessors} * Tile::kBlocks;
  return launch(product_kernel<T, Tile>, dim3(static_cast<unsigned>(min(tiles, resident))),
                dim3(Tile::kThreads), product_shared_bytes<Tile>(), stream, p);
}

// The tile follows the capacity, never the count: the host does not know that. Time is taken as proportional
// to the waves of tiles times what one tile reads, rows + columns, since at these sizes the second-level
// cache is the floor.
template <class T>
cudaError_t launch_product(const ProductParams<T>& p, int multiprocessors, cudaStream_t stream) {
  const auto cost = [&](int64_t rows, int64_t columns) {
    const int64_t tiles = ceil_div(p.capacity, rows) * ceil_div(int64_t{p.n}, columns);
    return ceil_div(tiles, int64_t{multiprocessors}) * (rows + columns);
  };
  const int64_t small = cost(64, 64), middle = cost(128, 128), large = cost(128, 256);
  if (small <= min(middle, large)) return launch_product<T, SmallTile>(p, multiprocessors, stream);
  // fp32 is bound by its multiply-adds: a wider tile would save it nothing.
  if (sizeof(T) == 4 || middle <= large) return launch_product<T, MiddleTile>(p, multiprocessors, stream);
  if constexpr (sizeof(T) == 2) return launch_product<T, LargeTile>(p, multiprocessors, stream);
  return cudaSuccess;
}

}  // namespace dynplan::kernels::cuda
