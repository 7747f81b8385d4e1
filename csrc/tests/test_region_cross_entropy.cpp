#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "kernels/region_cross_entropy/cpu.h"
#include "tests/check.h"
#include "tests/region_cross_entropy_naive.h"
#include "tests/threads.h"

using namespace dynplan::kernels;

namespace {

struct Case {
  int64_t batch = 2, classes = 5, size[3] = {1, 9, 37}, stride[3] = {1, 1, 1};
  int radius[3] = {0, 2, 2};
  double p = 5, smoothing = 0;
  RegionMerge merge = RegionMerge::logits;
  RegionNormalize normalize = RegionNormalize::weight;
  int64_t object = 0;   // planes, rows and columns of one label; 0: short runs along rows, some ignored
  int64_t ignored = 0;  // rows from one that is ignored to the next
};

bool close(double a, double b, double tolerance) {
  return std::abs(a - b) <= tolerance * (1 + std::abs(b));
}

template <class T>
void against_naive(const Case& c, CpuIsa isa, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<T> normal;
  const int64_t pixels = c.size[0] * c.size[1] * c.size[2];
  std::vector<T> input(c.batch * c.classes * pixels), weight(c.classes);
  for (T& x : input) x = 2 * normal(random);
  for (T& w : weight) w = static_cast<T>(0.5 + random() % 4);
  std::vector<int64_t> target(c.batch * pixels);
  int64_t run = 0;
  for (int64_t& y : target) {  // runs of one label, some ignored
    if (random() % 6 == 0) run = static_cast<int64_t>(random() % 3) - (random() % 10 == 0 ? 100 : 0);
    y = run < 0 ? -100 : run % c.classes;
    const int64_t i = &y - target.data(), row = i / c.size[2] % c.size[1], column = i % c.size[2];
    const int64_t plane = i / (c.size[1] * c.size[2]) % c.size[0];
    if (c.object > 0) y = (plane / c.object + row / c.object + column / c.object) % c.classes;
    if (c.ignored > 0 && row % c.ignored == 0) y = -100;
  }

  RegionCrossEntropyParams params;
  params.batch = c.batch;
  params.classes = c.classes;
  params.p = c.p;
  params.label_smoothing = c.smoothing;
  params.merge = c.merge;
  params.normalize = c.normalize;
  params.logit = sizeof(T) == 8 ? RegionDtype::f64 : RegionDtype::f32;
  params.input = input.data();
  params.target = target.data();
  params.class_weight = weight.data();
  params.ignored[0] = -100;
  params.num_ignored = 1;
  int64_t anchors = c.batch, step = 1;
  for (int axis = 2; axis >= 0; --axis) {
    params.size[axis] = c.size[axis];
    params.stride[axis] = c.stride[axis];
    params.radius[axis] = c.radius[axis];
    params.anchors[axis] = (c.size[axis] + c.stride[axis] - 1) / c.stride[axis];
    anchors *= params.anchors[axis];
    params.input_stride[2 + axis] = params.target_stride[1 + axis] = step;
    step *= c.size[axis];
    for (int i = 0; i <= c.radius[axis]; ++i) params.axis_weight[axis][i] = std::exp(-0.5 * i * i);
  }
  params.input_stride[1] = pixels;
  params.input_stride[0] = c.classes * pixels;
  params.target_stride[0] = pixels;

  const NaiveRegionLoss expected = NaiveRegion<T>(params).run(2.0);

  // Outputs start as NaN, so that an element nobody writes is seen.
  const T poison = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> losses(anchors, poison), gradient(input.size(), poison);
  std::vector<T> lse(c.merge == RegionMerge::probs ? c.batch * pixels : anchors, poison);
  std::vector<int16_t> agreement(anchors, -1);
  T value = poison;
  double normalizer = -1;
  const RegionCrossEntropyState state{losses.data(), lse.data(), agreement.data(), &value, &normalizer};
  const RegionCrossEntropyKernels& kernels = region_cross_entropy_kernels(isa);
  EXPECT(!kernels.forward(params, state, dynplan::test::threads).found);
  const double tolerance = sizeof(T) == 8 ? 1e-12 : 1e-5;
  EXPECT(close(value, expected.value, tolerance));
  EXPECT(close(normalizer, expected.normalizer, 1e-12));
  bool same = true;
  for (int64_t i = 0; i < anchors; ++i)
    same = same && close(losses[i], expected.losses[i], tolerance) && agreement[i] == expected.agreement[i];
  EXPECT(same);

  const T upstream = 2;
  RegionCrossEntropyGrad grad;
  grad.grad_value = &upstream;
  grad.grad_input = gradient.data();
  std::memcpy(grad.grad_input_stride, params.input_stride, sizeof params.input_stride);
  kernels.backward(params, state, grad, dynplan::test::threads);
  same = true;
  for (size_t i = 0; i < gradient.size(); ++i)
    same = same && std::abs(gradient[i] - expected.grad_input[i]) <= tolerance;
  EXPECT(same);

  std::vector<T> again(gradient.size(), poison);
  grad.grad_input = again.data();
  kernels.backward(params, state, grad, serial);
  EXPECT(gradient.empty() || std::memcmp(again.data(), gradient.data(), gradient.size() * sizeof(T)) == 0);

  // Both at once, up to a factor.
  std::vector<T> both(gradient.size(), poison);
  grad.grad_value = nullptr;
  grad.grad_input = both.data();
  RegionBadLabel bad;
  value = poison;
  const double factor = upstream * kernels.loss_and_gradient(params, state, grad, bad, dynplan::test::threads);
  EXPECT(!bad.found && close(value, expected.value, tolerance));
  same = true;
  for (size_t i = 0; i < both.size(); ++i)
    same = same && std::abs(factor * both[i] - expected.grad_input[i]) <= tolerance;
  EXPECT(same);
}

}  // namespace

