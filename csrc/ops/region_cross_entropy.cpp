#include "ops/region_cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace dynplan {
namespace {

using kernels::RegionCrossEntropyParams;

at::ScalarType accumulation_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

kernels::RegionDtype logit_type(const char* op, const at::Tensor& input) {
  switch (input.scalar_type()) {
    case at::kFloat:
      return kernels::RegionDtype::f32;
    case at::kDouble:
      return kernels::RegionDtype::f64;
    case at::kBFloat16:
      return kernels::RegionDtype::bf16;
    case at::kHalf:
      return kernels::RegionDtype::f16;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false, op, ": expected input to be float32, float64, bfloat16 or float16, got ",
                   input.scalar_type());
}

kernels::RegionLabel label_type(const char* op, const at::Tensor& target) {
  switch (target.scalar_type()) {
    case at::kByte:
      return kernels::RegionLabel::u8;
    case at::kChar:
      return kernels::RegionLabel::i8;
    case at::kShort:
      return kernels::RegionLabel::i16;
    case at::kInt:
      return kernels::RegionLabel::i32;
    case at::kLong:
      return kernels::RegionLabel::i64;
    default:
      break;
  }
  TORCH_CHECK_TYPE(false, op, ": expected target to be integer, got ", target.scalar_type());
}

// Index of `value` among two allowed words.
int choice(const char* op, const char* argument, std::string_view value, const char* first,
           const char* second) {
  TORCH_CHECK_VALUE(value == first || value == second, op, ": expected ", argument, " to be '", first,
                    "' or '", second, "', got '", std::string(value), "'");
  return value == second;
}

void check_tensors(const char* op, const at::Tensor& input, const at::Tensor& target,
                   const std::optional<at::Tensor>& weight, bool upsampled) {
  const int64_t axes = input.dim() - 2;
  if (upsampled) {
    TORCH_CHECK_VALUE(axes == 2, op, ": expected input to have shape (N, C, h, w), got ", input.sizes());
  } else {
    TORCH_CHECK_VALUE(axes >= 1 && axes <= 3, op,
                      ": expected input to have shape (N, C, *spatial) with 1 to 3 spatial axes, got ",
                      input.sizes());
  }
  bool fits = target.dim() == axes + 1 && target.size(0) == input.size(0);
  for (int64_t axis = 1; fits && !upsampled && axis <= axes; ++axis)
    fits = target.size(axis) == input.size(axis + 1);
  TORCH_CHECK_VALUE(fits, op, ": expected target to have shape ", upsampled ? "(N, H, W)" : "(N, *spatial)",
                    " for input ", input.sizes(), ", got ", target.sizes());
  TORCH_CHECK_VALUE(input.size(1) > 0 || target.numel() == 0, op,
                    ": expected input to have at least 1 class, got ", input.sizes());
  TORCH_CHECK_VALUE(input.size(1) <= std::numeric_limits<int32_t>::max(), op,
                    ": expected input to have fewer than 2^31 classes, got ", input.size(1));
  TORCH_CHECK_VALUE(target.device() == input.device(), op, ": expected target on ", input.device(), ", got ",
                    target.device());
  if (!weight) return;
  TORCH_CHECK_VALUE(weight->dim() == 1 && weight->size(0) == input.size(1), op,
                    ": expected weight to have shape [", input.size(1), "], got ", weight->sizes());
  TORCH_CHECK_TYPE(weight->scalar_type() == accumulation_type(input), op, ": expected weight to be ",
                   accumulation_type(input), " for input of ", input.scalar_type(), ", got ",
                   weight->scalar_type());
  TORCH_CHECK_VALUE(weight->device() == input.device(), op, ": expected weight on ", input.device(), ", got ",
                    weight->device());
}

void check_scalars(const char* op, const RegionOptions& o, int64_t axes) {
  const auto per_axis = [&](const char* argument, int64_t length) {
    TORCH_CHECK_VALUE(length == axes, op, ": expected ", argument, " to have one value per spatial axis (",
                      axes, "), got ", length);
  };
  per_axis("kernel_size", o.kernel_size.size());
  per_axis("stride", o.stride.size());
  per_axis("spacing", o.spacing.size());
  for (int64_t axis = 0; axis < axes; ++axis) {
    const int64_t k = o.kernel_size[axis];
    TORCH_CHECK_VALUE(k >= 1 && k <= 2 * kernels::kRegionMaxRadius + 1 && k % 2 == 1, op,
                      ": expected kernel_size to be odd and in 1..15, got ", k);
    TORCH_CHECK_VALUE(o.stride[axis] >= 1, op, ": expected stride to be at least 1, got ", o.stride[axis]);
    TORCH_CHECK_VALUE(o.spacing[axis] > 0 && std::isfinite(o.spacing[axis]), op,
                      ": expected spacing to be positive, got ", o.spacing[axis]);
  }
  TORCH_CHECK_VALUE(o.sigma > 0, op, ": expected sigma to be positive, got ", o.sigma);
  TORCH_CHECK_VALUE(o.p >= 1 && std::isfinite(o.p), op, ": expected p to be finite and at least 1, got ", o.p);
  TORCH_CHECK_VALUE(o.label_smoothing >= 0 && o.label_smoothing <= 1, op,
                    ": expected label_smoothing to be in 0..1, got ", o.label_smoothing);
  TORCH_CHECK_VALUE(o.ignore_index.size() <= kernels::kRegionMaxIgnored, op,
                    ": expected ignore_index to hold at most ", kernels::kRegionMaxIgnored, " values, got ",
                    o.ignore_index.size());
}

}  // namespace

