// region_cross_entropy on 2-D planes: stride 1, rows dense along x, windows of 3, 5 and 7, merge of logits,
// fp32, bf16 and fp16. Formulas: region_cross_entropy.h.
//
// A block owns a tile of kTileX x kTileY window centres and walks over the classes: the logits of one class,
// tile and halo, lie in shared memory as fp32 while those of the next class are on their way in registers. A
// thread holds 4 x 2 centres, so that it reads 2 or 3 float4 per row for 8 windows; their masks of agreeing
// pixels (one bit a tap) stay in registers for all classes. Where a whole warp's windows hold one label, the
// window sum is one of nested boxes: w(d) falls with the chessboard distance d, so sum = sum over d of (w_d -
// w_{d+1}) * (sum over the box of radius d). The backward makes the merged logits' gradient of one class on
// the tile, then gathers it with the same masks, which are symmetric: one writer per element, no atomics. Its
// tile overlaps its neighbours' by the window's radius.
//
// The count for an H200 (132 SMs, four warp instructions a clock each, 4.8 TB/s), 8x19x512x1024, window 5: E
// = 79.7e6 logits. Counted in the sm_90a machine code, not measured:
//              bytes fp32 / bf16                   warp instructions per 32 logits, one label / several
//   forward    386 / 226 MB: 80 / 47 us            29 / 56: 74 / 143 us at 1.9 GHz
//   backward   705 / 386 MB: 147 / 80 us           55 / 110: 136 / 273 us
// Bytes are the floor (halos of 1.20 and 1.46 tiles come from L2). So fp32 should be bound by memory and bf16
// by instructions where most warps' windows hold one label, and both by instructions in a label map of noise.
#pragma once

#include "kernels/region_cross_entropy/cuda/common.cuh"

namespace dynplan::kernels {

namespace tiled {

constexpr int kThreads = 256;
constexpr int kTileX = 64;  // 2 warps of 8 threads of 4 centres
constexpr int kTileY = 32;  // 4 warps of 4 threads of 2 centres
constexpr int kWide = 4, kTall = 2, kCentres = kWide * kTall;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int R>
struct Shape {
  static constexpr int kWindow = 2 * R + 1;
  // Columns beside a thread's 4: even, and float4 loads stay aligned.
  static constexpr int kMargin = R <= 2 ? 2 : 4;
  static constexpr int kPitch = kTileX + 2 * kMargin;
  static constexpr int kRows = kTileY + 2 * R;
  static constexpr int kQuads = 1 + kMargin / 2;  // float4 in one row of a thread's windows
  static constexpr int kPairs = kPitch / 2 * kRows;
  static constexpr int kPairsPerThread = (kPairs + kThreads - 1) / kThreads;
  static constexpr int kTileFloats = 2 * kPairsPerThread * kThreads;  // rounded up: stores need no test
  static constexpr int kMaskWords = R <= 2 ? 1 : 2;                   // 32-bit words of window bits
  static constexpr int kRowsPerWord = R <= 2 ? kWindow : 4;
  // What the backward writes of a tile, and what it keeps in shared memory beside the logits.
  static constexpr int kInnerX = kTileX - 2 * kMargin;
  static constexpr int kInnerY = kTileY - 2 * R;
  static constexpr int kCentreFloats = 2 * kTileX * kTileY;  // two tiles of centres' gradients
  static constexpr int kMaskTileWords = kMaskWords * kTileX * kTileY;
};

struct WindowWeights {
  float ring[4];      // w(d)
  float step[4];      // w(d) - w(d+1); w(R+1) = 0
  bool nested_boxes;  // every step is positive: 0 * inf would be NaN in the sum of boxes
};

// Of one block: the image, and the first centre of its tile.
struct Place {
  int64_t n, left, top;
};

// Tiles come image by image, row by row, `width` x `height` apart.
__device__ __forceinline__ Place place_of(int tiles_x, int tiles_y, int width, int height) {
  return {blockIdx.x / (tiles_x * tiles_y), blockIdx.x % tiles_x * int64_t{width},
          blockIdx.x / tiles_x % tiles_y * int64_t{height}};
}

struct Thread {
  int x, y;  // of its first centre in the tile
  __device__ Thread() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp % 2 * 32 + lane % 8 * kWide;
    y = warp / 2 * 8 + lane / 8 * kTall;
  }
};

template <int R>
struct Masks {
  uint32_t word[kCentres][Shape<R>::kMaskWords];