int main() {
  std::vector<Case> cases(1);
  for (int radius : {0, 1, 3, 7}) {
    Case c;
    c.radius[1] = c.radius[2] = radius;
    c.classes = 7 + radius;
    cases.push_back(c);
    c.merge = RegionMerge::probs;
    cases.push_back(c);
    c.smoothing = 0.1;
    cases.push_back(c);
  }
  Case c;
  c.stride[1] = 2;
  c.stride[2] = 3;
  c.normalize = RegionNormalize::count;
  c.smoothing = 0.2;
  c.p = 1;
  cases.push_back(c);
  c.merge = RegionMerge::probs;
  cases.push_back(c);
  c.smoothing = 0;
  cases.push_back(c);
  Case volume{.classes = 3, .size = {6, 7, 40}, .radius = {1, 1, 1}, .p = 2.5};
  cases.push_back(volume);
  volume.radius[0] = 2;  // not one radius for all axes
  volume.stride[0] = 2;
  cases.push_back(volume);
  volume.merge = RegionMerge::probs;
  volume.smoothing = 0.3;
  cases.push_back(volume);
  cases.push_back(Case{.batch = 1, .classes = 2, .size = {1, 110, 150}});  // several units of work
  for (int radius : {3, 5, 7}) {  // windows of one label and of two, beside those of many
    cases.push_back(Case{.batch = 1, .classes = 2, .size = {1, 13, 230}, .radius = {0, radius, radius}});
    cases.push_back(Case{.size = {1, 41, 70}, .radius = {0, radius, radius}, .object = 19});
  }
  cases.push_back(Case{.size = {5, 21, 30}, .radius = {1, 1, 1}, .object = 9});
  cases.push_back(Case{.size = {6, 21, 30}, .radius = {1, 1, 1}, .object = 5});
  for (int64_t ignored : {1, 2, 5})
    cases.push_back(Case{.size = {1, 41, 70}, .object = 11, .ignored = ignored});
  for (int64_t classes : {9, 30})  // scattered
    for (int radius : {2, 4})
      cases.push_back(Case{.batch = 1,
                           .classes = classes,
                           .size = {1, 90, 120},
                           .radius = {0, radius, 4},
                           .object = 1,
                           .ignored = 7});
  cases.push_back(Case{.size = {1, 1, 1}, .radius = {0, 7, 7}});
  cases.push_back(Case{.batch = 0});
  for (int64_t axis = 0; axis < 3; ++axis)  // no pixels
    for (const RegionMerge merge : {RegionMerge::logits, RegionMerge::probs})
      for (const double smoothing : {0.0, 0.1})
        for (const int radius : {0, 2}) {
          Case none{.radius = {0, radius, radius}, .smoothing = smoothing, .merge = merge};
          if (axis == 0) none.radius[0] = radius;
          none.size[axis] = 0;
          cases.push_back(none);
        }

  unsigned seed = 0;
  for (const Case& each : cases)
    for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512})
      if (isa <= best_cpu_isa()) {
        against_naive<float>(each, isa, ++seed);
        against_naive<double>(each, isa, seed);
      }
  return dynplan::test::finish("region_cross_entropy");
}
