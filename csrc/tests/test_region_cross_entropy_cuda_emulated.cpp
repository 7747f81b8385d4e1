#include <cmath>
#include <random>
#include <vector>

#include "kernels/region_cross_entropy/cuda/launch.cuh"
#include "tests/check.h"
#include "tests/cuda_emulation/device_buffer.h"
#include "tests/region_cross_entropy_naive.h"

using namespace dynplan::kernels;
using cuda_emulation::DeviceBuffer;

namespace {

enum class Layout { dense, channels_last, sliced };

// One problem: shape, options, and how the labels lie.
struct Case {
  int64_t batch = 1, classes = 3;
  int64_t size[3] = {1, 9, 11};
  int window[3] = {1, 5, 5};
  int64_t stride[3] = {1, 1, 1};
  double sigma = 1, spacing[3] = {1, 1, 1};
  double p = 5, smoothing = 0;
  bool probs = false, by_count = false, sum = false, weighted = false, grad_losses = false;
  double void_share = 0.1;
  int64_t block = 4;  // labels come in blocks of this size
  Layout layout = Layout::dense;
  int64_t low[2] = {0, 0};
  bool align_corners = false;
  double magnitude = 3;             // of the logits
  size_t most_shared = 163 * 1024;  // bytes that the chip gives a block
};

template <typename T>
double tolerance() {
  return std::is_same_v<T, double>   ? 1e-11
         : std::is_same_v<T, float>  ? 1e-5
         : std::is_same_v<T, __half> ? 6e-4
                                     : 5e-3;
}

template <typename T>
constexpr RegionDtype kLogit = std::is_same_v<T, double>   ? RegionDtype::f64
                               : std::is_same_v<T, float>  ? RegionDtype::f32
                               : std::is_same_v<T, __half> ? RegionDtype::f16
                                                           : RegionDtype::bf16;
template <typename L>
constexpr RegionLabel kLabel = std::is_same_v<L, uint8_t>   ? RegionLabel::u8
                               : std::is_same_v<L, int8_t>  ? RegionLabel::i8
                               : std::is_same_v<L, int16_t> ? RegionLabel::i16
                               : std::is_same_v<L, int32_t> ? RegionLabel::i32
                                                            : RegionLabel::i64;

void expect_close(double got, double want, double scale, double tolerance, const char* what) {
  if (!(std::fabs(got - want) <= tolerance * scale)) {
    if (dynplan::test::failures < 20) std::fprintf(stderr, "%s: got %.9g, want %.9g\n", what, got, want);
    ++dynplan::test::failures;
  }
}

double largest_of(const std::vector<double>& values) {
  double largest = 1e-30;
  for (double v : values) largest = std::max(largest, std::fabs(v));
  return largest;
}

// The share of low-resolution element `element` in full-resolution coordinate `at`.
double share(int64_t element, int64_t at, int64_t low, int64_t full, bool align_corners) {
  double source = align_corners ? (full > 1 ? at * double(low - 1) / double(full - 1) : 0)
                                : std::max((at + 0.5) * double(low) / double(full) - 0.5, 0.0);
  source = std::min(source, double(low - 1));
  return std::max(0.0, 1 - std::fabs(source - double(element)));
}

template <typename T, typename L>
class Problem {
  using Acc = Wide<T>;

 public:
  Problem(const Case& c, unsigned seed) : c_(c), random_(seed) {
    p_.batch = c.batch, p_.classes = c.classes;
    for (int axis = 0; axis < 3; ++axis) {
      p_.size[axis] = c.size[axis];
      p_.radius[axis] = c.window[axis] / 2;
      p_.stride[axis] = c.stride[axis];
      p_.anchors[axis] = ceil_div(c.size[axis], c.stride[axis]);
      for (int offset = 0; offset <= p_.radius[axis]; ++offset)
        p_.axis_weight[axis][offset] = std::exp(-0.5 * std::pow(offset * c.spacing[axis] / c.sigma, 2));
    }
    p_.p = c.p, p_.label_smoothing = c.smoothing;
    p_.merge = c.probs ? RegionMerge::probs : RegionMerge::logits;
    p_.normalize = c.by_count ? RegionNormalize::count : RegionNormalize::weight;
    p_.reduction = c.sum ? RegionReduction::sum : RegionReduction::mean;
    p_.num_ignored = 2, p_.ignored[0] = 100, p_.ignored[1] = -1;
    make_labels();
    make_logits();
  }

