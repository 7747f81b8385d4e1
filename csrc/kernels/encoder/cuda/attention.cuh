// Self-attention inside each active sample, on CUDA:
//
//   out[i, h*d : (h+1)*d] = softmax(q_i K^T / sqrt(d)) V,  K and V the rows of i's sample, head h
//
// qkv (capacity, 3 * width): query, key, value of a row side by side, head h at h*d; out (capacity, width);
// cu_seqlens and counts are those of build_dispatch. Softmax runs online over tiles of keys (Milakov and
// Gimelshein, arXiv 1805.02867; tiles of queries as in FlashAttention-2, arXiv 2307.08691), so scores never
// leave the chip and the length is not bounded. Keys ascend, one warp owns a query row: the bits depend on
// the sample alone.
//
// One block: 64 queries of one head of one sample. The grid is static: sample b's tiles are numbered from
// floor(cu_seqlens[b] / 64) + b, which leaves room for ceil(length / 64) of them and needs no prefix sum; of
// the capacity / 64 + samples blocks those without a tile leave at once.
//
// 16-bit numbers: both products on the tensor cores, keys and values of the next tile on their way meanwhile.
// fp32: fused multiply-adds, two threads a query.
#pragma once

#include "kernels/cuda/mma.cuh"
#include "kernels/encoder/cuda/kernels.h"