  __device__ bool empty(int centre) const {
    uint32_t any = 0;
#pragma unroll
    for (int i = 0; i < Shape<R>::kMaskWords; ++i) any |= word[centre][i];
    return any == 0;
  }
};

template <int R>
__device__ constexpr uint32_t row_bit(int dy, int dx) {
  return 1u << ((dy + R) % Shape<R>::kRowsPerWord * Shape<R>::kWindow + dx + R);
}

// Bits of one ring of the window, in word `index` of a mask.
template <int R>
__device__ constexpr uint32_t ring_bits(int radius, int index) {
  uint32_t bits = 0;
  for (int dy = -R; dy <= R; ++dy)
    for (int dx = -R; dx <= R; ++dx) {
      const int far = dy * dy > dx * dx ? dy : dx;
      if ((far < 0 ? -far : far) == radius && (dy + R) / Shape<R>::kRowsPerWord == index)
        bits |= row_bit<R>(dy, dx);
    }
  return bits;
}

// All bits of the window that lie in word `index`.
template <int R>
__device__ constexpr uint32_t full_bits(int index) {
  uint32_t bits = 0;
  for (int d = 0; d <= R; ++d) bits |= ring_bits<R>(d, index);
  return bits;
}

// Calls visit(i, column, dy, dx) for those taps of a thread's windows that lie in row `row` of them: tap (dy,
// dx) of centre i, in column `column` as counted from the first centre's.
template <int R, typename Visit>
__device__ __forceinline__ void for_each_tap(int row, Visit visit) {
#pragma unroll
  for (int u = 0; u < kTall; ++u) {
    const int dy = row - u - R;
    if (dy < -R || dy > R) continue;
#pragma unroll
    for (int j = 0; j < kWide; ++j)
#pragma unroll
      for (int dx = -R; dx <= R; ++dx) visit(u * kWide + j, j + dx, dy, dx);
  }
}

// ---- tile of labels
// ------------------------------------------------------------------------------------------------

// Labels of the tile with halo; -1 for ignored pixels and outside of the
// image.
template <int R>
__device__ __forceinline__ void load_labels(const RegionCrossEntropyParams& p, const Place& at,
                                            int32_t* tile) {
  using S = Shape<R>;
  for (int i = threadIdx.x; i < S::kPitch * S::kRows; i += kThreads) {
    const int64_t x = at.left - S::kMargin + i % S::kPitch, y = at.top - R + i / S::kPitch;
    int32_t label = -1;
    if (x >= 0 && x < p.size[2] && y >= 0 && y < p.size[1])
      label = region_label(p, at.n * p.target_stride[0] + y * p.target_stride[2] + x * p.target_stride[3]);
    tile[i] = label;
  }
}

// Masks and labels of a thread's centres. Returns whether every window of the thread holds one label, or
// every centre is void.
template <int R>
__device__ __forceinline__ bool read_masks(const int32_t* tile, const Thread& thread, Masks<R>& masks,
                                           int32_t (&label)[kCentres]) {
  using S = Shape<R>;
  bool same = true, dead = true;
#pragma unroll
  for (int i = 0; i < kCentres; ++i) {
    label[i] = tile[(thread.y + i / kWide + R) * S::kPitch + thread.x + i % kWide + S::kMargin];
    dead &= label[i] < 0;
  }
#pragma unroll
  for (int r = 0; r < kTall + 2 * R; ++r)
#pragma unroll
    for (int c = S::kMargin - R; c < kWide + S::kMargin + R; ++c)
      same &= tile[(thread.y + r) * S::kPitch + thread.x + c] == label[0];
  same &= label[0] >= 0;
#pragma unroll
  for (int i = 0; i < kCentres; ++i)
#pragma unroll
    for (int w = 0; w < S::kMaskWords; ++w) masks.word[i][w] = same ? full_bits<R>(w) : 0;
  if (!same && !dead) {
#pragma unroll
    for (int r = 0; r < kTall + 2 * R; ++r)
      for_each_tap<R>(r, [&](int i, int column, int dy, int dx) {
        if (tile[(thread.y + r) * S::kPitch + thread.x + S::kMargin + column] == label[i])
          masks.word[i][(dy + R) / S::kRowsPerWord] |= row_bit<R>(dy, dx);
      });
#pragma unroll
    for (int i = 0; i < kCentres; ++i)
#pragma unroll
      for (int w = 0; w < S::kMaskWords; ++w)
        if (label[i] < 0) masks.word[i][w] = 0;
  }
  return same || dead;
}

template <int R>
__device__ __forceinline__ int agreeing(const Masks<R>& masks, int centre) {
  int count = 0;
#pragma unroll
  for (int w = 0; w < Shape<R>::kMaskWords; ++w) count += __popc(masks.word[centre][w]);
  return count;
}

// 1 / Z of a centre, 0 for a void one.
template <int R>
__device__ __forceinline__ float inverse_normalizer(const Masks<R>& masks, int centre,
                                                    const WindowWeights& weights, bool by_count) {
  if (masks.empty(centre)) return 0;
  if (by_count) return 1.0f / static_cast<float>(agreeing<R>(masks, centre));
  float z = 0;
#pragma unroll
  for (int d = 0; d <= R; ++d) {
    int count = 0;
#pragma unroll
    for (int w = 0; w < Shape<R>::kMaskWords; ++w)
      count += __popc(masks.word[centre][w] & ring_bits<R>(d, w));
    z += weights.ring[d] * static_cast<float>(count);
  }
  return 1.0f / z;
}

// ---- tile of logits
// ------------------------------------------------------------------------------------------------

// Carries one class plane's tile and halo from memory through registers into shared memory. A place outside
// of the image holds the nearest pixel inside: no window counts it.
template <typename T, int R>
class PlaneLoader {
  using S = Shape<R>;

