// Forward, backward and both at once, of any dtype, strides and labels, on images as they are or upsampled.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#include "fuzz/guarded.h"
#include "fuzz/isa.h"
#include "fuzz/parallels.h"
#include "fuzz/targets.h"
#include "kernels/region_cross_entropy/cpu.h"
#include "tests/region_cross_entropy_naive.h"

using namespace dynplan::kernels;

namespace dynplan::fuzz {
namespace {

// A tensor of bytes: sizes and strides of random order, gaps and expanded axes.
struct Layout {
  std::vector<int64_t> sizes, strides;
  int64_t span = 1;  // elements

  Layout(Source& random, std::vector<int64_t> of, bool may_repeat) : sizes(std::move(of)), strides(sizes.size()) {
    std::vector<size_t> order(sizes.size());
    for (size_t axis = 0; axis < order.size(); ++axis) order[axis] = axis;
    if (random.one_in(2)) std::shuffle(order.begin(), order.end(), random);
    const bool gaps = random.one_in(3);
    int64_t step = 1;
    for (size_t at = order.size(); at-- > 0;) {
      const size_t axis = order[at];
      if (may_repeat && random.one_in(24)) continue;  // stride 0
      strides[axis] = step;
      step = (step * std::max<int64_t>(sizes[axis], 1)) + (gaps ? random.size(0, 3) : 0);
    }
    for (size_t axis = 0; axis < sizes.size(); ++axis) {
      if (sizes[axis] == 0) span = 0;
      if (span > 0) span += (sizes[axis] - 1) * strides[axis];
    }
  }
  // f(place in memory), in the order of a dense tensor.
  template <class F>
  void each(F f) const {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    for (int64_t i = 0; i < count; ++i) {
      int64_t place = 0, rest = i;
      for (size_t axis = sizes.size(); axis-- > 0;) {
        place += rest % sizes[axis] * strides[axis];
        rest /= sizes[axis];
      }
      f(place);
    }
  }
};

struct Half {
  uint16_t bits;
};
float to_float(Half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                           : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
  return value.bits & 0x8000 ? -magnitude : magnitude;
}

struct Logits {
  Layout layout;
  Guarded<unsigned char> memory;
  std::vector<double> values;  // dense

  Logits(Source& random, RegionDtype dtype, std::vector<int64_t> sizes, bool broken)
      : layout(random, std::move(sizes), true), memory(random, layout.span * bytes(dtype), bytes(dtype)) {
    for (unsigned char& byte : memory) byte = 0x3c;
    const float scale = random.pick<float>({1, 4, 16});
    layout.each([&](int64_t place) {
      // Every dtype holds these exactly.
      float value = std::round(random.real() * 32) / 32 * scale;
      if (broken && random.one_in(6)) value = random.pick<float>({NAN, INFINITY, -INFINITY});
      write(dtype, place, value);
    });
    layout.each([&](int64_t place) { values.push_back(read(dtype, memory.data(), place)); });
  }
  static int64_t bytes(RegionDtype dtype) {
    return dtype == RegionDtype::f64 ? 8 : dtype == RegionDtype::f32 ? 4 : 2;
  }
  static double read(RegionDtype dtype, const unsigned char* memory, int64_t place) {
    const unsigned char* at = memory + place * bytes(dtype);
    const auto load = [&]<class T>(T value) {
      std::memcpy(&value, at, sizeof(T));
      return value;
    };
    switch (dtype) {
      case RegionDtype::f64:
        return load(double{});
      case RegionDtype::f32:
        return load(float{});
      case RegionDtype::f16:
        return to_float(load(Half{}));
      default: {
        const uint32_t bits = uint32_t{load(uint16_t{})} << 16;
        return std::bit_cast<float>(bits);
      }
    }
  }

