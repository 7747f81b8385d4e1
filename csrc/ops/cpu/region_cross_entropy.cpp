#include "ops/region_cross_entropy.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <tuple>

#include "tests/region_cross_entropy_naive.h"

namespace dynplan {
namespace {

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalTensor = std::optional<at::Tensor>;

struct Dense {
  at::Tensor input, target, weight;
  kernels::RegionCrossEntropyParams params;
  Dense(const at::Tensor& i, const at::Tensor& t, const OptionalTensor& w, const RegionOptions& o)
      : params(region_cross_entropy_params("region_cross_entropy", i, t, w, {}, o)) {
    input = i.to(at::kDouble).contiguous();
    target = t.to(at::kLong).contiguous();
    params.input = input.data_ptr();
    params.target = target.data_ptr();
    if (w) params.class_weight = (weight = w->to(at::kDouble).contiguous()).data_ptr();
  }
};

Outputs region_cross_entropy_cpu(const at::Tensor& input, const at::Tensor& target,
                                 const OptionalTensor& weight, at::IntArrayRef kernel_size,
                                 at::IntArrayRef stride, at::ArrayRef<double> spacing, double sigma, double p,
                                 c10::string_view merge, c10::string_view normalize,
                                 at::IntArrayRef ignore_index, double label_smoothing,
                                 c10::string_view reduction, bool agreement) {
  Dense dense(
      input, target, weight,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction});
  auto naive = kernels::NaiveRegion<double>(dense.params).run(1);
  auto out = region_cross_entropy_outputs(dense.params, input, target, agreement);
  out.value.fill_(naive.value);
  out.normalizer.fill_(naive.normalizer);
  out.losses.copy_(at::from_blob(naive.losses.data(), out.losses.sizes(), at::kDouble));
  out.lse.copy_(at::from_blob(naive.lse.data(), out.lse.sizes(), at::kDouble));
  if (agreement) out.agreement.copy_(at::from_blob(naive.agreement.data(), out.losses.sizes(), at::kInt));
  return {out.value, out.normalizer, out.losses, out.lse, out.agreement};
}

at::Tensor region_cross_entropy_backward_cpu(
    const OptionalTensor& grad_value, const OptionalTensor& grad_losses, const at::Tensor& input,
    const at::Tensor& target, const OptionalTensor& weight, const at::Tensor& value,
    const at::Tensor& normalizer, const at::Tensor& losses, const at::Tensor& lse,
    at::IntArrayRef kernel_size, at::IntArrayRef stride, at::ArrayRef<double> spacing, double sigma, double p,
    c10::string_view merge, c10::string_view normalize, at::IntArrayRef ignore_index, double label_smoothing,
    c10::string_view reduction) {
  Dense dense(
      input, target, weight,
      {kernel_size, stride, spacing, sigma, p, merge, normalize, ignore_index, label_smoothing, reduction});
  TORCH_CHECK(!grad_losses);
  auto naive = kernels::NaiveRegion<double>(dense.params).run(grad_value->item<double>());
  at::Tensor grad = at::empty_like(input);
  grad.copy_(at::from_blob(naive.grad_input.data(), input.sizes(), at::kDouble));
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("region_cross_entropy", &region_cross_entropy_cpu);
  m.impl("_region_cross_entropy_backward", &region_cross_entropy_backward_cpu);
}

}  // namespace dynplan