RegionCrossEntropyParams region_cross_entropy_params(const char* op, const at::Tensor& input,
                                                     const at::Tensor& target,
                                                     const std::optional<at::Tensor>& weight,
                                                     std::optional<bool> align_corners,
                                                     const RegionOptions& o) {
  RegionCrossEntropyParams params;
  params.logit = logit_type(op, input);
  params.label = label_type(op, target);
  check_tensors(op, input, target, weight, align_corners.has_value());
  const int64_t axes = input.dim() - 2;
  check_scalars(op, o, axes);
  params.merge = static_cast<kernels::RegionMerge>(choice(op, "merge", o.merge, "logits", "probs"));
  params.normalize =
      static_cast<kernels::RegionNormalize>(choice(op, "normalize", o.normalize, "weight", "count"));
  params.reduction =
      static_cast<kernels::RegionReduction>(choice(op, "reduction", o.reduction, "mean", "sum"));
  TORCH_CHECK_VALUE(params.reduction == kernels::RegionReduction::mean || o.p == 1, op,
                    ": expected p to be 1 with reduction 'sum', got ", o.p);

  params.batch = input.size(0);
  params.classes = input.size(1);
  params.input = input.const_data_ptr();
  params.target = target.const_data_ptr();
  params.input_stride[0] = input.stride(0);
  params.input_stride[1] = input.stride(1);
  params.target_stride[0] = target.stride(0);
  for (int64_t axis = 0; axis < axes; ++axis) {
    const int64_t space = 3 - axes + axis;  // missing leading axes keep size 1 and radius 0
    params.size[space] = target.size(axis + 1);
    params.input_stride[2 + space] = input.stride(axis + 2);
    params.target_stride[1 + space] = target.stride(axis + 1);
    params.radius[space] = static_cast<int>(o.kernel_size[axis] / 2);
    // Any stride beyond the last pixel leaves one anchor; one as large as integers are would overflow.
    params.stride[space] = std::min(o.stride[axis], std::max<int64_t>(params.size[space], 1));
    params.anchors[space] = (params.size[space] + params.stride[space] - 1) / params.stride[space];
  }
  for (int axis = 0; axis < 3; ++axis) {
    const double spacing = axis < 3 - axes ? 1.0 : o.spacing[axis - (3 - axes)];
    for (int offset = 0; offset <= params.radius[axis]; ++offset) {
      const double distance = offset * spacing / o.sigma;
      params.axis_weight[axis][offset] = std::exp(-0.5 * distance * distance);
    }
  }
  params.p = o.p;
  params.label_smoothing = o.label_smoothing;
  params.num_ignored = static_cast<int>(o.ignore_index.size());
  std::copy(o.ignore_index.begin(), o.ignore_index.end(), params.ignored);
  if (align_corners) {
    params.input_size[0] = input.size(2);
    params.input_size[1] = input.size(3);
    params.align_corners = *align_corners;
    TORCH_CHECK_VALUE((params.input_size[0] > 0 && params.input_size[1] > 0) || target.numel() == 0, op,
                      ": expected input to have a pixel, got ", input.sizes());
  }
  return params;
}

