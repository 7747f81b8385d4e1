// The ops of region_cross_entropy.h over a backend, so that the long signatures stand once. A backend
// has
//   static void forward(const char* op, const at::Tensor& input, const Params&, const State&)
//   static void backward(const char* op, const at::Tensor& input, const Params&, const State&, const Grad&)
// and, where it has them, the op that does both at once and returns what the gradient is to be multiplied by,
// and memory of its own for gradients:
//   static double loss_and_gradient(const char* op, const Params&, const State&, const Grad&)
//   static void scale(const at::Tensor& gradient, double factor)
//   static at::Tensor empty_like(const at::Tensor& input)
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "ops/region_cross_entropy.h"

namespace dynplan {

template <class Backend>
class RegionCrossEntropyOps {
  using Tensor = at::Tensor;
  using OptionalTensor = std::optional<at::Tensor>;
  using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Ints = at::IntArrayRef;
  using Floats = at::ArrayRef<double>;
  using Word = std::string_view;

 public:
  static void implement(torch::Library& m) {
    m.impl("region_cross_entropy", &forward);
    m.impl("_region_cross_entropy_backward", &backward);
    if constexpr (requires { &Backend::loss_and_gradient; })
      m.impl("_region_cross_entropy_loss_and_gradient", &loss_and_gradient);
  }

 private:
  // The public function that users know.
  static const char* name_of(std::optional<bool> align_corners) {
    return align_corners ? "region_cross_entropy_upsampled" : "region_cross_entropy";
  }

  // Params with the class weights attached; `dense_weight` owns them.
  static kernels::RegionCrossEntropyParams make_params(const Tensor& input, const Tensor& target,
                                                       const OptionalTensor& weight,
                                                       std::optional<bool> align_corners,
                                                       const RegionOptions& options, Tensor& dense_weight) {
    auto params =
        region_cross_entropy_params(name_of(align_corners), input, target, weight, align_corners, options);
    if (weight) {
      dense_weight = weight->contiguous();
      params.class_weight = dense_weight.const_data_ptr();
    }
    return params;
  }

  static kernels::RegionCrossEntropyState state_of(const RegionOutputs& out) {
    return {
        .losses = out.losses.mutable_data_ptr(),
        .lse = out.lse.mutable_data_ptr(),
        .agreement = out.agreement.numel() > 0 ? out.agreement.template mutable_data_ptr<int16_t>() : nullptr,
        .value = out.value.mutable_data_ptr(),
        .normalizer = out.normalizer.template mutable_data_ptr<double>()};
  }

  // A new gradient of `input`, and where it goes.
  static Tensor grad_input_of(const Tensor& input, kernels::RegionCrossEntropyGrad& grad) {
    Tensor grad_input;
    if constexpr (requires { Backend::empty_like(input); })
      grad_input = Backend::empty_like(input);
    else
      grad_input = at::empty_like(input);
    grad.grad_input = grad_input.mutable_data_ptr();
    const int64_t axes = input.dim() - 2;
    grad.grad_input_stride[0] = grad_input.stride(0);
    grad.grad_input_stride[1] = grad_input.stride(1);
    for (int64_t axis = 0; axis < axes; ++axis)
      grad.grad_input_stride[5 - axes + axis] = grad_input.stride(axis + 2);
    return grad_input;
  }

  static Outputs forward(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                         std::optional<bool> align_corners, Ints kernel_size, Ints stride, Floats spacing,
                         double sigma, double p, Word merge, Word normalize, Ints ignore_index,
                         double label_smoothing, Word reduction, bool agreement) {
    Tensor dense_weight;
    const auto params = make_params(
        input, target, weight, align_corners,
        {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction},
        dense_weight);
    const RegionOutputs out = region_cross_entropy_outputs(params, input, target, agreement);
    Backend::forward(name_of(align_corners), input, params, state_of(out));
    return {out.value, out.normalizer, out.losses, out.lse, out.agreement};
  }

  static Tensor backward(const OptionalTensor& grad_value, const OptionalTensor& grad_losses,
                         const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                         std::optional<bool> align_corners, const Tensor& value, const Tensor& normalizer,
                         const Tensor& losses, const Tensor& lse, Ints kernel_size, Ints stride,
                         Floats spacing, double sigma, double p, Word merge, Word normalize,
                         Ints ignore_index, double label_smoothing, Word reduction) {
    const char* const op = name_of(align_corners);
    Tensor dense_weight;
    const auto params = make_params(
        input, target, weight, align_corners,
        {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction},
        dense_weight);
    auto grad =
        region_cross_entropy_grad(op, params, grad_value, grad_losses, input, value, normalizer, losses, lse);
    Tensor grad_input = grad_input_of(input, grad);
    // The backward only reads the state; the struct is the one that the forward writes through.
    Backend::backward(op, input, params,
                      {.losses = const_cast<void*>(losses.const_data_ptr()),
                       .lse = const_cast<void*>(lse.const_data_ptr()),
                       .value = const_cast<void*>(value.const_data_ptr()),
                       .normalizer = const_cast<double*>(normalizer.template const_data_ptr<double>())},
                      grad);
    return grad_input;
  }

  static Outputs loss_and_gradient(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                   Ints kernel_size, Ints stride, Floats spacing, double sigma, double p,
                                   Word merge, Word normalize, Ints ignore_index, double label_smoothing,
                                   Word reduction) {
    TORCH_CHECK_TYPE(input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble,
                     name_of(std::nullopt), ": expected input to be float32 or float64, got ",
                     input.scalar_type());
    Tensor dense_weight;
    const auto params = make_params(
        input, target, weight, std::nullopt,
        {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction},
        dense_weight);
    const RegionOutputs out = region_cross_entropy_outputs(params, input, target, /*agreement=*/false);
    kernels::RegionCrossEntropyGrad grad;
    Tensor grad_input = grad_input_of(input, grad);
    const double factor = Backend::loss_and_gradient(name_of(std::nullopt), params, state_of(out), grad);
    if (factor != 1) Backend::scale(grad_input, factor);
    return {out.value, out.normalizer, out.losses, out.lse, grad_input};
  }
};

}  // namespace dynplan
