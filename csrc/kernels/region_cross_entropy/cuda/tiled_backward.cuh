// Backward of the tiled region_cross_entropy: see cuda/tiled.cuh.
//
// For each class: d loss / d z_q / Z_q of the tile's centres q goes to shared memory, one barrier, then every
// pixel p of the tile's inside sums it over the q of its window that share its label, with the weights of the
// forward.
#pragma once

#include "kernels/region_cross_entropy/cuda/tiled_sums.cuh"

namespace dynplan::kernels {

namespace tiled {

// d loss / d z_qc / Z_q = mass * softmax_c - [c = label] hit - smoothing * weight_c, each with s_q / Z_q in
// it.
struct CentreGrad {
  float scale = 0;  // log2(e) / Z
  float lse = 0;    // in base 2
  float mass = 0;
  float hit = 0, smoothing = 0;  // only with label smoothing: without it, hit is the mass
};

// Masks of the tile's centres in shared memory: registers are dear, and only windows of several labels need
// them.
template <int R>
class MaskTile {
  using S = Shape<R>;

 public:
  __device__ explicit MaskTile(float* shared) : words_(reinterpret_cast<uint32_t*>(shared)) {}

  // Row `row`, columns `column` .. `column` + 3 hold the first four of `masks`; the next row the others.
  __device__ void write(const Masks<R>& masks, int row, int column) {
#pragma unroll
    for (int i = 0; i < kCentres; ++i)
#pragma unroll
      for (int w = 0; w < S::kMaskWords; ++w) *at(w, row + i / kWide, column + i % kWide) = masks.word[i][w];
  }

  __device__ Masks<R> read(int row, int column) const {
    Masks<R> masks;
#pragma unroll
    for (int i = 0; i < kCentres; i += 2)
#pragma unroll
      for (int w = 0; w < S::kMaskWords; ++w) {
        const uint2 two = *reinterpret_cast<const uint2*>(at(w, row + i / kWide, column + i % kWide));
        masks.word[i][w] = two.x, masks.word[i + 1][w] = two.y;
      }
    return masks;
  }