  void run() {
    const std::vector<double> full = full_resolution();
    const double grad_value = 0.7;
    std::vector<double> grad_losses(region_anchors(p_));
    for (double& g : grad_losses) g = c_.grad_losses ? uniform() - 0.5 : 0;
    std::vector<double> class_weight(c_.classes, 1.0);
    for (double& w : class_weight)
      if (c_.weighted) w = static_cast<float>(0.5 + uniform());

    RegionCrossEntropyParams naive = p_;
    naive.input = full.data(), naive.target = labels_.data();
    naive.class_weight = c_.weighted ? class_weight.data() : nullptr;
    const NaiveRegionLoss want = NaiveRegion<double>(naive).run(grad_value, grad_losses.data());
    const std::vector<double> want_grad = low_resolution(want.grad_input);

    // The device's copies; strides as the layout has them.
    const int64_t extent[3] = {c_.size[0], c_.low[0] ? c_.low[0] : c_.size[1],
                               c_.low[0] ? c_.low[1] : c_.size[2]};
    const int64_t pitch = extent[2] + (c_.layout == Layout::sliced ? 3 : 0);
    int64_t* s = p_.input_stride;
    s[4] = 1, s[3] = pitch, s[2] = extent[1] * pitch, s[1] = extent[0] * s[2], s[0] = c_.classes * s[1];
    if (c_.layout == Layout::channels_last)
      s[1] = 1, s[4] = c_.classes, s[3] = extent[2] * s[4], s[2] = extent[1] * s[3], s[0] = extent[0] * s[2];
    const int64_t storage = c_.batch * s[0];
    DeviceBuffer<T> input(storage), grad_input(storage);
    for_each_element(
        extent, [&](int64_t dense, int64_t strided) { input.get()[strided] = narrow<T>(logits_[dense]); });
    std::vector<L> labels(labels_.begin(), labels_.end());
    DeviceBuffer<L> target(labels);
    DeviceBuffer<Acc> weight(std::vector<Acc>(class_weight.begin(), class_weight.end()));
    const int64_t anchors = region_anchors(p_);
    DeviceBuffer<Acc> losses(anchors), lse(c_.probs ? region_pixels(p_) : anchors), value(1);
    DeviceBuffer<Acc> device_grad_losses(std::vector<Acc>(grad_losses.begin(), grad_losses.end()));
    DeviceBuffer<Acc> device_grad_value(std::vector<Acc>{static_cast<Acc>(grad_value)});
    DeviceBuffer<int16_t> agreement(anchors);
    DeviceBuffer<double> normalizer(1);
    p_.input = input.get(), p_.logit = kLogit<T>, p_.target = target.get(), p_.label = kLabel<L>;
    p_.class_weight = c_.weighted ? weight.get() : nullptr;
    p_.target_stride[3] = 1, p_.target_stride[2] = c_.size[2], p_.target_stride[1] = c_.size[1] * c_.size[2];
    p_.target_stride[0] = c_.size[0] * p_.target_stride[1];
    p_.input_size[0] = c_.low[0], p_.input_size[1] = c_.low[1], p_.align_corners = c_.align_corners;

    DeviceBuffer<RegionPartial> partials(region_partials(p_));
    const RegionCrossEntropyState state{losses.get(), lse.get(), agreement.get(), value.get(),
                                        normalizer.get()};
    EXPECT(region_cross_entropy_forward<T>(p_, state, partials.get(), nullptr) == cudaSuccess);
    RegionCrossEntropyGrad grad;
    grad.grad_value = device_grad_value.get();
    grad.grad_losses = c_.grad_losses ? device_grad_losses.get() : nullptr;
    grad.grad_losses_stride[3] = 1, grad.grad_losses_stride[2] = p_.anchors[2];
    grad.grad_losses_stride[1] = p_.anchors[1] * p_.anchors[2];
    grad.grad_losses_stride[0] = p_.anchors[0] * grad.grad_losses_stride[1];
    grad.grad_input = grad_input.get();
    std::copy(p_.input_stride, p_.input_stride + 5, grad.grad_input_stride);
    EXPECT(region_cross_entropy_backward<T>(p_, state, grad, c_.most_shared, nullptr) == cudaSuccess);

    // Losses, lse and value are fp32 whatever the logits are; only the gradient is rounded to their type.
    const double acc = tolerance<Acc>(), scale = 1 + c_.magnitude;
    expect_close(value.get()[0], want.value, std::max(want.value, 1e-3), 10 * acc, "value");
    expect_close(normalizer.get()[0], want.normalizer, std::max(want.normalizer, 1.0), 1e-6, "normalizer");
    for (int64_t i = 0; i < anchors; ++i) {
      expect_close(losses.get()[i], want.losses[i], scale, acc, "loss");
      EXPECT(agreement.get()[i] == want.agreement[i]);
    }
    for (size_t i = 0; i < lse.size(); ++i) expect_close(lse.get()[i], want.lse[i], scale, acc, "lse");
    const double largest = largest_of(want_grad);
    for_each_element(extent, [&](int64_t dense, int64_t strided) {
      expect_close(widen(grad_input.get()[strided]), want_grad[dense], largest, 3 * acc + tolerance<T>(),
                   "grad");
    });
  }