 public:
  // in_pairs: rows begin at even elements and have an even number, so that a pair lies inside or outside as a
  // whole.
  __device__ PlaneLoader(const RegionCrossEntropyParams& p, const Place& at, bool in_pairs)
      : plane_(static_cast<const T*>(p.input) + at.n * p.input_stride[0]),
        class_stride_(p.input_stride[1]),
        in_pairs_(in_pairs) {
#pragma unroll
    for (int i = 0; i < S::kPairsPerThread; ++i) {
      const int pair = threadIdx.x + i * kThreads;
      const int64_t x = at.left - S::kMargin + pair % (S::kPitch / 2) * 2;
      const int64_t y = at.top - R + pair / (S::kPitch / 2);
      const int64_t row = min(max(y, int64_t{0}), p.size[1] - 1);
      const int64_t first = min(max(x, int64_t{0}), in_pairs ? p.size[2] - 2 : p.size[2] - 1);
      if (x + 1 == min(max(x + 1, int64_t{1}), p.size[2] - 1)) second_ |= 1u << i;
      offset_[i] = static_cast<int32_t>(row * p.input_stride[3] + first);
    }
  }

  // Starts reading the plane of the next class.
  __device__ __forceinline__ void fetch() {
    if (in_pairs_) {
#pragma unroll
      for (int i = 0; i < S::kPairsPerThread; ++i)
        pairs_[i] = *reinterpret_cast<const Pair*>(plane_ + offset_[i]);
    } else {
#pragma unroll
      for (int i = 0; i < S::kPairsPerThread; ++i)
        pairs_[i] = {plane_[offset_[i]], plane_[offset_[i] + static_cast<int32_t>(second_ >> i & 1u)]};
    }
    plane_ += class_stride_;
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < S::kPairsPerThread; ++i)
      reinterpret_cast<float2*>(tile)[threadIdx.x + i * kThreads] =
          make_float2(widen(pairs_[i].x), widen(pairs_[i].y));
  }

 private:
  struct __align__(2 * sizeof(T)) Pair {
    T x, y;
  };
  const T* plane_;
  int64_t class_stride_;
  bool in_pairs_;
  uint32_t second_ = 0;  // bit i: the second element of pair i is the one after its first
  int32_t offset_[S::kPairsPerThread];
  Pair pairs_[S::kPairsPerThread];
};

// ---- what both kernels begin with
// ----------------------------------------------------------------------------------

// The first class on its way, then the masks of a thread's centres, read from `tile`, where labels lie for
// now.
template <typename T, int R>
struct Start {
  PlaneLoader<T, R> loader;
  Masks<R> masks;
  int32_t label[kCentres];
  bool one_label;  // every window of the warp holds one label, and sums of boxes may stand for its taps

  __device__ __forceinline__ Start(const RegionCrossEntropyParams& p, const WindowWeights& weights,
                                   const Place& at, const Thread& thread, bool in_pairs, float* tile)
      : loader(p, at, in_pairs) {
    loader.fetch();
    int32_t* label_tile = reinterpret_cast<int32_t*>(tile);
    load_labels<R>(p, at, label_tile);
    __syncthreads();
    const bool same = read_masks<R>(label_tile, thread, masks, label);
    one_label = __all_sync(kFullWarp, same && weights.nested_boxes);
  }
};

}  // namespace tiled
}  // namespace dynplan::kernels
