// Matrix product of the active rows with a weight, on CUDA:
//
//   out[i, :] = activation(a[row(i), :] weight^T + bias),  i < counts[1],  row(i) = rows[i], or i where rows
//   is null
//
// a (., k), weight (n, k), bias (n) or null, out (capacity, n), all dense; k and n multiples of 8. The number
// of rows is read on the device, and so is the shape of the tiles chosen: one block a multiprocessor walks
// the tiles that exist, large ones where there are many rows and small ones where a large one would leave
// multiprocessors idle. With no row every block sees that and leaves. Rows of `a` are gathered by the load
// itself.
//
// One block makes a tile of out from slabs of 64 bytes of k, which cp.async brings through a ring of buffers.
// 16-bit numbers are multiplied on the tensor cores (fp32 sums), fp32 by fused multiply-adds: TF32 is never
// used. Every sum runs over k in ascending order in one thread: the bits do not depend on the tile's place,
// on the plan or on the batch.
#pragma once

#include "kernels/cuda/mma.cuh"
#include "kernels/encoder/cuda/kernels.h"

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
  int32_t multiprocessors;
  int32_t tile = kChosenTile;
};

constexpr int kProductThreads = 256;
constexpr int kSlabBytes = 64;
constexpr int kStagedRows = 16;
// What one block may ask for on every chip of sm_80 and newer (sm_86 and sm_89 have 99 KiB).
constexpr int kProductSharedBytes = 96 * 1024;

// Tile of kRows x kColumns of out: eight warps, two down and four across.
template <int kRows_, int kColumns_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / 4;
  static constexpr int kBufferBytes = (kRows + kColumns) * kSlabBytes;
  // The smaller the tile, the more slabs must be on their way to hide the cache.
  static constexpr int kBuffers =
      kProductSharedBytes / kBufferBytes < 8 ? kProductSharedBytes / kBufferBytes : 8;
};

// Where chunk `chunk` (16 bytes, four a row) of row `row` of a slab lies. Eight rows of one chunk, which is
// what a phase of ldmatrix reads, and two whole rows, which is what a phase of the copy writes, both meet all
// 32 banks once.
__device__ __forceinline__ int slab_offset(int row, int chunk) {
  return row * kSlabBytes + ((chunk ^ (row >> 1 & 3)) << 4);
}

// One warp's kRows x kColumns sums.
template <class T, int kRows, int kColumns>
struct WarpSums {
  float sums[kRows / 16][kColumns / 8][4] = {};

  // Adds one slab of k; `a` and `b` are the warp's first rows of the two slabs.
  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t left[kRows / 16][4];
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i)
        load_matrices(left[i], a + slab_offset(16 * i + lane % 16, 2 * half + lane / 16));
