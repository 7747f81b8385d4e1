// Chooses between the tiled and the general kernels of region_cross_entropy and launches them.
#pragma once

#include "kernels/region_cross_entropy/cuda/general_backward.cuh"
#include "kernels/region_cross_entropy/cuda/tiled_backward.cuh"
#include "kernels/region_cross_entropy/cuda/tiled_forward.cuh"

namespace dynplan::kernels {

inline int64_t region_pixels(const RegionCrossEntropyParams& p) {
  return p.batch * p.size[0] * p.size[1] * p.size[2];
}

inline int64_t region_anchors(const RegionCrossEntropyParams& p) {
  return p.batch * p.anchors[0] * p.anchors[1] * p.anchors[2];
}

// Whether rows can be read or written `count` elements at a time: every row begins at a multiple of that.
inline bool region_in_groups(const void* data, const int64_t* stride, int64_t width, int64_t element_bytes,
                             int count) {
  return width % count == 0 && stride[0] % count == 0 && stride[1] % count == 0 && stride[3] % count == 0 &&
         reinterpret_cast<uintptr_t>(data) % (count * element_bytes) == 0;
}

// ---- tiled
// ---------------------------------------------------------------------------------------------------------

inline bool region_is_tiled(const RegionCrossEntropyParams& p, const int64_t* data_stride) {
  const int radius = p.radius[1];
  if (p.merge != RegionMerge::logits || p.input_size[0] != 0 || p.logit == RegionDtype::f64 || p.size[0] != 1)
    return false;
  if (radius < 1 || radius > 3 || p.radius[2] != radius || p.stride[1] != 1 || p.stride[2] != 1) return false;
  for (int d = 0; d <= radius; ++d)
    if (p.axis_weight[1][d] != p.axis_weight[2][d]) return false;
  // Offsets within a plane are 32-bit.
  const int64_t rows = p.size[1] * data_stride[3] + p.size[2];
  return p.classes > 0 && data_stride[4] == 1 && data_stride[3] >= 0 && rows < (int64_t{1} << 31) - 65536;
}

template <int R>
tiled::WindowWeights region_window_weights(const RegionCrossEntropyParams& p) {
  tiled::WindowWeights weights = {};
  weights.nested_boxes = true;
  for (int d = 0; d <= R; ++d) {
    weights.ring[d] = static_cast<float>(p.axis_weight[1][d]);
    weights.step[d] = static_cast<float>(p.axis_weight[1][d] - (d < R ? p.axis_weight[1][d + 1] : 0.0));
    weights.nested_boxes &= weights.step[d] > 0;
  }
  return weights;
}

struct RegionTiles {
  int64_t x, y, count;
};

inline RegionTiles region_tiles(const RegionCrossEntropyParams& p, int width, int height) {
  const int64_t x = ceil_div(p.size[2], int64_t{width}), y = ceil_div(p.size[1], int64_t{height});
  return {x, y, x * y * p.batch};
}

template <typename T, int R, bool kSmoothing>
cudaError_t region_tiled_forward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                                 RegionPartial* partials, cudaStream_t stream) {
  const RegionTiles tiles = region_tiles(p, tiled::kTileX, tiled::kTileY);
  return launch(tiled::region_forward_kernel<T, R, kSmoothing>, dim3(static_cast<unsigned>(tiles.count)),
                dim3(tiled::kThreads), 2 * tiled::Shape<R>::kTileFloats * sizeof(float), stream, p, state,
                region_window_weights<R>(p), partials, static_cast<int>(tiles.x), static_cast<int>(tiles.y),
                region_in_groups(p.input, p.input_stride, p.size[2], sizeof(T), 2));
}

template <typename T, int R, bool kSmoothing>
cudaError_t region_tiled_backward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                                  const RegionCrossEntropyGrad& grad, cudaStream_t stream) {
  using S = tiled::Shape<R>;
  const RegionTiles tiles = region_tiles(p, S::kInnerX, S::kInnerY);
  const size_t shared_bytes = (2 * S::kTileFloats + S::kCentreFloats + S::kMaskTileWords) * sizeof(float);
  return launch(tiled::region_backward_kernel<T, R, kSmoothing>, dim3(static_cast<unsigned>(tiles.count)),
                dim3(tiled::kThreads), shared_bytes, stream, p, state, grad, region_window_weights<R>(p),
                static_cast<int>(tiles.x), static_cast<int>(tiles.y),
                region_in_groups(p.input, p.input_stride, p.size[2], sizeof(T), 2),
                region_in_groups(grad.grad_input, grad.grad_input_stride, p.size[2], sizeof(T), 4));
}

// Calls run with (std::integral_constant radius, std::bool_constant smoothing).
template <typename Run>
cudaError_t region_dispatch_tiled(const RegionCrossEntropyParams& p, Run run) {
  const auto with_radius = [&](auto radius) {
    return p.label_smoothing > 0 ? run(radius, std::true_type{}) : run(radius, std::false_type{});
  };
  switch (p.radius[1]) {
    case 1:
      return with_radius(std::integral_constant<int, 1>{});
    case 2:
      return with_radius(std::integral_constant<int, 2>{});
    default:
      return with_radius(std::integral_constant<int, 3>{});
  }
}

