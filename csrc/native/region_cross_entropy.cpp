#include <pybind11/numpy.h>

#include <cmath>

#include "kernels/region_cross_entropy/cpu.h"
#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

py::tuple region_cross_entropy(const Dense<float>& input, const Dense<int64_t>& target, int kernel_size,
                               double sigma, double p, int64_t ignore_index) {
  if (input.ndim() != 4 || target.ndim() != 3 || target.shape(0) != input.shape(0) ||
      target.shape(1) != input.shape(2) || target.shape(2) != input.shape(3))
    throw py::value_error("region_cross_entropy: expected input (N, C, H, W) and target (N, H, W)");
  if (kernel_size < 1 || kernel_size > 2 * kernels::kRegionMaxRadius + 1 || kernel_size % 2 == 0)
    throw py::value_error("region_cross_entropy: expected kernel_size to be odd and in 1..15, got " +
                          std::to_string(kernel_size));
  if (!(sigma > 0)) throw py::value_error("region_cross_entropy: expected sigma to be positive");
  if (!(p >= 1 && std::isfinite(p)))
    throw py::value_error("region_cross_entropy: expected p to be finite and at least 1");
  if (input.shape(1) == 0 && target.size() > 0)
    throw py::value_error("region_cross_entropy: expected input to have at least 1 class");
  kernels::RegionCrossEntropyParams params;
  params.batch = input.shape(0);
  params.classes = input.shape(1);
  params.input = input.data();
  params.target = target.data();
  params.p = p;
  params.ignored[0] = ignore_index;
  params.num_ignored = 1;
  const int64_t height = input.shape(2), width = input.shape(3);
  const int64_t strides[5] = {params.classes * height * width, height * width, 0, width, 1};
  kernels::RegionCrossEntropyGrad grad;
  for (int i = 0; i < 5; ++i) params.input_stride[i] = grad.grad_input_stride[i] = strides[i];
  params.target_stride[0] = height * width;
  params.target_stride[2] = width;
  params.target_stride[3] = 1;
  params.size[1] = params.anchors[1] = height;
  params.size[2] = params.anchors[2] = width;
  for (int axis = 0; axis < 3; ++axis) {
    params.radius[axis] = axis == 0 ? 0 : kernel_size / 2;
    for (int i = 0; i <= params.radius[axis]; ++i)
      params.axis_weight[axis][i] = std::exp(-0.5 * i * i / (sigma * sigma));
  }
  Dense<float> losses({params.batch, height, width}), lse({params.batch, height, width});
  Dense<float> gradient({params.batch, params.classes, height, width});
  float value = 0;
  double normalizer = 0;
  const float upstream = 1;
  const kernels::RegionCrossEntropyState state{
      .losses = losses.mutable_data(), .lse = lse.mutable_data(), .value = &value, .normalizer = &normalizer};
  grad.grad_value = &upstream;
  grad.grad_input = gradient.mutable_data();
  const auto& table = kernels::region_cross_entropy_kernels(kernels::cpu_isa());
  const kernels::RegionBadLabel bad = table.forward(params, state, kernels::serial);
  if (bad.found)
    throw py::index_error("region_cross_entropy: expected target to be in 0.." +
                          std::to_string(params.classes - 1) + " or an ignored label, got " +
                          std::to_string(bad.value));
  table.backward(params, state, grad, kernels::serial);
  return py::make_tuple(value, losses, gradient);
}

}  // namespace

void bind_region_cross_entropy(py::module_& m) {
  m.def(
      "region_cross_entropy", &region_cross_entropy, py::arg("input").noconvert(),
      py::arg("target").noconvert(), py::arg("kernel_size") = 5, py::arg("sigma") = 1.0, py::arg("p") = 5.0,
      py::arg("ignore_index") = -100,
      "input float32 (N, C, H, W), target int64 (N, H, W) -> value, losses (N, H, W), gradient of the value");
}

}  // namespace dynplan