#pragma unroll
      for (int j = 0; j < kColumns / 16; ++j) {
        uint32_t right[4];
        load_matrices(right, b + slab_offset(16 * j + lane % 8 + lane / 16 * 8, 2 * half + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
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
    for (int j = 0; j < kColumns / 8; ++j) {
      float* place = staged + lane / 4 * stride + 8 * j + 2 * (lane % 4);
      *reinterpret_cast<float2*>(place) = make_float2(sums[group][j][0], sums[group][j][1]);
      *reinterpret_cast<float2*>(place + 8 * stride) = make_float2(sums[group][j][2], sums[group][j][3]);
    }
  }
};

// fp32: lane l has rows l / 8 + 4 i and columns l % 8 + 8 j.
template <int kRows, int kColumns>
struct WarpSums<float, kRows, kColumns> {
  float sums[kRows / 4][kColumns / 8] = {};

  __device__ __forceinline__ void add(const unsigned char* a, const unsigned char* b) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1  // one chunk is enough to hide a load; two at once spill
    for (int chunk = 0; chunk < 4; ++chunk) {
      float4 right[kColumns / 8];
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
        right[j] = *reinterpret_cast<const float4*>(b + slab_offset(lane % 8 + 8 * j, chunk));
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        const float4 left = *reinterpret_cast<const float4*>(a + slab_offset(lane / 8 + 4 * i, chunk));
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
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
      for (int j = 0; j < kColumns / 8; ++j)
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

// ---- one tile after another
// ---------------------------------------------------------------------------------------

template <class T, class Tile>
__device__ __forceinline__ void product_tiles(const ProductParams<T>& p, int32_t count) {
  constexpr int kChunk = Vector<T>::kSize;       // numbers in 16 bytes
  constexpr int kSlab = 4 * kChunk;              // numbers of k in a slab
  constexpr int kRowStep = kProductThreads / 4;  // rows that one pass of all threads copies
  constexpr int kPasses = ceil_div(Tile::kRows, kRowStep);
  static_assert(Tile::kColumns % kRowStep == 0);
  unsigned char* const shared = dynamic_shared<unsigned char>();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int copy_row = thread / 4, copy_chunk = thread % 4;
  const int copy_offset = slab_offset(copy_row, copy_chunk);
  const int warp_row = warp / 4 * Tile::kWarpRows, warp_column = warp % 4 * Tile::kWarpColumns;
  const int32_t slabs = ceil_div(p.k, int32_t{kSlab});
  const int32_t row_tiles = ceil_div(count, int32_t{Tile::kRows});
  const int32_t tiles = row_tiles * ceil_div(p.n, int32_t{Tile::kColumns});

  for (int32_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int32_t row0 = tile % row_tiles * Tile::kRows;
    const int32_t column0 = tile / row_tiles * Tile::kColumns;

    // Where this thread's copies begin. What `has_row` and the widths rule out is never read, so addresses of
    // those may be any.
    const T* a_rows[kPasses];
    uint32_t has_row = 0;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int32_t i_row = row0 + copy_row + i * kRowStep;
      const int64_t row = i_row >= count ? -1 : p.rows ? p.rows[i_row] : i_row;
      const bool valid = row >= 0 && row < p.capacity;
      a_rows[i] = p.a + (valid ? row : 0) * p.k + copy_chunk * kChunk;
      has_row |= uint32_t{valid} << i;
    }
    const int32_t column_rows = p.n - column0 - copy_row;  // weights from this thread's first on
    const T* const b_rows = p.weight + static_cast<int64_t>(column0 + copy_row) * p.k + copy_chunk * kChunk;
    const auto copy_slab = [&](int32_t slab) {
      unsigned char* const a = shared + slab % Tile::kBuffers * Tile::kBufferBytes + copy_offset;
      unsigned char* const b = a + Tile::kRows * kSlabBytes;
      const int32_t k = slab * kSlab;
      const bool inside = k + copy_chunk * kChunk < p.k;
#pragma unroll
      for (int i = 0; i < kPasses; ++i)
        if (Tile::kRows % kRowStep == 0 || copy_row + i * kRowStep < Tile::kRows)
          copy_async(a + i * kRowStep * kSlabBytes, a_rows[i] + k, inside && (has_row >> i & 1));
#pragma unroll
      for (int i = 0; i < Tile::kColumns / kRowStep; ++i)
        copy_async(b + i * kRowStep * kSlabBytes, b_rows + static_cast<int64_t>(i * kRowStep) * p.k + k,
                   inside && i * kRowStep < column_rows);
    };

    WarpSums<T, Tile::kWarpRows, Tile::kWarpColumns> sums;
#pragma unroll
    for (int slab = 0; slab < Tile::kBuffers - 1; ++slab) {
      if (slab < slabs) copy_slab(slab);
      commit_copies();
    }
    for (int32_t slab = 0; slab < slabs; ++slab) {
      wait_copies<Tile::kBuffers - 2>();
      __syncthreads();  // slab is here for all, and all are done with the buffer that is filled next
      if (slab + Tile::kBuffers - 1 < slabs) copy_slab(slab + Tile::kBuffers - 1);
      commit_copies();
      const unsigned char* const a = shared + slab % Tile::kBuffers * Tile::kBufferBytes;
      sums.add(a + warp_row * kSlabBytes, a + (Tile::kRows + warp_column) * kSlabBytes);
    }
    wait_copies<0>();
    __syncthreads();  // the buffers become the place where sums turn into whole rows

    constexpr int kStride = Tile::kWarpColumns + 8;
    constexpr int kRowChunks = Tile::kWarpColumns / kChunk;
    static_assert(kProductThreads / 32 * kStagedRows * kStride * int{sizeof(float)} <= kProductSharedBytes);
    float* const staged = reinterpret_cast<float*>(shared) + warp * kStagedRows * kStride;
#pragma unroll
    for (int group = 0; group < Tile::kWarpRows / kStagedRows; ++group) {
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
                narrow<T>(activate(sum.values[e] + widen(bias.values[quarter + e]), p.activation));
        }
        store_vector(p.out + static_cast<int64_t>(row) * p.n + column, out);
      }
      __syncwarp();
    }
    __syncthreads();  // before the next tile's copies
  }
}