RegionOutputs region_cross_entropy_outputs(const RegionCrossEntropyParams& params, const at::Tensor& input,
                                           const at::Tensor& target, bool agreement) {
  const auto shape = [&](const int64_t* space) {
    std::vector<int64_t> sizes{params.batch};
    sizes.insert(sizes.end(), space + 3 - (target.dim() - 1), space + 3);
    return sizes;
  };
  const auto acc = input.options().dtype(accumulation_type(input));
  const std::vector<int64_t> anchors = shape(params.anchors);
  return {.value = at::empty({}, acc),
          .normalizer = at::empty({}, input.options().dtype(at::kDouble)),
          .losses = at::empty(anchors, acc),
          .lse = at::empty(params.merge == kernels::RegionMerge::probs ? shape(params.size) : anchors, acc),
          .agreement =
              at::empty(agreement ? anchors : std::vector<int64_t>{0}, input.options().dtype(at::kShort))};
}

kernels::RegionCrossEntropyGrad region_cross_entropy_grad(
    const char* op, const RegionCrossEntropyParams& params, const std::optional<at::Tensor>& grad_value,
    const std::optional<at::Tensor>& grad_losses, const at::Tensor& input, const at::Tensor& value,
    const at::Tensor& normalizer, const at::Tensor& losses, const at::Tensor& lse) {
  const at::ScalarType acc = accumulation_type(input);
  const auto check = [&](const char* argument, const at::Tensor& tensor, at::ScalarType type,
                         int64_t elements) {
    TORCH_CHECK_VALUE(
        tensor.scalar_type() == type && tensor.numel() == elements && tensor.device() == input.device(), op,
        ": expected ", argument, " to be ", type, " with ", elements, " elements on ", input.device(),
        ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
  };
  const auto count = [&](const int64_t* space) { return params.batch * space[0] * space[1] * space[2]; };
  const int64_t anchors = count(params.anchors);
  check("value", value, acc, 1);
  check("normalizer", normalizer, at::kDouble, 1);
  check("losses", losses, acc, anchors);
  check("lse", lse, acc, params.merge == kernels::RegionMerge::probs ? count(params.size) : anchors);
  TORCH_CHECK_VALUE(losses.is_contiguous() && lse.is_contiguous(), op,
                    ": expected losses and lse to be contiguous, as the forward gives them");
  kernels::RegionCrossEntropyGrad grad;
  if (grad_value) {
    check("grad_value", *grad_value, acc, 1);
    grad.grad_value = grad_value->const_data_ptr();
  }
  if (grad_losses) {
    check("grad_losses", *grad_losses, acc, anchors);
    TORCH_CHECK_VALUE(grad_losses->dim() == losses.dim(), op, ": expected grad_losses to have shape ",
                      losses.sizes(), ", got ", grad_losses->sizes());
    grad.grad_losses = grad_losses->const_data_ptr();
    const int64_t axes = grad_losses->dim() - 1;
    grad.grad_losses_stride[0] = grad_losses->stride(0);
    for (int64_t axis = 0; axis < axes; ++axis)
      grad.grad_losses_stride[4 - axes + axis] = grad_losses->stride(axis + 1);
  }
  return grad;
}

#define REGION_OPTIONS                                                                                 \
  "int[] kernel_size, int[] stride, float[] spacing, float sigma, float p, str merge, str normalize, " \
  "int[] ignore_index, float label_smoothing, str reduction"
#define REGION_INPUTS "Tensor input, Tensor target, Tensor? weight, "
#define REGION_STATE "Tensor value, Tensor normalizer, Tensor losses, Tensor lse"

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  const auto def = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };
  def("region_cross_entropy(" REGION_INPUTS "bool? align_corners, " REGION_OPTIONS
      ", bool agreement) -> (" REGION_STATE ", Tensor agreement)");
  def("_region_cross_entropy_backward(Tensor? grad_value, Tensor? grad_losses, " REGION_INPUTS
      "bool? align_corners, " REGION_STATE ", " REGION_OPTIONS ") -> Tensor");
  def("_region_cross_entropy_loss_and_gradient(" REGION_INPUTS REGION_OPTIONS ") -> (" REGION_STATE
      ", Tensor grad_input)");
}

}  // namespace dynplan
