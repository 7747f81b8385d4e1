// The entry points of one instruction set: choose precision and method, cut the work, combine the sums.
// Included by isa/*.cpp alone.
#pragma once

#include <atomic>

#include "kernels/region_cross_entropy/cpu.h"
#include "kernels/region_cross_entropy/method.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// What units leave beside tensors, combined in their order.
class UnitResults {
 public:
  explicit UnitResults(int64_t units)
      : units_(units), sums_(new PowerSum[units]), bad_(new RegionBadLabel[units]) {}

  void set(int64_t unit, const PowerSum& sum, const RegionBadLabel& bad) {
    sums_[unit] = sum;
    bad_[unit] = bad;
  }

  // Writes value and normaliser, and the first bad label.
  template <class T>
  PowerSum finish(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                  RegionBadLabel& bad) const {
    PowerSum total;
    for (int64_t unit = 0; unit < units_; ++unit) {
      total.merge(sums_[unit], p.p);
      if (!bad.found) bad = bad_[unit];
    }
    *static_cast<T*>(state.value) = static_cast<T>(total.value(p));
    *state.normalizer = total.normalizer;
    return total;
  }

 private:
  int64_t units_;
  std::unique_ptr<PowerSum[]> sums_;
  std::unique_ptr<RegionBadLabel[]> bad_;
};

// A gradient at the logits' resolution, folded into boxes of low-resolution pixels.
template <class T, class Kernel>
class Folding {
 public:
  Folding(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
          const RegionCrossEntropyGrad& grad)
      : kernel_(p, state, grad), folded_(p, grad) {}

  void run(int64_t n, const Box& box) {
    folded_.begin(n, box);
    // Pixels may be too few for any to take its value from this box, or there may be none.
    if (const Box full = folded_.support(box); full.extent(0) > 0 && full.extent(2) > 0)
      kernel_.run(n, full, DirectRows<T>(), [&](int64_t d, int64_t, const T* row, int64_t class_stride) {
        folded_.add(d, row, class_stride);
      });
    folded_.finish();
  }
  const RegionBadLabel& bad() const { return kernel_.bad(); }

 private:
  Kernel kernel_;
  UpsampledGradient<T> folded_;
};

// One call, in marching order.
template <class T>
struct Call {
  const RegionCrossEntropyParams& p;
  const RegionCrossEntropyState& state;
  const RegionCrossEntropyGrad& grad;
  Parallel parallel;
  Method method = method_of(p);

  RegionBadLabel forward() const {
    RegionBadLabel bad;
    with_windows([&]<class Windows, class Values>(std::type_identity<Windows>, std::type_identity<Values>) {
      const Tiling tiling = boxes<Windows>();
      for_units<RegionForward<T, Windows, Values>>(tiling, [](auto& kernel, int64_t n, const Box& box) {
        return kernel.run(n, box);
      }).template finish<T>(p, state, bad);
    });
    return bad;
  }

  void backward() const {
    with_windows([&]<class Windows, class Values>(std::type_identity<Windows>, std::type_identity<Values>) {
      using Kernel = RegionGradient<T, typename Values::Gradient, Windows, Values>;
      if (p.input_size[0] > 0)
        fold<Windows, Kernel>();
      else
        gradient<Windows, Kernel>();
    });
  }

  // Returns what the gradient has yet to be multiplied by.
  double loss_and_gradient(RegionBadLabel& bad) const {
    const bool strided = p.stride[0] > 1 || p.stride[1] > 1 || p.stride[2] > 1;
    if (p.merge == RegionMerge::probs || p.label_smoothing > 0 || strided || p.input_size[0] > 0) {
      bad = forward();
      backward();
      return 1;
    }
    PowerSum total;
    with_windows([&]<class Windows, class Values>(std::type_identity<Windows>, std::type_identity<Values>) {
      if constexpr (!Values::Planes::kReadAgain) {
        using Kernel = RegionGradient<T, OnceAnchors<T>, Windows, Values>;
        total = gradient<Windows, Kernel>().template finish<T>(p, state, bad);
      }
    });
    if (const double factor = once_factor(p, total); factor != 0) return factor;
    backward();
    return 1;
  }

 private:
  // run(kernel, n, box) for all units. Each thread takes the next that nobody has taken, so that a thread
  // that other work slows down takes fewer. (A range of `parallel` stands for a thread; which one it is is
  // ignored.)
  template <class Kernel, class Run>
  UnitResults for_units(const Tiling& tiling, Run run) const {
    const int64_t units = tiling.units();
    UnitResults results(units);
    std::atomic<int64_t> next = 0;
    parallel(units, 1, [&](int64_t, int64_t) {
      int64_t unit = next++;
      if (unit >= units) return;
      for (auto kernel = std::make_unique<Kernel>(p, state, grad); unit < units; unit = next++) {
        Box box;
        const int64_t n = tiling.box(unit, box);
        results.set(unit, run(*kernel, n, box), kernel->bad());
      }
    });
    return results;
  }