// ---- which tile
// ---------------------------------------------------------------------------------------------------

// Clocks that one tile takes for 16 numbers of k on a multiprocessor of its own, counted and not measured. 16
// bits: mma.sync does about 1,270 multiply-adds a clock on sm_90 (0.62 of the tensor cores' rate, arXiv
// 2402.13499) while 128 bytes pass through shared memory, where each warp reads its rows and columns and the
// copy writes those of the tile. fp32: 128 multiply-adds a clock.
template <class T, class Tile>
constexpr float kTileClocks = [] {
  constexpr float kArea = Tile::kRows * Tile::kColumns, kEdges = Tile::kRows + Tile::kColumns;
  if (sizeof(T) == 4) return kArea * 16 / 128;
  constexpr float kShared = (8 * (Tile::kWarpRows + Tile::kWarpColumns) + kEdges) * 32 / 128;
  return kArea * 16 / 1270 > kShared ? kArea * 16 / 1270 : kShared;
}();

// fp32 is bound by its multiply-adds: the wider tiles would save it nothing.
template <class T>
constexpr int32_t kTiles = sizeof(T) == 4 ? 4 : 6;

// Clocks for 16 numbers of k of the whole product: those of the multiprocessor that has the most tiles, or
// those in which the second-level cache brings all tiles' rows and columns, at 24 bytes a clock and
// multiprocessor (5.5 TB/s on an H200, an assumption).
template <class T, class Tile>
__host__ __device__ float product_clocks(int32_t rows, int32_t n, int32_t multiprocessors) {
  const int32_t tiles = ceil_div(rows, int32_t{Tile::kRows}) * ceil_div(n, int32_t{Tile::kColumns});
  const float most = static_cast<float>(ceil_div(tiles, multiprocessors));
  const float share = static_cast<float>(tiles) / static_cast<float>(multiprocessors);
  constexpr float kBytes = (Tile::kRows + Tile::kColumns) * 16 * sizeof(T);
  return max(most * kTileClocks<T, Tile>, share * (kBytes / 24));
}

// The tile that takes the least time for `rows` active rows, as its place in kProductTiles.
template <class T>
__host__ __device__ int best_tile(int32_t rows, int32_t n, int32_t multiprocessors) {
  const float clocks[] = {product_clocks<T, ProductTile<32, 64>>(rows, n, multiprocessors),
                          product_clocks<T, ProductTile<64, 64>>(rows, n, multiprocessors),
                          product_clocks<T, ProductTile<64, 128>>(rows, n, multiprocessors),
                          product_clocks<T, ProductTile<128, 128>>(rows, n, multiprocessors),
                          product_clocks<T, ProductTile<128, 192>>(rows, n, multiprocessors),
                          product_clocks<T, ProductTile<128, 256>>(rows, n, multiprocessors)};
  int best = 0;
  float least = clocks[0];
#pragma unroll
  for (int i = 1; i < kTiles<T>; ++i)
    if (clocks[i] < least) least = clocks[i], best = i;
  return best;
}

template <class T>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ ProductParams<T> p) {
  const int32_t count = static_cast<int32_t>(min(int64_t{p.counts[1]}, p.capacity));
  if (count <= 0) return;
  switch (p.tile == kChosenTile ? best_tile<T>(count, p.n, p.multiprocessors) : min(p.tile, kTiles<T> - 1)) {
    case 0:
      return product_tiles<T, ProductTile<32, 64>>(p, count);
    case 1:
      return product_tiles<T, ProductTile<64, 64>>(p, count);
    case 2:
      return product_tiles<T, ProductTile<64, 128>>(p, count);
    case 3:
      return product_tiles<T, ProductTile<128, 128>>(p, count);
    case 4:
      if constexpr (sizeof(T) == 2) product_tiles<T, ProductTile<128, 192>>(p, count);
      return;
    default:
      if constexpr (sizeof(T) == 2) product_tiles<T, ProductTile<128, 256>>(p, count);
  }
}

// Launches on `stream`.
template <class T>
cudaError_t launch_product(const ProductParams<T>& p, cudaStream_t stream) {
  const int64_t most = ceil_div(p.capacity, int64_t{32}) * ceil_div(int64_t{p.n}, int64_t{64});
  return launch(product_kernel<T>, dim3(static_cast<unsigned>(min(most, int64_t{p.multiprocessors}))),
                dim3(kProductThreads), kProductSharedBytes, stream, p);
}

}  // namespace dynplan::kernels::cuda
