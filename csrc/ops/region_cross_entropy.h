// What the ops of region_cross_entropy share on every device. Arguments, shapes, dtypes and errors are those
// that dynplan/ops/region_cross_entropy.py documents; this says what that does not.
//
//   region_cross_entropy: with align_corners the logits of the formulas are the bilinear interpolation of
//   input (N, C, h, w) to the size of target (N, H, W); without it input has the size of target.
//     value      ()            Minkowski mean of exponent p over valid anchors ("mean"), or their sum ("sum")
//     normalizer ()            float64: sum of weight[label]^p over valid anchors
//     losses     (N, *anchors) loss of each anchor, 0 where its label is ignored
//     lse        (N, *anchors), or (N, *spatial) for merge "probs": what else the backward needs
//     agreement  (N, *anchors) int16: agreeing pixels of each window; (0,) when not asked for
//   value, losses and lse are float32, float64 for float64 input.
//
//   _region_cross_entropy_backward: grad_input, dtype and strides of empty_like(input)
//     d value / d l_q = (l_q / value)^(p-1) / normalizer   ("mean"; 0/0 = 0), 1 ("sum")
//     With s_q = grad_value * that + grad_losses_q:
//     grad_input_p = sum over anchors q whose window holds p, y_q = y_p, of a_qp s_q d l_q / d z_q
//
//   _region_cross_entropy_loss_and_gradient: CPU only. The forward, and the backward of its value for
//   grad_value = 1, from one pass over the logits where merge is "logits", every stride 1 and label_smoothing
//   0 (else one after the other).
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "kernels/region_cross_entropy/params.h"

namespace dynplan {

struct RegionOptions {
  at::IntArrayRef kernel_size;
  at::IntArrayRef stride;
  at::ArrayRef<double> spacing;
  double sigma;
  double p;
  std::string_view merge;
  std::string_view normalize;
  at::IntArrayRef ignore_index;
  double label_smoothing;
  std::string_view reduction;
};

// Checks every argument and fills all of Params except class_weight, from tensors on any device.
// `align_corners` is empty where input has the size of target. `op` is named in errors.
kernels::RegionCrossEntropyParams region_cross_entropy_params(const char* op, const at::Tensor& input,
                                                              const at::Tensor& target,
                                                              const std::optional<at::Tensor>& weight,
                                                              std::optional<bool> align_corners,
                                                              const RegionOptions& options);

struct RegionOutputs {
  at::Tensor value, normalizer, losses, lse, agreement;
};

// Uninitialised outputs of the forward on input's device.
RegionOutputs region_cross_entropy_outputs(const kernels::RegionCrossEntropyParams& params,
                                           const at::Tensor& input, const at::Tensor& target, bool agreement);

// Checks what the backward is given beside the forward's arguments, and fills Grad except grad_input.
kernels::RegionCrossEntropyGrad region_cross_entropy_grad(const char* op,
                                                          const kernels::RegionCrossEntropyParams& params,
                                                          const std::optional<at::Tensor>& grad_value,
                                                          const std::optional<at::Tensor>& grad_losses,
                                                          const at::Tensor& input, const at::Tensor& value,
                                                          const at::Tensor& normalizer,
                                                          const at::Tensor& losses, const at::Tensor& lse);

}  // namespace dynplan