 private:
  __device__ uint32_t* at(int word, int row, int column) const {
    return words_ + (word * kTileY + row) * kTileX + column;
  }
  uint32_t* words_;
};

template <int R>
__device__ __forceinline__ bool all_full(const Masks<R>& masks) {
  bool full = true;
#pragma unroll
  for (int w = 0; w < Shape<R>::kMaskWords; ++w)
#pragma unroll
    for (int i = 0; i < kCentres; ++i) full &= masks.word[i][w] == full_bits<R>(w);
  return full;
}

template <typename T>
__device__ __forceinline__ void store_row(T* row, const float* values, int64_t left, int64_t width,
                                          bool in_quads) {
  if (in_quads) {  // width and left are multiples of 4: all inside, or none
    if (left >= width) return;
    struct __align__(4 * sizeof(T)) Quad {
      T element[4];
    };
    *reinterpret_cast<Quad*>(row + left) = {narrow<T>(values[0]), narrow<T>(values[1]), narrow<T>(values[2]),
                                            narrow<T>(values[3])};
    return;
  }
#pragma unroll
  for (int j = 0; j < kWide; ++j)
    if (left + j < width) row[left + j] = narrow<T>(values[j]);
}

template <typename T, int R, bool kSmoothing>
__global__ void __launch_bounds__(kThreads, R <= 2 && !kSmoothing ? 2 : 1)
    region_backward_kernel(const __grid_constant__ RegionCrossEntropyParams p,
                           const __grid_constant__ RegionCrossEntropyState state,
                           const __grid_constant__ RegionCrossEntropyGrad grad,
                           const __grid_constant__ WindowWeights weights, int tiles_x, int tiles_y,
                           bool in_pairs, bool in_quads) {
  using S = Shape<R>;
  __shared__ float shared_ring[R];
  float* tiles = dynamic_shared<float>();       // two tiles of logits
  float* centres = tiles + 2 * S::kTileFloats;  // two of d loss / d z / Z
  const Thread thread;
  const Place inner = place_of(tiles_x, tiles_y, S::kInnerX, S::kInnerY);
  const Place at = {inner.n, inner.left - S::kMargin, inner.top - R};
  Start<T, R> start(p, weights, at, thread, in_pairs, tiles);
  auto& [loader, masks, label, one_label] = start;

  // The pixels that a thread writes lie kMargin right of and R below its centres: other threads' centres,
  // whose masks they take over.
  MaskTile<R> mask_tile(centres + S::kCentreFloats);
  mask_tile.write(masks, thread.y, thread.x);
  __syncthreads();
  loader.store(tiles);
  const bool writes = thread.x < S::kInnerX && thread.y < S::kInnerY;
  const auto pixel_masks = [&] { return mask_tile.read(thread.y + R, thread.x + S::kMargin); };
  const bool pixels_one_label =
      __all_sync(kFullWarp, (!writes || all_full<R>(pixel_masks())) && weights.nested_boxes);

  const RegionAnchorScale<float> anchor_scale(p, state, grad);
  const float smoothing =
      kSmoothing ? static_cast<float>(p.label_smoothing) / static_cast<float>(p.classes) : 0;
  const float smoothing_mass = kSmoothing ? smoothing * region_total_weight<float>(p) : 0;
  CentreGrad centre[kCentres];
#pragma unroll
  for (int i = 0; i < kCentres; ++i) {
    const int64_t x = at.left + thread.x + i % kWide, y = at.top + thread.y + i / kWide;
    if (label[i] < 0) continue;
    const int64_t anchor = (at.n * p.size[1] + y) * p.size[2] + x;
    const float inverse_z = inverse_normalizer<R>(masks, i, weights, p.normalize == RegionNormalize::count);
    const float s = anchor_scale(static_cast<const float*>(state.losses)[anchor]) +
                    region_grad_loss<float>(grad, at.n, 0, y, x);
    const float hit = (1 - static_cast<float>(p.label_smoothing)) * region_class_weight<float>(p, label[i]);
    centre[i].scale = kLog2e * inverse_z;
    centre[i].lse = kLog2e * static_cast<const float*>(state.lse)[anchor];
    centre[i].mass = s * inverse_z * (hit + smoothing_mass);
    if constexpr (kSmoothing) {
      centre[i].hit = s * inverse_z * hit;
      centre[i].smoothing = s * inverse_z * smoothing;
    }
  }
  float ring[R];
  pin_ring<R>(weights, shared_ring, ring);

  const int32_t classes = static_cast<int32_t>(p.classes);
  T* row = static_cast<T*>(grad.grad_input) + at.n * grad.grad_input_stride[0] +
           (inner.top + thread.y) * grad.grad_input_stride[3];
  for (int32_t c = 0; c < classes; ++c, row += grad.grad_input_stride[1]) {
    const float* tile = tiles + (c & 1) * S::kTileFloats;
    float* centre_tile = centres + (c & 1) * kTileX * kTileY;
    if (c + 1 < classes) loader.fetch();
    float z[kCentres];
    window_sums<R>(
        tile + thread.y * S::kPitch + thread.x, S::kPitch, one_label, ring, weights,
        [&] { return mask_tile.read(thread.y, thread.x); }, z);
    const float class_weight = kSmoothing ? region_class_weight<float>(p, c) : 0;
#pragma unroll
    for (int i = 0; i < kCentres; ++i) {
      z[i] = centre[i].mass * exp2_fast(fmaf(z[i], centre[i].scale, -centre[i].lse));
      if (c == label[i]) z[i] -= kSmoothing ? centre[i].hit : centre[i].mass;
      if constexpr (kSmoothing) z[i] = fmaf(-centre[i].smoothing, class_weight, z[i]);
    }
#pragma unroll
    for (int u = 0; u < kTall; ++u)
      *reinterpret_cast<float4*>(centre_tile + (thread.y + u) * kTileX + thread.x) =
          make_float4(z[u * kWide], z[u * kWide + 1], z[u * kWide + 2], z[u * kWide + 3]);
    if (c + 1 < classes) loader.store(tiles + (~c & 1) * S::kTileFloats);
    __syncthreads();
    if (!writes) continue;
    float sums[kCentres];
    window_sums<R>(centre_tile + thread.y * kTileX + thread.x, kTileX, pixels_one_label, ring, weights,
                   pixel_masks, sums);
#pragma unroll
    for (int u = 0; u < kTall; ++u)
      if (inner.top + thread.y + u < p.size[1])
        store_row(row + u * grad.grad_input_stride[3], sums + u * kWide, inner.left + thread.x, p.size[2],
                  in_quads);
  }
}

}  // namespace tiled
}  // namespace dynplan::kernels
