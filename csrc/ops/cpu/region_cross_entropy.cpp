#include "ops/region_cross_entropy.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "kernels/region_cross_entropy_cpu.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using std::string_view;

constexpr const char* kName = "region_cross_entropy";
constexpr const char* kUpsampledName = "region_cross_entropy_upsampled";

// Params with the class weights attached; `keep` owns them.
kernels::RegionCrossEntropyParams cpu_params(const char* op, const at::Tensor& input,
                                             const at::Tensor& target, const OptionalTensor& weight,
                                             std::optional<bool> align_corners, const RegionOptions& options,
                                             at::Tensor& keep) {
  kernels::RegionCrossEntropyParams params =
      region_cross_entropy_params(op, input, target, weight, align_corners, options);
  if (weight) {
    keep = weight->contiguous();
    params.class_weight = keep.const_data_ptr();
  }
  return params;
}

Outputs forward(const char* op, const at::Tensor& input, const at::Tensor& target,
                const OptionalTensor& weight, std::optional<bool> align_corners, const RegionOptions& options,
                bool agreement) {
  at::Tensor keep;
  const auto params = cpu_params(op, input, target, weight, align_corners, options, keep);
  RegionOutputs out = region_cross_entropy_outputs(params, input, target, agreement);
  const kernels::RegionBadLabel bad =
      kernels::region_cross_entropy_kernels(kernels::cpu_isa())
          .forward(params,
                   {.losses = out.losses.mutable_data_ptr(),
                    .lse = out.lse.mutable_data_ptr(),
                    .agreement = agreement ? out.agreement.mutable_data_ptr<int16_t>() : nullptr,
                    .value = out.value.mutable_data_ptr(),
                    .normalizer = out.normalizer.mutable_data_ptr<double>()},
                   at_parallel);
  TORCH_CHECK_INDEX(!bad.found, op, ": expected target to be in 0..", params.classes - 1,
                    " or an ignored label, got ", bad.value);
  return {out.value, out.normalizer, out.losses, out.lse, out.agreement};
}

at::Tensor backward(const char* op, const OptionalTensor& grad_value, const OptionalTensor& grad_losses,
                    const at::Tensor& input, const at::Tensor& target, const OptionalTensor& weight,
                    std::optional<bool> align_corners, const at::Tensor& value, const at::Tensor& normalizer,
                    const at::Tensor& losses, const at::Tensor& lse, const RegionOptions& options) {
  at::Tensor keep;
  const auto params = cpu_params(op, input, target, weight, align_corners, options, keep);
  kernels::RegionCrossEntropyGrad grad =
      region_cross_entropy_grad(op, params, grad_value, grad_losses, input, value, normalizer, losses, lse);
  at::Tensor grad_input = at::empty_like(input);
  grad.grad_input = grad_input.mutable_data_ptr();
  grad.grad_input_stride[0] = grad_input.stride(0);
  grad.grad_input_stride[1] = grad_input.stride(1);
  const int64_t axes = input.dim() - 2;
  for (int64_t axis = 0; axis < axes; ++axis)
    grad.grad_input_stride[5 - axes + axis] = grad_input.stride(axis + 2);
  const auto& kernels = kernels::region_cross_entropy_kernels(kernels::cpu_isa());
  // The state is only read; the struct is the one that the forward writes through.
  const kernels::RegionCrossEntropyState state{
      .losses = const_cast<void*>(losses.const_data_ptr()),
      .lse = const_cast<void*>(lse.const_data_ptr()),
      .value = const_cast<void*>(value.const_data_ptr()),
      .normalizer = const_cast<double*>(normalizer.const_data_ptr<double>())};
  kernels.backward(params, state, grad, at_parallel);
  return grad_input;
}

Outputs region_cross_entropy_cpu(const at::Tensor& input, const at::Tensor& target,
                                 const OptionalTensor& weight, at::IntArrayRef kernel_size,
                                 at::IntArrayRef stride, at::ArrayRef<double> spacing, double sigma, double p,
                                 string_view merge, string_view normalize, at::IntArrayRef ignore_index,
                                 double label_smoothing, string_view reduction, bool agreement) {
  return forward(
      kName, input, target, weight, std::nullopt,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction},
      agreement);
}

Outputs region_cross_entropy_upsampled_cpu(const at::Tensor& input, const at::Tensor& target,
                                           const OptionalTensor& weight, bool align_corners,
                                           at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                           at::ArrayRef<double> spacing, double sigma, double p,
                                           string_view merge, string_view normalize,
                                           at::IntArrayRef ignore_index, double label_smoothing,
                                           string_view reduction, bool agreement) {
  return forward(
      kUpsampledName, input, target, weight, align_corners,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction},
      agreement);
}

at::Tensor region_cross_entropy_backward_cpu(
    const OptionalTensor& grad_value, const OptionalTensor& grad_losses, const at::Tensor& input,
    const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& value,
    const at::Tensor& normalizer, const at::Tensor& losses, const at::Tensor& lse,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::ArrayRef<double> spacing, double sigma, double p,
    string_view merge, string_view normalize, at::IntArrayRef ignore_index, double label_smoothing,
    string_view reduction) {
  return backward(
      kName, grad_value, grad_losses, input, target, weight, std::nullopt, value, normalizer, losses, lse,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction});
}

at::Tensor region_cross_entropy_upsampled_backward_cpu(
    const OptionalTensor& grad_value, const OptionalTensor& grad_losses, const at::Tensor& input,
    const at::Tensor& target, const OptionalTensor& weight, bool align_corners, const at::Tensor& value,
    const at::Tensor& normalizer, const at::Tensor& losses, const at::Tensor& lse,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::ArrayRef<double> spacing, double sigma, double p,
    string_view merge, string_view normalize, at::IntArrayRef ignore_index, double label_smoothing,
    string_view reduction) {
  return backward(
      kUpsampledName, grad_value, grad_losses, input, target, weight, align_corners, value, normalizer,
      losses, lse,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction});
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("region_cross_entropy", &region_cross_entropy_cpu);
  m.impl("_region_cross_entropy_backward", &region_cross_entropy_backward_cpu);
  m.impl("region_cross_entropy_upsampled", &region_cross_entropy_upsampled_cpu);
  m.impl("_region_cross_entropy_upsampled_backward", &region_cross_entropy_upsampled_backward_cpu);
}

}  // namespace dynplan