// ---- both
// ----------------------------------------------------------------------------------------------------------

inline bool region_forward_is_tiled(const RegionCrossEntropyParams& p) {
  return region_is_tiled(p, p.input_stride);
}

// Number of RegionPartial that the forward needs as scratch.
inline int64_t region_partials(const RegionCrossEntropyParams& p) {
  return region_forward_is_tiled(p) ? region_tiles(p, tiled::kTileX, tiled::kTileY).count
                                    : ceil_div(region_anchors(p), int64_t{general::kThreads});
}

template <typename T, bool kUpsampled>
cudaError_t region_general_forward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                                   RegionPartial* partials, cudaStream_t stream) {
  using Acc = Wide<T>;
  const int64_t pixels = region_pixels(p), anchors = region_anchors(p);
  if (p.merge == RegionMerge::probs) {
    const dim3 grid(static_cast<unsigned>(ceil_div(pixels, int64_t{general::kThreads})));
    const cudaError_t error =
        launch(general::region_pixel_lse_kernel<T, kUpsampled>, grid, dim3(general::kThreads), 0, stream, p,
               static_cast<Acc*>(state.lse), pixels);
    if (error != cudaSuccess) return error;
  }
  return launch(general::region_general_forward_kernel<T, kUpsampled>,
                dim3(static_cast<unsigned>(region_partials(p))), dim3(general::kThreads), 0, stream, p, state,
                partials, anchors);
}

// Writes losses, lse, agreement, value and normalizer.
template <typename T>
cudaError_t region_cross_entropy_forward(const RegionCrossEntropyParams& p,
                                         const RegionCrossEntropyState& state, RegionPartial* partials,
                                         cudaStream_t stream) {
  const int64_t count = region_partials(p);
  cudaError_t error = cudaSuccess;
  if (count > 0 && p.input_size[0] != 0) {
    error = region_general_forward<T, true>(p, state, partials, stream);
  } else if (count > 0 && !region_forward_is_tiled(p)) {
    error = region_general_forward<T, false>(p, state, partials, stream);
  } else if (count > 0) {
    if constexpr (!std::is_same_v<T, double>)
      error = region_dispatch_tiled(p, [&](auto radius, auto smoothing) {
        return region_tiled_forward<T, radius.value, smoothing.value>(p, state, partials, stream);
      });
  }
  return error != cudaSuccess ? error : region_reduce<Wide<T>>(p, state, partials, count, stream);
}

// Whether one tile of the general backward fits into shared memory; the tiled kernels' always do.
inline bool region_backward_fits(const RegionCrossEntropyParams& p, size_t most_shared) {
  const general::BackwardTiles tiles = p.logit == RegionDtype::f64
                                           ? general::backward_tiles<double>(p, most_shared)
                                           : general::backward_tiles<float>(p, most_shared);
  return region_pixels(p) == 0 || tiles.shared_bytes <= most_shared;
}

template <typename T, bool kUpsampled>
cudaError_t region_general_backward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                                    const RegionCrossEntropyGrad& grad, size_t most_shared,
                                    cudaStream_t stream) {
  const general::BackwardTiles tiles = general::backward_tiles<Wide<T>>(p, most_shared);
  const int64_t blocks = p.batch * tiles.tiles[0] * tiles.tiles[1] * tiles.tiles[2];
  return launch(general::region_general_backward_kernel<T, kUpsampled>, dim3(static_cast<unsigned>(blocks)),
                dim3(general::kThreads), tiles.shared_bytes, stream, p, state, grad, tiles);
}

// Writes every element of grad_input. `most_shared`: bytes of shared memory that the chip gives a block.
template <typename T>
cudaError_t region_cross_entropy_backward(const RegionCrossEntropyParams& p,
                                          const RegionCrossEntropyState& state,
                                          const RegionCrossEntropyGrad& grad, size_t most_shared,
                                          cudaStream_t stream) {
  if (p.classes == 0) return cudaSuccess;
  // Without pixels there may be logits to interpolate all the same; their gradient is dense.
  if (region_pixels(p) == 0) {
    const int64_t elements = p.batch * p.classes * p.input_size[0] * p.input_size[1];
    return elements > 0 ? cudaMemsetAsync(grad.grad_input, 0, elements * sizeof(T), stream) : cudaSuccess;
  }
  if (p.input_size[0] != 0) return region_general_backward<T, true>(p, state, grad, most_shared, stream);
  if constexpr (!std::is_same_v<T, double>) {
    if (region_is_tiled(p, p.input_stride) && region_is_tiled(p, grad.grad_input_stride))
      return region_dispatch_tiled(p, [&](auto radius, auto smoothing) {
        return region_tiled_backward<T, radius.value, smoothing.value>(p, state, grad, stream);
      });
  }
  return region_general_backward<T, false>(p, state, grad, most_shared, stream);
}

}  // namespace dynplan::kernels