namespace dynplan::kernels::cuda {

template <class T>
struct AttentionParams {
  const T* qkv;
  T* out;
  const int32_t* cu_seqlens;  // (samples + 1,)
  const int32_t* counts;      // (2,): active samples, active rows
  int64_t capacity;           // bounds counts[1] and what cu_seqlens holds
  int64_t samples;            // bounds counts[0]
  int32_t width;
  int32_t head_dim;  // a multiple of 8, at most kHead of the kernel: the rest is filled with zeros
  float scale;       // log2(e) / sqrt(head_dim): the softmax is taken in powers of two
};

constexpr int kQueries = 64;  // of a block
constexpr int kAttentionThreads = 128;

struct QueryTile {
  int32_t begin;   // the sample's first row
  int32_t length;  // its rows
  int32_t first;   // first query of the tile, from 0; length or more: no such tile
};

// The tile of this block; every thread must come here. Offsets are cut to the rows there are, so that bad
// ones never lead out of the buffers.
template <class T>
__device__ __forceinline__ QueryTile find_query_tile(const AttentionParams<T>& p) {
  const int32_t number = blockIdx.x;
  const int32_t samples = static_cast<int32_t>(min(int64_t{p.counts[0]}, p.samples));
  const int32_t rows = static_cast<int32_t>(min(int64_t{p.counts[1]}, p.capacity));
  if (number >= rows / kQueries + samples) return {0, 0, 0};
  int32_t sample = -1;  // the last one whose tiles start at or before `number`
  for (int32_t base = 0; base < samples; base += kAttentionThreads) {
    const int32_t b = base + static_cast<int32_t>(threadIdx.x);
    sample += __syncthreads_count(b < samples && p.cu_seqlens[b] / kQueries + b <= number);
  }
  if (sample < 0) return {0, 0, 0};
  const int32_t begin = max(p.cu_seqlens[sample], 0), end = min(p.cu_seqlens[sample + 1], rows);
  const int32_t tile = number - begin / kQueries - sample;
  if (tile < 0) return {0, 0, 0};  // offsets that do not ascend
  return {begin, end - begin, tile * kQueries};
}

// ---- 16 bits
// -------------------------------------------------------------------------------------------------------

constexpr int kKeys = 64;  // of a tile

// Where chunk `chunk` (16 bytes) of row `row` lies: eight rows of one chunk meet all 32 banks once.
template <int kHead>
__device__ __forceinline__ int head_offset(int row, int chunk) {
  const int twist = kHead == 32 ? row >> 1 & 3 : row & 7;
  return row * kHead * 2 + ((chunk ^ twist) << 4);
}

// Starts the copy of rows first .. first + 63 of one head of q, k or v (`source`: the sample's row 0); zeros
// beyond the sample and beyond the head.
template <class T, int kHead>
__device__ __forceinline__ void copy_head_rows(unsigned char* tile, const T* source, const QueryTile& at,
                                               int32_t first, const AttentionParams<T>& p) {
  constexpr int kChunks = kHead / 8;
  for (int item = threadIdx.x; item < 64 * kChunks; item += kAttentionThreads) {
    const int row = item / kChunks, chunk = item % kChunks;
    const bool valid = first + row < at.length && chunk * 8 < p.head_dim;
    const T* const address = source + static_cast<int64_t>(first + row) * 3 * p.width + chunk * 8;
    copy_async(tile + head_offset<kHead>(row, chunk), valid ? static_cast<const void*>(address) : p.qkv,
               valid);
  }
}

template <int kHead>
constexpr int attention_shared_bytes() {
  return 5 * 64 * kHead * 2;  // queries, and two buffers of keys and values
}

template <class T, int kHead>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_kernel(const __grid_constant__ AttentionParams<T> p) {
  constexpr int kTileBytes = 64 * kHead * 2;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const QueryTile at = find_query_tile(p);
  if (at.first >= at.length) return;
  const T* const query = p.qkv + static_cast<int64_t>(at.begin) * 3 * p.width + blockIdx.y * p.head_dim;
  const T* const key = query + p.width;
  const T* const value = key + p.width;
  const auto keys_of = [&](int tile) { return shared + (1 + tile % 2 * 2) * kTileBytes; };
  const auto copy_keys = [&](int tile) {
    copy_head_rows<T, kHead>(keys_of(tile), key, at, tile * kKeys, p);
    copy_head_rows<T, kHead>(keys_of(tile) + kTileBytes, value, at, tile * kKeys, p);
  };
  copy_head_rows<T, kHead>(shared, query, at, at.first, p);
  copy_keys(0);
  commit_copies();

  uint32_t queries[kHead / 16][4];
  float sums[kHead / 8][4] = {};  // of this lane: rows lane / 4 and that + 8, as multiply_add lays them out
  float most[2] = {-INFINITY, -INFINITY};
  float total[2] = {};
  const int tiles = ceil_div(at.length, kKeys);
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) copy_keys(tile + 1);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d)
        load_matrices(queries[d], shared + head_offset<kHead>(warp_row + lane % 16, 2 * d + lane / 16));
    }

    float scores[kKeys / 8][4] = {};
    const unsigned char* const keys = keys_of(tile);
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d)
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        uint32_t right[4];
        load_matrices(right,
                      keys + head_offset<kHead>(16 * j + lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
        multiply_add<T>(scores[2 * j], queries[d], right[0], right[1]);
        multiply_add<T>(scores[2 * j + 1], queries[d], right[2], right[3]);
      }

    const int left = at.length - tile * kKeys;  // keys of the sample from this tile on
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float tile_most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[j][2 * row + e];
          score = 8 * j + 2 * (lane % 4) + e < left ? score * p.scale : -INFINITY;
          tile_most = fmaxf(tile_most, score);
        }
      tile_most = fmaxf(tile_most, __shfl_xor_sync(kFullWarp, tile_most, 1));
      tile_most = fmaxf(tile_most, __shfl_xor_sync(kFullWarp, tile_most, 2));
      const float next = fmaxf(most[row], tile_most);
      // Scores that are all -inf have no largest one to subtract: exp2(-inf - 0) is 0, not exp2(NaN).
      const float subtract = next == -INFINITY ? 0.0f : next;
      const float shrink = exp2f(most[row] - subtract);
      most[row] = next;
      total[row] *= shrink;