 private:
  void write(RegionDtype dtype, int64_t place, float value) {
    unsigned char* at = memory.data() + place * bytes(dtype);
    const double wide = value;
    const auto bits = std::bit_cast<uint32_t>(value);
    const auto upper = static_cast<uint16_t>(bits >> 16);
    // Sign, exponent from bias 127 to 15, and the first ten bits of the mantissa; numbers that are none keep 31.
    const uint32_t exponent = bits >> 23 & 255;
    const auto half = static_cast<uint16_t>(
        (bits >> 16 & 0x8000) | (value == 0 ? 0 : (exponent == 255 ? 31 : exponent - 112) << 10) |
        (bits >> 13 & 1023));
    const void* from = dtype == RegionDtype::f64   ? static_cast<const void*>(&wide)
                       : dtype == RegionDtype::f32 ? static_cast<const void*>(&value)
                       : dtype == RegionDtype::f16 ? static_cast<const void*>(&half)
                                                   : &upper;
    std::memcpy(at, from, bytes(dtype));
  }
};

struct Labels {
  Layout layout;
  Guarded<unsigned char> memory;
  std::vector<int64_t> values;  // dense
  std::vector<int64_t> bad;     // neither classes nor ignored

  Labels(Source& random, RegionLabel label, std::vector<int64_t> sizes, int64_t classes,
         const std::vector<int64_t>& ignored, bool broken)
      : layout(random, std::move(sizes), true), memory(random, layout.span * bytes(label), bytes(label)) {
    for (unsigned char& byte : memory) byte = 0;
    int64_t run = 0;
    const int64_t length = random.size(1, 12);
    layout.each([&](int64_t place) {
      if (random.one_in(length)) run = random.between(0, std::max<int64_t>(classes, 1) - 1);
      int64_t value = !ignored.empty() && random.one_in(6)
                          ? ignored[random.between(0, static_cast<int64_t>(ignored.size()) - 1)]
                          : run;
      if (broken && random.one_in(5)) value = random.edge();
      with_type(label, [&]<class T>(T) {
        const T narrow = static_cast<T>(value);
        std::memcpy(memory.data() + place * sizeof(T), &narrow, sizeof(T));
      });
    });
    layout.each([&](int64_t place) {
      with_type(label, [&]<class T>(T value) {
        std::memcpy(&value, memory.data() + place * sizeof(T), sizeof(T));
        const int64_t wide = value;
        const bool skipped = std::count(ignored.begin(), ignored.end(), wide) > 0;
        if (!skipped && (wide < 0 || wide >= classes)) bad.push_back(wide);
        values.push_back(wide);
      });
    });
  }
  static int64_t bytes(RegionLabel label) {
    return label == RegionLabel::i64 ? 8 : label == RegionLabel::i32 ? 4 : label == RegionLabel::i16 ? 2 : 1;
  }

 private:
  template <class F>
  static void with_type(RegionLabel label, F f) {
    switch (label) {
      case RegionLabel::u8:
        return f(uint8_t{});
      case RegionLabel::i8:
        return f(int8_t{});
      case RegionLabel::i16:
        return f(int16_t{});
      case RegionLabel::i32:
        return f(int32_t{});
      default:
        return f(int64_t{});
    }
  }
};

// Bilinear interpolation along one axis: full[x] = sum of two low pixels' shares.
struct Shares {
  int64_t low, high;
  double up;

  Shares(int64_t x, int64_t full, int64_t size, bool align_corners) {
    const double position =
        align_corners ? (full > 1 ? double(x) * (size - 1) / (full - 1) : 0)
                      : std::max(0., (x + 0.5) * size / full - 0.5);
    low = std::min<int64_t>(static_cast<int64_t>(position), size - 1);
    high = std::min(low + 1, size - 1);
    up = low == size - 1 ? 0 : position - low;
  }
};

// f(low pixel, full pixel, share), for every pair.
template <class F>
void interpolation(const RegionCrossEntropyParams& p, F f) {
  for (int64_t h = 0; h < p.size[1]; ++h)
    for (int64_t w = 0; w < p.size[2]; ++w) {
      const Shares y(h, p.size[1], p.input_size[0], p.align_corners),
          x(w, p.size[2], p.input_size[1], p.align_corners);
      const int64_t full = h * p.size[2] + w;
      f(y.low * p.input_size[1] + x.low, full, (1 - y.up) * (1 - x.up));
      f(y.low * p.input_size[1] + x.high, full, (1 - y.up) * x.up);
      f(y.high * p.input_size[1] + x.low, full, y.up * (1 - x.up));
      f(y.high * p.input_size[1] + x.high, full, y.up * x.up);
    }
}

struct Case {
  RegionCrossEntropyParams params;
  bool upsampled, broken_logits, broken_labels;
  int axes;
  std::vector<int64_t> ignored;