 private:
  double uniform() { return std::uniform_real_distribution<>()(random_); }

  void make_labels() {
    std::vector<int64_t> blocks(4096);
    for (int64_t& label : blocks) label = static_cast<int64_t>(random_() % c_.classes);
    for (int64_t n = 0; n < c_.batch; ++n)
      for (int64_t d = 0; d < c_.size[0]; ++d)
        for (int64_t h = 0; h < c_.size[1]; ++h)
          for (int64_t w = 0; w < c_.size[2]; ++w) {
            const int64_t block = (n * 31 + d / c_.block * 17 + h / c_.block * 7 + w / c_.block) % 4096;
            const bool ignored = uniform() < c_.void_share;
            labels_.push_back(ignored ? (std::is_same_v<L, int8_t> ? -1 : 100) : blocks[block]);
          }
  }

  void make_logits() {
    const int64_t plane = c_.low[0] ? c_.low[0] * c_.low[1] : c_.size[0] * c_.size[1] * c_.size[2];
    logits_.resize(c_.batch * c_.classes * plane);
    for (double& x : logits_) x = widen(narrow<T>(std::normal_distribution<>(0, c_.magnitude)(random_)));
  }

  template <typename Visit>
  void for_each_element(const int64_t* extent, Visit visit) const {
    int64_t dense = 0;
    for (int64_t n = 0; n < c_.batch; ++n)
      for (int64_t c = 0; c < c_.classes; ++c)
        for (int64_t d = 0; d < extent[0]; ++d)
          for (int64_t h = 0; h < extent[1]; ++h)
            for (int64_t w = 0; w < extent[2]; ++w) {
              const int64_t* s = p_.input_stride;
              visit(dense++, n * s[0] + c * s[1] + d * s[2] + h * s[3] + w * s[4]);
            }
  }

  // Calls visit(index in full, index in low, weight) for every pair that touches.
  template <typename Visit>
  void for_each_share(Visit visit) const {
    for (int64_t plane = 0; plane < c_.batch * c_.classes; ++plane)
      for (int64_t h = 0; h < c_.size[1]; ++h)
        for (int64_t w = 0; w < c_.size[2]; ++w)
          for (int64_t y = 0; y < c_.low[0]; ++y)
            for (int64_t x = 0; x < c_.low[1]; ++x)
              visit((plane * c_.size[1] + h) * c_.size[2] + w, (plane * c_.low[0] + y) * c_.low[1] + x,
                    share(y, h, c_.low[0], c_.size[1], c_.align_corners) *
                        share(x, w, c_.low[1], c_.size[2], c_.align_corners));
  }

  std::vector<double> full_resolution() const {
    if (c_.low[0] == 0) return logits_;
    std::vector<double> full(c_.batch * c_.classes * c_.size[1] * c_.size[2], 0.0);
    for_each_share(
        [&](int64_t pixel, int64_t element, double weight) { full[pixel] += weight * logits_[element]; });
    return full;
  }

  std::vector<double> low_resolution(const std::vector<double>& grad) const {
    if (c_.low[0] == 0) return grad;
    std::vector<double> low(logits_.size(), 0.0);
    for_each_share(
        [&](int64_t pixel, int64_t element, double weight) { low[element] += weight * grad[pixel]; });
    return low;
  }

