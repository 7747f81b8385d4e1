// The CUDA kernels of region_cross_entropy where numbers, pixels or labels run out.
#include <cmath>
#include <utility>
#include <vector>

#include "kernels/region_cross_entropy/cuda/launch.cuh"
#include "tests/check.h"
#include "tests/cuda_emulation/device_buffer.h"

using namespace dynplan::kernels;
using cuda_emulation::DeviceBuffer;

namespace {

bool close(double got, double want, double tolerance) {
  return std::fabs(got - want) <= tolerance;
}

// Windows of 3 x 3 in one image of 4 x 4.
RegionCrossEntropyParams four_by_four(int64_t classes, const float* input, const int64_t* target) {
  RegionCrossEntropyParams p;
  p.batch = 1, p.classes = classes, p.input = input, p.target = target;
  p.axis_weight[0][0] = 1;
  for (int axis = 1; axis < 3; ++axis)
    p.size[axis] = p.anchors[axis] = 4, p.radius[axis] = 1, p.axis_weight[axis][0] = 1,
    p.axis_weight[axis][1] = 0.6;
  p.input_stride[4] = 1, p.input_stride[3] = 4, p.input_stride[1] = 16, p.input_stride[0] = 16 * classes;
  p.target_stride[3] = 1, p.target_stride[2] = 4;
  return p;
}

// What a forward over `anchors` anchors leaves, and a backward from it.
struct Outputs {
  DeviceBuffer<float> losses, lse, value{1};
  DeviceBuffer<double> normalizer{1};

  explicit Outputs(size_t anchors) : losses(anchors), lse(anchors) {}

  RegionCrossEntropyState state() const {
    return {losses.get(), lse.get(), nullptr, value.get(), normalizer.get()};
  }
  cudaError_t forward(const RegionCrossEntropyParams& p) const {
    DeviceBuffer<RegionPartial> partials(region_partials(p));
    return region_cross_entropy_forward<float>(p, state(), partials.get(), nullptr);
  }
  cudaError_t backward(const RegionCrossEntropyParams& p, const float* grad_value, float* grad_input) const {
    RegionCrossEntropyGrad grad;
    grad.grad_value = grad_value, grad.grad_input = grad_input;
    std::copy(p.input_stride, p.input_stride + 5, grad.grad_input_stride);
    return region_cross_entropy_backward<float>(p, state(), grad, 1 << 17, nullptr);
  }
};

// A probability that underflows keeps the gradient of cross-entropy, and no loss scale takes it out of range;
// by count as by weight, where the merged probability is less than any pixel's.
void hopeless_pixels_keep_their_gradient() {
  std::vector<float> logits(32, -500.f);
  std::fill(logits.begin() + 16, logits.end(), 500.f);
  DeviceBuffer<float> input(logits), grad_input(32), grad_value(std::vector<float>{65536.f});
  DeviceBuffer<int64_t> target(std::vector<int64_t>(16, 0));
  const Outputs out(16);
  for (const auto& [smoothing, normalize] : {std::pair{0.0, RegionNormalize::weight},
                                             {0.2, RegionNormalize::weight},
                                             {0.0, RegionNormalize::count}}) {
    RegionCrossEntropyParams p = four_by_four(2, input.get(), target.get());
    p.merge = RegionMerge::probs, p.normalize = normalize;
    p.reduction = RegionReduction::sum, p.label_smoothing = smoothing;
    EXPECT(out.forward(p) == cudaSuccess);
    for (float loss : out.losses.host())
      if (smoothing == 0) EXPECT(close(loss, -std::log(0x1p-126), 1e-4));
    EXPECT(out.backward(p, grad_value.get(), grad_input.get()) == cudaSuccess);
    for (int64_t c = 0; c < 2; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < 16; ++i) sum += grad_input.get()[16 * c + i];
      EXPECT(close(sum, (c == 0 ? -1 : 1) * 16 * 65536 * (1 - smoothing / 2), 16 * 65536 * 1e-5));
    }
  }
}

// No pixel takes its value from these logits.
void no_pixels() {
  DeviceBuffer<float> input(std::vector<float>(12, 1.f)), grad_input(12);
  DeviceBuffer<int64_t> target(0);
  RegionCrossEntropyParams p = four_by_four(2, input.get(), target.get());
  p.size[1] = p.anchors[1] = 0, p.input_size[0] = 2, p.input_size[1] = 3;
  p.input_stride[3] = 3, p.input_stride[1] = 6, p.input_stride[0] = 12;
  const Outputs out(0);
  EXPECT(out.forward(p) == cudaSuccess && out.value.host()[0] == 0 && out.normalizer.host()[0] == 0);
  EXPECT(out.backward(p, nullptr, grad_input.get()) == cudaSuccess);
  EXPECT(grad_input.host() == std::vector<float>(12, 0.f));
}

void bad_labels_assert() {
  for (int64_t bad : {3, -2, 1000000}) {
    DeviceBuffer<float> input(3 * 4 * 4);
    std::vector<int64_t> labels(16, 2);
    labels[9] = bad;
    DeviceBuffer<int64_t> target(labels);
    RegionCrossEntropyParams p = four_by_four(3, input.get(), target.get());
    const Outputs out(16);
    EXPECT(out.forward(p) == cudaErrorAssert);
    p.stride[2] = 2, p.anchors[2] = 2;  // the general kernels
    EXPECT(out.forward(p) == cudaErrorAssert);
  }
}

}  // namespace

int main() {
  cuda_emulation::for_every_schedule([] {
    hopeless_pixels_keep_their_gradient();
    no_pixels();
    bad_labels_assert();
  });
  return dynplan::test::finish("the edges of region_cross_entropy on emulated CUDA");
}