  template <class F>
  void with_windows(F f) const {
    if (p.merge == RegionMerge::probs)
      f(std::type_identity<GeneralWindows<T>>(), std::type_identity<ProbabilityValues<T>>());
    else if (method == Method::small)
      f(std::type_identity<SmallWindows<T>>(), std::type_identity<LogitValues<T>>());
    else
      f(std::type_identity<GeneralWindows<T>>(), std::type_identity<LogitValues<T>>());
  }

  // Columns of a box whose rings fit in cache: as many for the forward as for the gradient, which needs more.
  // Cut alike, in strips too, a loss has the same bits with its gradient and without.
  template <class Windows>
  int64_t columns() const {
    return Tiling::columns(gradient_bytes_per_column<T>(p, Windows::strip(p)));
  }
  template <class Windows>
  Tiling boxes() const {
    return Tiling(p.batch, p.size, columns<Windows>(), Tiling::march(p), Windows::strip(p));
  }

  template <class Windows, class Kernel>
  UnitResults gradient() const {
    const Tiling tiling = boxes<Windows>();
    return for_units<Kernel>(tiling, [&](Kernel& kernel, int64_t n, const Box& box) {
      kernel.run(
          n, box, DirectRows<T>(p, grad), [&](int64_t d, int64_t h, const T* row, int64_t class_stride) {
            store_gradient(p, grad, n, d, h, box.begin[2], box.end[2], row, class_stride);
          });
      return kernel.total();
    });
  }

  // Units are boxes of low-resolution pixels: each is written by one unit, in a fixed order.
  template <class Windows, class Kernel>
  void fold() const {
    const int64_t low[3] = {p.input_size[0], 1, p.input_size[1]};
    const auto shrunk = [](int64_t full_length, int64_t low_size, int64_t full_size) {
      return larger(1, full_length * low_size / larger(1, full_size));
    };
    const Tiling tiling(p.batch, low, shrunk(columns<Windows>(), low[2], p.size[2]),
                        shrunk(Tiling::march(p), low[0], p.size[0]), 1);
    for_units<Folding<T, Kernel>>(tiling, [](auto& folding, int64_t n, const Box& box) {
      folding.run(n, box);
      return PowerSum();
    });
  }
};

// Marching order of the gradient's strides.
static RegionCrossEntropyGrad marched(RegionCrossEntropyGrad grad, const RegionCrossEntropyParams& given) {
  if (is_image(given)) {
    exchange(grad.grad_losses_stride[1], grad.grad_losses_stride[2]);
    exchange(grad.grad_input_stride[2], grad.grad_input_stride[3]);
  }
  return grad;
}

// Double precision is compiled for the baseline alone: it serves gradient checks, and its exponentials are
// libm's.
inline constexpr bool kDoubles = DYNPLAN_VECTOR_BYTES == 16;
static bool goes_to_baseline(const RegionCrossEntropyParams& p) {
  return !kDoubles && p.logit == RegionDtype::f64;
}

template <class F>
auto with_call(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
               const RegionCrossEntropyGrad& given_grad, Parallel parallel, F f) {
  const RegionCrossEntropyParams p = marched(given);
  const RegionCrossEntropyGrad grad = marched(given_grad, given);
  if constexpr (kDoubles)
    if (p.logit == RegionDtype::f64) return f(Call<double>{p, state, grad, parallel});
  return f(Call<float>{p, state, grad, parallel});
}

static RegionBadLabel forward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                              Parallel parallel) {
  if (goes_to_baseline(p)) return baseline::region_cross_entropy.forward(p, state, parallel);
  return with_call(p, state, {}, parallel, [](const auto& call) { return call.forward(); });
}

static void backward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                     const RegionCrossEntropyGrad& grad, Parallel parallel) {
  if (goes_to_baseline(p)) return baseline::region_cross_entropy.backward(p, state, grad, parallel);
  with_call(p, state, grad, parallel, [](const auto& call) { call.backward(); });
}

static double loss_and_gradient(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                                const RegionCrossEntropyGrad& given, RegionBadLabel& bad, Parallel parallel) {
  if (goes_to_baseline(p))
    return baseline::region_cross_entropy.loss_and_gradient(p, state, given, bad, parallel);
  const float one = 1;
  const double one_double = 1;
  RegionCrossEntropyGrad grad = given;
  grad.grad_value = p.logit == RegionDtype::f64 ? static_cast<const void*>(&one_double) : &one;
  return with_call(p, state, grad, parallel, [&](const auto& call) { return call.loss_and_gradient(bad); });
}

const RegionCrossEntropyKernels region_cross_entropy = {&forward, &backward, &loss_and_gradient};

}  // namespace dynplan::kernels::DYNPLAN_ISA