  Case c_;
  std::mt19937 random_;
  RegionCrossEntropyParams p_;
  std::vector<int64_t> labels_;
  std::vector<double> logits_;
};

template <typename T, typename L = int64_t>
void check(const Case& c) {
  Problem<T, L>(c, /*seed=*/1).run();
}

void tiled_cases() {
  for (int window : {3, 5, 7}) {
    // Two tiles, odd borders, warps of one label and of several.
    Case c{.size = {1, 37, 70}, .window = {1, window, window}, .void_share = 0.0005, .block = 66};
    check<float>(c);
    check<__nv_bfloat16, uint8_t>(c);
    c.size[2] = 71;  // rows of odd length
    c.batch = 2, c.block = 4, c.void_share = 0.1;
    check<__half, int16_t>(c);
    c.smoothing = 0.2, c.weighted = true, c.grad_losses = true, c.by_count = true;
    check<float, int32_t>(c);
  }
  check<float>({.size = {1, 33, 66}, .p = 1, .sum = true, .grad_losses = true, .block = 100});
  check<float>({.size = {1, 20, 24}, .p = 2.5, .void_share = 1.0});  // nothing valid
  check<float, int8_t>(
      {.size = {1, 20, 24}, .p = 1, .layout = Layout::sliced, .magnitude = 40});  // 2^60 apart
  check<float>({.classes = 1, .size = {1, 5, 6}});
  check<float>({.size = {1, 2, 1}, .window = {1, 7, 7}});  // a window larger than the image
  check<float>({.size = {1, 12, 12}, .sigma = INFINITY, .void_share = 0, .block = 100});
}

void general_cases() {
  check<double>({.size = {1, 17, 19}});
  check<double>({.size = {1, 9, 10}, .window = {1, 3, 15}, .weighted = true});
  check<float, uint8_t>({.size = {1, 18, 17}, .block = 3, .layout = Layout::channels_last});
  check<float>(
      {.size = {1, 13, 18}, .window = {1, 5, 3}, .stride = {1, 3, 2}, .smoothing = 0.1, .grad_losses = true});
  check<float>({.size = {5, 9, 10},
                .window = {3, 3, 3},
                .sigma = 1.5,
                .spacing = {2, 1, 1},
                .by_count = true,
                .block = 3});
  check<__nv_bfloat16>({.size = {4, 6, 7}, .window = {1, 3, 5}, .stride = {2, 1, 2}});
  // A chip with little shared memory: smaller tiles.
  check<float>({.size = {4, 17, 18}, .window = {1, 5, 5}, .most_shared = 1024});
  check<float>({.size = {1, 1, 300}, .window = {1, 1, 9}, .p = 1});
  check<float>({.size = {1, 6, 7}, .window = {1, 1, 1}, .p = 1});
  check<float>({.classes = 6, .size = {1, 18, 19}, .probs = true, .weighted = true, .grad_losses = true});
  check<double>(
      {.size = {3, 5, 6}, .window = {3, 3, 3}, .stride = {1, 2, 1}, .p = 2, .probs = true, .by_count = true});
  Case smoothed{.classes = 5, .size = {1, 17, 18}, .smoothing = 0.2, .probs = true, .weighted = true};
  check<float>(smoothed);
  smoothed.stride[1] = 2, smoothed.by_count = true, smoothed.grad_losses = true;
  check<double>(smoothed);
  check<__nv_bfloat16>(
      {.classes = 2, .size = {3, 5, 6}, .window = {3, 3, 3}, .p = 1, .smoothing = 0.1, .probs = true});
  check<float>({.classes = 1, .size = {1, 5, 6}, .smoothing = 0.1, .probs = true});
}

void upsampled_cases() {
  for (bool align_corners : {false, true}) {
    Case c{.size = {1, 20, 24}, .low = {5, 6}, .align_corners = align_corners};
    check<float>(c);
    check<double>({.size = {1, 23, 17},
                   .window = {1, 3, 3},
                   .stride = {1, 2, 1},
                   .smoothing = 0.1,
                   .grad_losses = true,
                   .low = {9, 4},
                   .align_corners = align_corners});
    check<__nv_bfloat16>(
        {.size = {1, 16, 9}, .window = {1, 3, 3}, .low = {1, 2}, .align_corners = align_corners});
    check<float>({.size = {1, 18, 21},
                  .probs = true,
                  .layout = Layout::channels_last,
                  .low = {9, 3},
                  .align_corners = align_corners});
    check<float>({.size = {1, 18, 21},
                  .smoothing = 0.1,
                  .probs = true,
                  .low = {9, 3},
                  .align_corners = align_corners});
  }
}

}  // namespace

int main() {
  cuda_emulation::for_every_schedule([] {
    tiled_cases();
    general_cases();
    upsampled_cases();
  });
  return dynplan::test::finish("region_cross_entropy on emulated CUDA");
}