  explicit Case(Source& random) : upsampled(random.one_in(5)), broken_logits(random.one_in(16)),
                                  broken_labels(random.one_in(10)), axes(static_cast<int>(random.between(1, 3))) {
    if (upsampled) axes = 2;
    RegionCrossEntropyParams& p = params;
    p.batch = random.size(0, 3);
    p.classes = random.size(1, 6);
    p.logit = static_cast<RegionDtype>(random.between(0, 3));
    p.label = static_cast<RegionLabel>(random.between(0, 4));
    const bool plain = random.one_in(3), far = random.one_in(40);  // 3 x 3 windows; several units of work
    for (int axis = 3 - axes; axis < 3; ++axis) {
      p.size[axis] = random.size(0, far ? 90 : axes == 3 ? 8 : 20);
      p.stride[axis] = plain || random.one_in(2) ? 1 : random.size(1, 4);
      p.radius[axis] = static_cast<int>(plain ? 1 : random.size(0, axes == 3 ? 3 : kRegionMaxRadius));
      const double spacing = plain ? 1 : random.pick<double>({1, 1, 0.5, 2});
      for (int i = 0; i <= p.radius[axis]; ++i) p.axis_weight[axis][i] = std::exp(-0.3 * i * i * spacing);
    }
    if (axes < 3) p.axis_weight[0][0] = 1;
    if (axes < 2) p.axis_weight[1][0] = 1;
    if (far) p.batch = std::min<int64_t>(p.batch, 1), p.classes = std::min<int64_t>(p.classes, 3);
    for (int axis = 0; axis < 3; ++axis)
      p.anchors[axis] = (p.size[axis] + p.stride[axis] - 1) / p.stride[axis];
    p.p = random.pick<double>({1, 1, 2, 2.5, 5});
    p.reduction = p.p == 1 && random.one_in(3) ? RegionReduction::sum : RegionReduction::mean;
    p.label_smoothing = random.one_in(3) ? random.between(0, 8) / 8. : 0;
    p.merge = random.one_in(3) ? RegionMerge::probs : RegionMerge::logits;
    p.normalize = random.one_in(3) ? RegionNormalize::count : RegionNormalize::weight;
    p.num_ignored = static_cast<int>(random.size(0, kRegionMaxIgnored));
    for (int i = 0; i < p.num_ignored; ++i) {
      p.ignored[i] = random.one_in(3) ? random.between(0, p.classes - 1)
                                      : random.pick<int64_t>({-100, -1, 255, random.edge()});
      ignored.push_back(p.ignored[i]);
    }
    if (upsampled) {
      p.input_size[0] = random.size(1, 12), p.input_size[1] = random.size(1, 12);
      p.align_corners = random.one_in(2);
    }
  }
  std::vector<int64_t> spatial(const int64_t* space, std::vector<int64_t> front) const {
    front.insert(front.end(), space + 3 - axes, space + 3);
    return front;
  }
  std::vector<int64_t> input_sizes() const {
    if (upsampled) return {params.batch, params.classes, params.input_size[0], params.input_size[1]};
    return spatial(params.size, {params.batch, params.classes});
  }
  // Strides of `layout`, whose first axes are `front` and whose last are space, as Params have them.
  void put(const Layout& layout, int front, int64_t* strides) const {
    std::fill(strides, strides + front + 3, 0);
    for (int axis = 0; axis < front; ++axis) strides[axis] = layout.strides[axis];
    for (int axis = 0; axis < axes; ++axis) strides[front + 3 - axes + axis] = layout.strides[front + axis];
  }
  int64_t anchors() const { return params.batch * params.anchors[0] * params.anchors[1] * params.anchors[2]; }
  int64_t pixels() const { return params.batch * params.size[0] * params.size[1] * params.size[2]; }
  // Of the naive form.
  int64_t cost() const {
    int64_t window = params.merge == RegionMerge::probs ? 4 * params.classes : 1;
    for (const int radius : params.radius) window *= 2 * radius + 1;
    return anchors() * window * params.classes;
  }
};

bool close(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance * (1 + std::abs(b)); }

// T: float, or double for double logits.
template <class T>
void compare(Source& random, Case& c) {
  RegionCrossEntropyParams& p = c.params;
  const Logits logits(random, p.logit, c.input_sizes(), c.broken_logits);
  const Labels labels(random, p.label, c.spatial(p.size, {p.batch}), p.classes, c.ignored, c.broken_labels);
  Guarded<T> weight(random, p.classes);
  for (T& w : weight) w = random.one_in(8) ? T(0) : T(0.5 + std::abs(random.real()));
  if (random.one_in(2)) p.class_weight = weight.data();
  p.input = logits.memory.data(), c.put(logits.layout, 2, p.input_stride);
  p.target = labels.memory.data(), c.put(labels.layout, 1, p.target_stride);

  const Layout grad_layout(random, c.input_sizes(), false),
      losses_layout(random, c.spatial(p.anchors, {p.batch}), true);
  Guarded<T> grad_losses(random, losses_layout.span);
  for (T& g : grad_losses) g = random.real();
  std::vector<double> dense_grad_losses;
  losses_layout.each([&](int64_t place) { dense_grad_losses.push_back(grad_losses[place]); });
  const T upstream = 2;
  const bool of_value = random.one_in(4) ? false : true, of_losses = !of_value || random.one_in(3);

  Guarded<T> losses(random, c.anchors()), lse(random, p.merge == RegionMerge::probs ? c.pixels() : c.anchors());
  Guarded<int16_t> agreement(random, c.anchors());
  Guarded<T> value(random, 1);
  Guarded<double> normalizer(random, 1);
  const T poison = std::numeric_limits<T>::quiet_NaN();
  losses.fill(poison), lse.fill(poison), agreement.fill(-1), value.fill(poison), normalizer.fill(-1);
  const RegionCrossEntropyState state = {losses.data(), lse.data(),
                                         random.one_in(2) ? agreement.data() : nullptr, value.data(),
                                         normalizer.data()};
  const RegionCrossEntropyKernels& kernels = region_cross_entropy_kernels(some_isa(random));
  setenv("DYNPLAN_REGION_METHOD", random.pick({"", "", "general", "small"}), 1);
  RegionBadLabel bad;
  on_some_parallel(random, 64, [&](Parallel parallel) { bad = kernels.forward(p, state, parallel); });
  EXPECT(bad.found == !labels.bad.empty());
  EXPECT(!bad.found || std::count(labels.bad.begin(), labels.bad.end(), bad.value) > 0);

  RegionCrossEntropyGrad grad;
  Guarded<unsigned char> gradient(random, grad_layout.span * Logits::bytes(p.logit), Logits::bytes(p.logit));
  gradient.fill(0x7f);
  grad.grad_value = of_value ? &upstream : nullptr;
  if (of_losses) grad.grad_losses = grad_losses.data(), c.put(losses_layout, 1, grad.grad_losses_stride);
  grad.grad_input = gradient.data(), c.put(grad_layout, 2, grad.grad_input_stride);
  on_some_parallel(random, 64, [&](Parallel parallel) { kernels.backward(p, state, grad, parallel); });

  Guarded<unsigned char> both(random, gradient.size(), Logits::bytes(p.logit));
  both.fill(0x7f);
  RegionCrossEntropyGrad place = grad;
  place.grad_value = place.grad_losses = nullptr;
  place.grad_input = both.data();
  const bool at_once = !bad.found;
  double factor = 0;
  if (at_once) {
    const T before = value[0];
    on_some_parallel(random, 64, [&](Parallel parallel) {
      factor = kernels.loss_and_gradient(p, {losses.data(), lse.data(), nullptr, value.data(), normalizer.data()},
                                         place, bad, parallel);
    });
    // Only the logits' own NaN may make a loss that is none.
    EXPECT(!bad.found && (c.broken_logits || close(value[0], before, 1e-5)));
  }

  // Gaps between the elements of a gradient are nobody's.
  std::vector<bool> ours(grad_layout.span);
  grad_layout.each([&](int64_t at) { ours[at] = true; });
  const int64_t bytes = Logits::bytes(p.logit);
  bool gaps = true;
  for (int64_t i = 0; i < gradient.size(); ++i)
    if (!ours[i / bytes]) gaps &= gradient[i] == 0x7f && both[i] == 0x7f;
  EXPECT(gaps);
  if (c.broken_logits || c.cost() > 40000) return;

  // The same in plain loops, on dense doubles of full resolution.
  RegionCrossEntropyParams plain = p;
  std::vector<double> weights(weight.begin(), weight.end()), input = logits.values;
  std::vector<int64_t> target = labels.values;
  for (int64_t& y : target)
    if (std::count(labels.bad.begin(), labels.bad.end(), y) > 0) y = -1;  // counts as ignored
  if (p.class_weight != nullptr) plain.class_weight = weights.data();
  const int64_t pixels = p.size[0] * p.size[1] * p.size[2], low = p.input_size[0] * p.input_size[1];
  if (c.upsampled) {
    input.assign(p.batch * p.classes * pixels, 0);
    interpolation(p, [&](int64_t from, int64_t to, double share) {
      for (int64_t nc = 0; nc < p.batch * p.classes; ++nc)
        input[nc * pixels + to] += share * logits.values[nc * low + from];
    });
  }
  plain.input = input.data(), plain.target = target.data();
  NaiveRegionLoss wanted =
      NaiveRegion<double>(plain).run(of_value ? 2. : 0., of_losses ? dense_grad_losses.data() : nullptr);
  const auto fold = [&](std::vector<double>& full) {
    if (!c.upsampled) return;
    std::vector<double> folded(p.batch * p.classes * low, 0);
    interpolation(p, [&](int64_t from, int64_t to, double share) {
      for (int64_t nc = 0; nc < p.batch * p.classes; ++nc)
        folded[nc * low + from] += share * full[nc * pixels + to];
    });
    full.swap(folded);
  };
  fold(wanted.grad_input);
  const double tolerance = sizeof(T) == 8 ? 1e-9 : 1e-4;
  EXPECT(close(value[0], wanted.value, tolerance) && close(normalizer[0], wanted.normalizer, 1e-6));
  bool same = true;
  for (int64_t i = 0; i < c.anchors(); ++i) {
    same &= close(losses[i], wanted.losses[i], tolerance);
    if (state.agreement != nullptr) same &= agreement[i] == wanted.agreement[i];
  }
  EXPECT(same);
  const double rounding = p.logit == RegionDtype::bf16 ? 0x1p-7 : p.logit == RegionDtype::f16 ? 0x1p-9 : tolerance;
  if (wanted.normalizer == 0) return;
  double largest = 0;
  for (const double g : wanted.grad_input) largest = std::max(largest, std::abs(g));
  const double most = rounding * (largest + 1e-2);
  size_t next = 0;
  same = true;
  grad_layout.each([&](int64_t at) {
    const double g = wanted.grad_input[next++];
    same &= std::abs(Logits::read(p.logit, gradient.data(), at) - g) <= most;
    if (at_once && of_value && !of_losses && bytes > 2)
      same &= std::abs(factor * upstream * Logits::read(p.logit, both.data(), at) - g) <= most;
  });
  EXPECT(same);
}

}  // namespace

void fuzz_region_cross_entropy(Source& random) {
  Case c(random);
  if (random.one_in(500)) {
    setenv("DYNPLAN_REGION_METHOD", "bands", 1);
    bool refused = false;
    try {
      region_cross_entropy_kernels(some_isa(random)).forward(c.params, {}, serial);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    EXPECT(refused);
    return;
  }
  c.params.logit == RegionDtype::f64 ? compare<double>(random, c) : compare<float>(random, c);
}

}  // namespace dynplan::fuzz
