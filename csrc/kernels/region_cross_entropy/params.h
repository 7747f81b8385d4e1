// Region (adaptive-pooling) cross-entropy, in the manner of arXiv 1802.08290.
//
// With x_p the logits of pixel p, y_p its label, q a window centre (anchor), W(q) the odd window round it:
//
//   w(p,q) = exp(-d^2 / 2 sigma^2), d = max over axes of spacing * |offset|       (chessboard distance)
//   a_qp   = w(p,q) [y_p = y_q] / Z_q, Z_q = sum over W(q) of w [y_p = y_q], or the count of them
//   z_q    = sum over W(q) of a_qp x_p
//   l_q    = (1 - smoothing) weight[y_q] (lse_q - z_q[y_q]) + smoothing / C sum_c weight[c] (lse_q - z_q[c])
//   value  = ( sum_q l_q^p / sum_q weight[y_q]^p )^(1/p) over the anchors whose label is not ignored
//
// merge = probs pools t_p = softmax(x_p) instead: l_q is the same with log(sum a_qp t_p[c]) for z_q[c] -
// lse_q. Without smoothing, since every pixel that agrees shares y_q, no other class is ever pooled. t_p is
// floored at the smallest normal number. Windows are cut at the border; ignored pixels never agree.
#pragma once

#include <cstdint>

#include "kernels/parallel.h"

namespace dynplan::kernels {

enum class RegionMerge : int { logits, probs };
enum class RegionNormalize : int { weight, count };
enum class RegionReduction : int { mean, sum };
enum class RegionDtype : int { f32, f64, bf16, f16 };
enum class RegionLabel : int { u8, i8, i16, i32, i64 };

inline constexpr int kRegionMaxRadius = 7;    // kernel_size 15
inline constexpr int kRegionMaxIgnored = 16;  // values of ignore_index

// Plain data, shared by the CPU and CUDA kernels and passed by value. Space is always (D, H, W): missing
// leading axes have size 1 and radius 0. `acc` below is float, or double for double logits.
struct RegionCrossEntropyParams {
  int64_t batch = 0;
  int64_t classes = 0;
  int64_t size[3] = {1, 1, 1};     // of target
  int64_t anchors[3] = {1, 1, 1};  // ceil(size / stride); anchors sit at 0, stride, 2 stride, ...

  const void* input = nullptr;  // (N, C, D, H, W) of type `logit`
  int64_t input_stride[5] = {};
  RegionDtype logit = RegionDtype::f32;

  const void* target = nullptr;  // (N, D, H, W) of type `label`
  int64_t target_stride[4] = {};
  RegionLabel label = RegionLabel::i64;

  const void* class_weight = nullptr;  // (C,) of type acc, contiguous, or null

  int radius[3] = {};
  int64_t stride[3] = {1, 1, 1};
  // w(p,q) = min over axes of axis_weight[axis][|offset|]: exp(-d^2) falls with d, so the maximum of the
  // distances is the minimum of the weights.
  double axis_weight[3][kRegionMaxRadius + 1] = {};

  double p = 1;
  double label_smoothing = 0;
  int64_t ignored[kRegionMaxIgnored] = {};
  int num_ignored = 0;
  RegionMerge merge = RegionMerge::logits;
  RegionNormalize normalize = RegionNormalize::weight;
  RegionReduction reduction = RegionReduction::mean;

  // Only for region_cross_entropy_upsampled: input is (N, C, 1, *input_size) and is interpolated
  // bilinearly to size[1] x size[2] as it is read. input_size[0] == 0: not upsampled.
  int64_t input_size[2] = {0, 0};
  bool align_corners = false;
};

// What the forward leaves. 8 bytes per anchor: (losses, lse).
struct RegionCrossEntropyState {
  void* losses = nullptr;  // acc (N, anchors): l_q, 0 where the anchor's label is ignored
  // acc; merge logits: logsumexp(z_q) (N, anchors), on CPU less the largest z_q; probs: logsumexp(x_p)
  // (N, D, H, W)
  void* lse = nullptr;
  int16_t* agreement = nullptr;  // (N, anchors) number of agreeing pixels, 0 for ignored anchors; may be null
  void* value = nullptr;         // acc, one number: the Minkowski mean or the sum of l_q
  double* normalizer =
      nullptr;  // one number: sum of weight[y_q]^p over valid anchors (their count without weights)
};

struct RegionCrossEntropyGrad {
  const void* grad_value = nullptr;   // acc, one number, or null
  const void* grad_losses = nullptr;  // acc (N, anchors), strides below, or null
  int64_t grad_losses_stride[4] = {};
  void* grad_input = nullptr;  // of type `logit`, shape of input; every element is written
  int64_t grad_input_stride[5] = {};
};

// Label that is neither ignored nor a class; `found` is false when there is none.
struct RegionBadLabel {
  bool found = false;
  int64_t value = 0;
};

}  // namespace dynplan::kernels