#pragma unroll
      for (int d = 0; d < kHead / 8; ++d) {
        sums[d][2 * row] *= shrink;
        sums[d][2 * row + 1] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[j][2 * row + e];
          score = exp2f(score - subtract);
          total[row] += score;
        }
    }

    const unsigned char* const values = keys + kTileBytes;
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      // The layout of a sum is the layout of a left factor: the shares stay where they are.
      const uint32_t shares[4] = {pack_pair<T>(scores[2 * j][0], scores[2 * j][1]),
                                  pack_pair<T>(scores[2 * j][2], scores[2 * j][3]),
                                  pack_pair<T>(scores[2 * j + 1][0], scores[2 * j + 1][1]),
                                  pack_pair<T>(scores[2 * j + 1][2], scores[2 * j + 1][3])};
#pragma unroll
      for (int d = 0; d < kHead / 16; ++d) {
        uint32_t right[4];
        load_matrices_transposed(right, values + head_offset<kHead>(16 * j + lane % 16, 2 * d + lane / 16));
        multiply_add<T>(sums[2 * d], shares, right[0], right[1]);
        multiply_add<T>(sums[2 * d + 1], shares, right[2], right[3]);
      }
    }
    __syncthreads();  // before the buffer is filled again
  }
  wait_copies<0>();

  // Back to whole rows through the queries' place: each warp has read its own sixteen rows of it, and no
  // others.
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    total[row] += __shfl_xor_sync(kFullWarp, total[row], 1);
    total[row] += __shfl_xor_sync(kFullWarp, total[row], 2);
    const float inverse = 1.0f / total[row];
#pragma unroll
    for (int d = 0; d < kHead / 8; ++d)
      *reinterpret_cast<uint32_t*>(shared + head_offset<kHead>(warp_row + lane / 4 + 8 * row, d) +
                                   lane % 4 * 4) =
          pack_pair<T>(sums[d][2 * row] * inverse, sums[d][2 * row + 1] * inverse);
  }
  __syncwarp();
  constexpr int kChunks = kHead / 8;
  for (int item = lane; item < 16 * kChunks; item += 32) {
    const int row = warp_row + item / kChunks, chunk = item % kChunks;
    if (at.first + row >= at.length || chunk * 8 >= p.head_dim) continue;
    const int64_t place =
        static_cast<int64_t>(at.begin + at.first + row) * p.width + blockIdx.y * p.head_dim + chunk * 8;
    store_vector(p.out + place,
                 load_vector(reinterpret_cast<const T*>(shared + head_offset<kHead>(row, chunk))));
  }
}

// ---- fp32
// ----------------------------------------------------------------------------------------------------------

constexpr int kKeys32 = 32;     // of a tile
constexpr int kKeysAtOnce = 8;  // between two changes of the largest score

