// Backward of region_cross_entropy for every option: see cuda/general.cuh.
//
// A block owns a tile of the gradient. In shared memory, kClassesAtOnce classes at a time: what each anchor
// that reaches the tile hands to its pixels, then each pixel's sum over the anchors that agree with it. With
// interpolated logits the tile is one of low-resolution elements; the gradient of the full-resolution pixels
// that touch it stays in shared memory too, and a third step sums it with the interpolation's weights. One
// writer per element, no atomics.
#pragma once

#include "kernels/region_cross_entropy/cuda/general.cuh"

namespace dynplan::kernels {

namespace general {

constexpr int kBackwardClasses = 2;

// merge = probs: what anchors hand on holds 1 / probability, up to 2^126 in float. It is divided by this, and
// the pixel's probability multiplied by it, so that no upstream gradient takes either out of range.
constexpr double kProbabilityScale = 0x1p40;

// How the gradient is cut into tiles, and room for what one tile needs. Axes: (D, H, W) of the input tensor.
struct BackwardTiles {
  int64_t extent[3];  // of the input
  int tile[3];
  int64_t tiles[3];
  int64_t pixels;   // most full-resolution pixels of a tile
  int64_t anchors;  // most anchors that reach one
  size_t shared_bytes;
};

// Full-resolution pixels per low-resolution element along an axis; 0 where every pixel touches every element.
__host__ __device__ inline double upsampling_ratio(const RegionCrossEntropyParams& p, int axis) {
  const int64_t low = p.input_size[axis - 1], full = p.size[axis];
  if (!p.align_corners) return static_cast<double>(full) / low;
  return low > 1 && full > 1 ? static_cast<double>(full - 1) / (low - 1) : 0.0;
}

// For a chip that gives a block `most_shared` bytes; more where even the smallest tile needs more.
template <typename Acc>
BackwardTiles backward_tiles(const RegionCrossEntropyParams& p, size_t most_shared) {
  const bool upsampled = p.input_size[0] != 0;
  BackwardTiles b = {};
  b.extent[0] = p.size[0];
  b.extent[1] = upsampled ? p.input_size[0] : p.size[1];
  b.extent[2] = upsampled ? p.input_size[1] : p.size[2];
  int preferred[3] = {1, 16, 16};
  if (upsampled) preferred[1] = preferred[2] = 8;
  if (p.size[0] > 1) preferred[0] = 4, preferred[1] = preferred[2] = 8;
  if (p.size[0] == 1 && p.size[1] == 1) preferred[1] = 1, preferred[2] = 256;
  for (;;) {
    b.pixels = b.anchors = 1;
    for (int axis = 0; axis < 3; ++axis) {
      b.tile[axis] = preferred[axis];
      b.tiles[axis] = ceil_div(b.extent[axis], int64_t{b.tile[axis]});
      int64_t pixels = b.tile[axis];
      // A low-resolution element reaches less than one element's width beyond itself on either side.
      if (upsampled && axis > 0) {
        const double ratio = upsampling_ratio(p, axis);
        pixels = ratio > 0 ? static_cast<int64_t>((b.tile[axis] + 1) * ratio) + 4 : p.size[axis];
      }
      b.pixels *= min(pixels, p.size[axis]);
      b.anchors *= min((pixels - 1 + 2 * p.radius[axis]) / p.stride[axis] + 1, p.anchors[axis]);
    }
    b.shared_bytes =
        sizeof(Acc) * (kBackwardClasses * b.anchors + (upsampled ? kBackwardClasses * b.pixels : 0) +
                       (p.merge == RegionMerge::probs ? b.pixels : 0));
    int* largest = preferred[2] >= preferred[1] ? &preferred[2] : &preferred[1];
    if (b.shared_bytes <= most_shared || *largest == 1) return b;
    *largest /= 2;
  }
}

// A box of the (D, H, W) grid, both ends included; empty where last < first.
struct Box {
  int64_t first[3], last[3];
  __device__ int64_t width(int axis) const { return last[axis] - first[axis] + 1; }
  __device__ int64_t count() const {
    int64_t count = 1;
    for (int axis = 0; axis < 3; ++axis) count *= max(width(axis), int64_t{0});
    return count;
  }
  __device__ void place(int64_t index, int64_t* at) const {
    for (int axis = 2; axis >= 0; --axis) {
      at[axis] = first[axis] + index % width(axis);
      index /= width(axis);
    }
  }
  __device__ int64_t index(int64_t d, int64_t h, int64_t w) const {
    return ((d - first[0]) * width(1) + h - first[1]) * width(2) + w - first[2];
  }
};

// Full-resolution pixels that may touch the tile's elements: one or two more than do, whose weight is then 0.
template <bool kUpsampled>
__device__ __forceinline__ Box pixel_box(const RegionCrossEntropyParams& p, const Box& tile) {
  if constexpr (!kUpsampled) return tile;
  Box box = tile;
  for (int axis = 1; axis < 3; ++axis) {
    const double ratio = upsampling_ratio(p, axis);
    if (ratio == 0) {
      box.first[axis] = 0, box.last[axis] = p.size[axis] - 1;
      continue;
    }
    const double shift = p.align_corners ? 0.0 : 0.5;  // of an element's centre, in elements and in pixels
    const double first = floor((tile.first[axis] - 1 + shift) * ratio - shift);
    const double last = ceil((tile.last[axis] + 1 + shift) * ratio - shift);
    box.first[axis] = max(static_cast<int64_t>(first), int64_t{0});
    box.last[axis] = min(static_cast<int64_t>(last), p.size[axis] - 1);
  }
  return box;
}

__device__ __forceinline__ Box anchor_box(const RegionCrossEntropyParams& p, const Box& pixels) {
  Box box;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t low = max(pixels.first[axis] - p.radius[axis], int64_t{0});
    box.first[axis] = ceil_div(low, p.stride[axis]);
    box.last[axis] = min((pixels.last[axis] + p.radius[axis]) / p.stride[axis], p.anchors[axis] - 1);
  }
  return box;
}

// Sum over the anchors whose window holds the pixel and which share its label of weight * handed[anchor].
template <typename Acc>
__device__ __forceinline__ void gather_anchors(const RegionCrossEntropyParams& p, int64_t n,
                                               const int64_t* at, int32_t label, const Box& anchors,
                                               const Acc* handed, int64_t pitch, int channels,
                                               Acc (&sums)[kBackwardClasses]) {
  const auto weight = [&](int axis, int64_t anchor) {
    const int64_t offset = anchor * p.stride[axis] - at[axis];
    return p.axis_weight[axis][offset < 0 ? -offset : offset];
  };
  const Box one = anchor_box(p, Box{{at[0], at[1], at[2]}, {at[0], at[1], at[2]}});
  for (int64_t d = one.first[0]; d <= one.last[0]; ++d)
    for (int64_t h = one.first[1]; h <= one.last[1]; ++h)
      for (int64_t w = one.first[2]; w <= one.last[2]; ++w) {
        if (label_at(p, n, d * p.stride[0], h * p.stride[1], w * p.stride[2]) != label) continue;
        const Acc share = static_cast<Acc>(min(min(weight(0, d), weight(1, h)), weight(2, w)));
        const int64_t index = anchors.index(d, h, w);
#pragma unroll
        for (int i = 0; i < kBackwardClasses; ++i)
          if (i < channels) sums[i] += share * handed[i * pitch + index];
      }
}

template <typename T, bool kUpsampled>
__global__ void __launch_bounds__(kThreads)
    region_general_backward_kernel(const __grid_constant__ RegionCrossEntropyParams p,
                                   const __grid_constant__ RegionCrossEntropyState state,
                                   const __grid_constant__ RegionCrossEntropyGrad grad,
                                   const __grid_constant__ BackwardTiles tiles) {
  using Acc = Wide<T>;
  Acc* handed = dynamic_shared<Acc>();                           // (classes, anchors)
  Acc* pixel_grads = handed + kBackwardClasses * tiles.anchors;  // (classes, pixels) when upsampled
  Acc* pixel_scale = pixel_grads + (kUpsampled ? kBackwardClasses * tiles.pixels : 0);  // (pixels,) for probs
  const bool probs = p.merge == RegionMerge::probs, smoothed_probs = probs && p.label_smoothing > 0;
  const Acc* pixel_lse = static_cast<const Acc*>(state.lse);  // for probs
  const Acc scale = static_cast<Acc>(kProbabilityScale);
  const Place block = place_of(blockIdx.x, tiles.tiles);
  const int64_t n = block.n;
  Box tile;
  for (int axis = 0; axis < 3; ++axis) {
    tile.first[axis] = block.at[axis] * tiles.tile[axis];
    tile.last[axis] = min(tile.first[axis] + tiles.tile[axis], tiles.extent[axis]) - 1;
  }
  const Box pixels = pixel_box<kUpsampled>(p, tile), anchors = anchor_box(p, pixels);
  const int64_t num_pixels = pixels.count(), num_anchors = anchors.count();
  const RegionAnchorScale<Acc> anchor_scale(p, state, grad);
  const Acc smoothing = static_cast<Acc>(p.label_smoothing) / static_cast<Acc>(p.classes);
  const Acc smoothing_mass = smoothing > 0 ? smoothing * region_total_weight<Acc>(p) : Acc(0);
  T* grad_input = static_cast<T*>(grad.grad_input) + n * grad.grad_input_stride[0];

  // s_q and label of one anchor; -1 where it hands on nothing.
  const auto anchor_at = [&](int64_t index, int64_t* at, int64_t& flat, Acc& s) {
    int64_t q[3];
    anchors.place(index, q);
    for (int axis = 0; axis < 3; ++axis) at[axis] = q[axis] * p.stride[axis];
    const int32_t label = label_at(p, n, at[0], at[1], at[2]);
    flat = ((n * p.anchors[0] + q[0]) * p.anchors[1] + q[1]) * p.anchors[2] + q[2];
    if (label >= 0)
      s = anchor_scale(static_cast<const Acc*>(state.losses)[flat]) +
          region_grad_loss<Acc>(grad, n, q[0], q[1], q[2]);
    return label;
  };

  // Each pixel's scale: of merged probabilities without smoothing, the label's probability times what its
  // anchors hand on, s_q weight_y / (v_q Z_q) each; with smoothing, the sum of that over classes.
  if (smoothed_probs) {
    for (int64_t i = threadIdx.x; i < num_pixels; i += kThreads) pixel_scale[i] = 0;
  } else if (probs) {
    const Acc most_loss = -log(2 * std::numeric_limits<Acc>::min());
    for (int64_t i = threadIdx.x; i < num_anchors; i += kThreads) {
      int64_t at[3], flat;
      Acc s = 0, normalizer = 0, value = 0;
      const int32_t label = anchor_at(i, at, flat, s);
      const Acc weight = label >= 0 ? region_class_weight<Acc>(p, label) : Acc(0);
      if (weight != 0) {
        for_each_agreeing<Acc>(p, n, at, label, [&](int64_t, int64_t, int64_t, Acc w) {
          normalizer += p.normalize == RegionNormalize::count ? Acc(1) : w;
        });
        const Acc loss = static_cast<const Acc*>(state.losses)[flat] / weight;
        if (loss < most_loss) {
          value = s * weight / scale * exp(loss) / normalizer;
        } else {  // of a floored probability, which the loss does not tell
          Window<Acc, 1> window;
          window.template merge<T, kUpsampled>(p, n, at, label, label, pixel_lse);
          value = s * weight / scale / (window.z[0] * window.normalizer);
        }
      }
      handed[i] = value;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < num_pixels; i += kThreads) {
      int64_t at[3];
      pixels.place(i, at);
      const int32_t label = label_at(p, n, at[0], at[1], at[2]);
      Acc sums[kBackwardClasses] = {};
      if (label >= 0) {
        gather_anchors<Acc>(p, n, at, label, anchors, handed, tiles.anchors, 1, sums);
        const PixelLogits<T, kUpsampled> logits(p, n, at[0], at[1], at[2]);
        sums[0] *=
            scale * floored_probability(logits(label), pixel_lse[pixel_index(p, n, at[0], at[1], at[2])]);
      }
      pixel_scale[i] = sums[0];
    }
    __syncthreads();
  }

  // What one anchor hands on for classes first .. first + channels - 1.
  const auto hand_on = [&](int64_t i, int64_t first, int channels) {
    int64_t at[3], flat;
    Acc s = 0;
    const int32_t label = anchor_at(i, at, flat, s);
    Window<Acc, kBackwardClasses> window;
    if (label >= 0)
      window.template merge<T, kUpsampled>(p, n, at, label, first, smoothed_probs ? pixel_lse : nullptr);
    for (int k = 0; k < kBackwardClasses; ++k) {
      Acc value = 0;
      if (label >= 0 && k < channels) {
        const Acc share = target_share<Acc>(p, first + k, label);
        if (smoothed_probs) {
          value = s * share / scale / (window.z[k] * window.normalizer);
        } else {
          const Acc mass =
              (1 - static_cast<Acc>(p.label_smoothing)) * region_class_weight<Acc>(p, label) + smoothing_mass;
          value = mass * exp(window.z[k] - static_cast<const Acc*>(state.lse)[flat]) - share;
          value *= s / window.normalizer;
        }
      }
      handed[k * tiles.anchors + i] = value;
    }
  };

  // The gradient of one pixel for the same classes. Of merged probabilities with smoothing, the first sweep
  // only adds to the pixel's scale.
  const auto pixel_gradient = [&](int64_t i, const int64_t* at, int64_t first, int channels, bool sums_only,
                                  Acc(&grads)[kBackwardClasses]) {
    const int32_t label = label_at(p, n, at[0], at[1], at[2]);
    if (label < 0) return;
    if (!probs || smoothed_probs)
      gather_anchors<Acc>(p, n, at, label, anchors, handed, tiles.anchors, channels, grads);
    if (!probs) return;
    const PixelLogits<T, kUpsampled> logits(p, n, at[0], at[1], at[2]);
    const Acc lse = pixel_lse[pixel_index(p, n, at[0], at[1], at[2])];
    for (int k = 0; k < channels; ++k) {
      const Acc probability = floored_probability(logits(first + k), lse);
      if (smoothed_probs) {
        const Acc product = scale * probability * grads[k];
        if (sums_only) pixel_scale[i] += product;
        grads[k] = probability * pixel_scale[i] - product;
      } else {
        grads[k] = pixel_scale[i] * (probability - (first + k == label ? Acc(1) : Acc(0)));
      }
    }
  };

  const int64_t sweep = ceil_div(p.classes, int64_t{kBackwardClasses});
  for (int64_t step = smoothed_probs ? -sweep : 0; step < sweep; ++step) {
    const bool sums_only = step < 0;
    const int64_t first = (sums_only ? step + sweep : step) * kBackwardClasses;
    const int channels = static_cast<int>(min(p.classes - first, int64_t{kBackwardClasses}));
    if (!probs || smoothed_probs) {
      for (int64_t i = threadIdx.x; i < num_anchors; i += kThreads) hand_on(i, first, channels);
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < num_pixels; i += kThreads) {
      int64_t at[3];
      pixels.place(i, at);
      Acc grads[kBackwardClasses] = {};
      pixel_gradient(i, at, first, channels, sums_only, grads);
      for (int k = 0; !sums_only && k < channels; ++k) {
        if constexpr (kUpsampled) {
          pixel_grads[k * tiles.pixels + i] = grads[k];
        } else {
          grad_input[(first + k) * grad.grad_input_stride[1] + at[0] * grad.grad_input_stride[2] +
                     at[1] * grad.grad_input_stride[3] + at[2] * grad.grad_input_stride[4]] =
              narrow<T>(grads[k]);
        }
      }
    }
    __syncthreads();
    if (sums_only) continue;
    if constexpr (kUpsampled) {
      const int64_t elements = tile.count();
      for (int64_t i = threadIdx.x; i < elements * channels; i += kThreads) {
        const int64_t k = i / elements;
        int64_t at[3];
        tile.place(i % elements, at);
        Acc sum = 0;
        const Box touching = pixel_box<true>(p, Box{{at[0], at[1], at[2]}, {at[0], at[1], at[2]}});
        for (int64_t h = touching.first[1]; h <= touching.last[1]; ++h) {
          const Neighbours<Acc> y(h, p.input_size[0], p.size[1], p.align_corners);
          const Acc down =
              (y.near == at[1] ? 1 - y.far_weight : Acc(0)) + (y.far == at[1] ? y.far_weight : Acc(0));
          for (int64_t w = touching.first[2]; w <= touching.last[2]; ++w) {
            const Neighbours<Acc> x(w, p.input_size[1], p.size[2], p.align_corners);
            const Acc right =
                (x.near == at[2] ? 1 - x.far_weight : Acc(0)) + (x.far == at[2] ? x.far_weight : Acc(0));
            sum += down * right * pixel_grads[k * tiles.pixels + pixels.index(at[0], h, w)];
          }
        }
        grad_input[(first + k) * grad.grad_input_stride[1] + at[0] * grad.grad_input_stride[2] +
                   at[1] * grad.grad_input_stride[3] + at[2] * grad.grad_input_stride[4]] = narrow<T>(sum);
      }
      __syncthreads();
    }
  }
}

}  // namespace general
}  // namespace dynplan::kernels