// Threads 2 i and 2 i + 1 have query i; of its numbers the even and the odd chunks of four.
template <int kHead>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_fp32_kernel(const __grid_constant__ AttentionParams<float> p) {
  constexpr int kChunks = kHead / 4, kMine = kChunks / 2;
  __shared__ float4 keys[kKeys32][kChunks], values[kKeys32][kChunks];
  const int odd = threadIdx.x % 2, row = threadIdx.x / 2;
  const QueryTile at = find_query_tile(p);
  if (at.first >= at.length) return;
  const float* const query = p.qkv + static_cast<int64_t>(at.begin) * 3 * p.width + blockIdx.y * p.head_dim;
  const bool inside = at.first + row < at.length;
  const auto chunk_of = [&](int64_t of_row, int part, int chunk) {  // part 0, 1, 2: query, key, value
    return *reinterpret_cast<const float4*>(query + (of_row * 3 + part) * p.width + chunk * 4);
  };

  float4 mine[kMine], sums[kMine];
#pragma unroll
  for (int c = 0; c < kMine; ++c) {
    const bool valid = inside && (2 * c + odd) * 4 < p.head_dim;
    mine[c] = valid ? chunk_of(at.first + row, 0, 2 * c + odd) : make_float4(0, 0, 0, 0);
    sums[c] = make_float4(0, 0, 0, 0);
  }
  float most = -INFINITY, total = 0;
  for (int32_t first = 0; first < at.length; first += kKeys32) {
    __syncthreads();  // the tile before is read
    for (int item = threadIdx.x; item < kKeys32 * kChunks; item += kAttentionThreads) {
      const int key = item / kChunks, chunk = item % kChunks;
      const bool valid = first + key < at.length && chunk * 4 < p.head_dim;
      keys[key][chunk] = valid ? chunk_of(first + key, 1, chunk) : make_float4(0, 0, 0, 0);
      values[key][chunk] = valid ? chunk_of(first + key, 2, chunk) : make_float4(0, 0, 0, 0);
    }
    __syncthreads();
    const int tile_keys = min(int{kKeys32}, at.length - first);
    for (int base = 0; base < tile_keys; base += kKeysAtOnce) {
      float scores[kKeysAtOnce];
      float next = most;
#pragma unroll
      for (int j = 0; j < kKeysAtOnce; ++j) {
        float score = 0;
#pragma unroll
        for (int c = 0; c < kMine; ++c) {
          const float4 k = keys[base + j][2 * c + odd];
          score = fmaf(mine[c].x, k.x, score);
          score = fmaf(mine[c].y, k.y, score);
          score = fmaf(mine[c].z, k.z, score);
          score = fmaf(mine[c].w, k.w, score);
        }
        score += __shfl_xor_sync(kFullWarp, score, 1);
        scores[j] = base + j < tile_keys ? score * p.scale : -INFINITY;
        next = fmaxf(next, scores[j]);
      }
      const float subtract = next == -INFINITY ? 0.0f : next;
      const float shrink = exp2f(most - subtract);
      most = next;
      total *= shrink;
#pragma unroll
      for (int c = 0; c < kMine; ++c) {
        sums[c].x *= shrink;
        sums[c].y *= shrink;
        sums[c].z *= shrink;
        sums[c].w *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kKeysAtOnce; ++j) {
        const float share = exp2f(scores[j] - subtract);
        total += share;
#pragma unroll
        for (int c = 0; c < kMine; ++c) {
          const float4 v = values[base + j][2 * c + odd];
          sums[c].x = fmaf(share, v.x, sums[c].x);
          sums[c].y = fmaf(share, v.y, sums[c].y);
          sums[c].z = fmaf(share, v.z, sums[c].z);
          sums[c].w = fmaf(share, v.w, sums[c].w);
        }
      }
    }
  }
  if (!inside) return;
  const float inverse = 1.0f / total;
  float* const out =
      p.out + static_cast<int64_t>(at.begin + at.first + row) * p.width + blockIdx.y * p.head_dim;
#pragma unroll
  for (int c = 0; c < kMine; ++c)
    if ((2 * c + odd) * 4 < p.head_dim)
      *reinterpret_cast<float4*>(out + (2 * c + odd) * 4) =
          make_float4(sums[c].x * inverse, sums[c].y * inverse, sums[c].z * inverse, sums[c].w * inverse);
}

// head_dim at most kMaxHeadDim.
template <class T>
cudaError_t launch_attention(const AttentionParams<T>& p, cudaStream_t stream) {
  const int64_t tiles = p.capacity / kQueries + p.samples;
  if (tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.width / p.head_dim));
  const auto start = [&](auto kernel, int shared_bytes) {
    return launch(kernel, grid, dim3(kAttentionThreads), shared_bytes, stream, p);
  };
  if constexpr (sizeof(T) == 4) {
    if (p.head_dim <= 32) return start(attention_fp32_kernel<32>, 0);
    if (p.head_dim <= 64) return start(attention_fp32_kernel<64>, 0);
    return start(attention_fp32_kernel<128>, 0);
  } else {
    if (p.head_dim <= 32) return start(attention_kernel<T, 32>, attention_shared_bytes<32>());
    if (p.head_dim <= 64) return start(attention_kernel<T, 64>, attention_shared_bytes<64>());
    return start(attention_kernel<T, 128>, attention_shared_bytes<128>());
  }
}

}  // namespace dynplan::kernels::cuda
