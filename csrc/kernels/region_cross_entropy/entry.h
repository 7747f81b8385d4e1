// The entry points of one instruction set: choose accumulation type and merge, cut the work, combine the
// sums. Included by isa/region_cross_entropy_*.cpp alone.
#pragma once

#include <atomic>

#include "kernels/region_cross_entropy/cpu.h"
#include "kernels/region_cross_entropy/method.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// run(kernel, unit, upcoming) for all units. upcoming() is the unit that would be taken now. Each thread
// takes the next that nobody has taken, so that a thread that other work slows down takes fewer. (A range of
// `parallel` stands for a thread; which one it is is ignored.)
template <class Make, class Run>
void for_units(int64_t units, Parallel parallel, Make make, Run run) {
  std::atomic<int64_t> next = 0;
  parallel(units, 1, [&](int64_t, int64_t) {
    int64_t unit = next++;
    if (unit >= units) return;
    for (auto kernel = make(); unit < units; unit = next++) run(*kernel, unit, [&] { return next.load(); });
  });
}

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

template <class T, class Kernel>
Tiling tiling_of(const RegionCrossEntropyParams& p) {
  return Tiling(p.batch, p.size, Tiling::columns(Kernel::bytes_per_column(p)), Tiling::march(p),
                Pool<T>::strip(p));
}

template <class T, class Kernel>
RegionBadLabel run_forward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                           Parallel parallel) {
  const Tiling tiling = tiling_of<T, Kernel>(p);
  UnitResults results(tiling.units());
  for_units(
      tiling.units(), parallel, [&] { return std::make_unique<Kernel>(p, state); },
      [&](Kernel& kernel, int64_t unit, const auto&) {
        Box box;
        const int64_t n = tiling.box(unit, box);
        const PowerSum sum = kernel.run(n, box);
        results.set(unit, sum, kernel.bad());
      });
  RegionBadLabel bad;
  results.finish<T>(p, state, bad);
  return bad;
}

// The gradient at the logits' resolution: `done(kernel, unit)` after each box.
template <class T, class Kernel, class Done>
void run_gradient(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                  const RegionCrossEntropyGrad& grad, Parallel parallel, Done done) {
  const Tiling tiling = tiling_of<T, Kernel>(p);
  for_units(
      tiling.units(), parallel, [&] { return std::make_unique<Kernel>(p, state, grad); },
      [&](Kernel& kernel, int64_t unit, const auto&) {
        Box box;
        const int64_t n = tiling.box(unit, box);
        kernel.run(
            n, box, DirectRows<T>(p, grad), [&](int64_t d, int64_t h, const T* row, int64_t class_stride) {
              store_gradient(p, grad, n, d, h, 0, p.classes, box.begin[2], box.end[2], row, class_stride);
            });
        done(kernel, unit);
      });
}

template <class T, class Kernel>
void run_backward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                  const RegionCrossEntropyGrad& grad, Parallel parallel) {
  if (p.low[0] == 0) return run_gradient<T, Kernel>(p, state, grad, parallel, [](Kernel&, int64_t) {});
  // Units are boxes of low-resolution pixels: each is written by one unit, in a fixed order.
  const int64_t low[3] = {p.low[0], 1, p.low[1]};
  const auto shrunk = [](int64_t full_length, int64_t low_size, int64_t full_size) {
    return larger(1, full_length * low_size / larger(1, full_size));
  };
  const int64_t columns = Tiling::columns(Kernel::bytes_per_column(p));
  const Tiling tiling(p.batch, low, shrunk(columns, p.low[1], p.size[2]),
                      shrunk(Tiling::march(p), p.low[0], p.size[0]), 1);
  struct Folding {
    Kernel kernel;
    UpsampledGradient<T> folded;
    Folding(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
            const RegionCrossEntropyGrad& grad)
        : kernel(p, state, grad), folded(p, grad) {}
  };
  for_units(
      tiling.units(), parallel, [&] { return std::make_unique<Folding>(p, state, grad); },
      [&](Folding& to, int64_t unit, const auto&) {
        Box box;
        const int64_t n = tiling.box(unit, box);
        to.folded.begin(n, box);
        // Pixels may be too few for any to take its value from this box, or there may be none.
        if (const Box full = to.folded.support(box); full.extent(0) > 0 && full.extent(2) > 0)
          to.kernel.run(n, full, DirectRows<T>(),
                        [&](int64_t d, int64_t, const T* row, int64_t class_stride) {
                          to.folded.add(d, row, class_stride);
                        });
        to.folded.finish();
      });
}

// By bands of rows, where bands.h can.
template <class T, class Stage>
UnitResults run_bands(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                      const RegionCrossEntropyGrad& grad, Parallel parallel) {
  using Kernel = Band<T, Stage>;
  const Tiling tiling = Kernel::tiling(p);
  UnitResults results(tiling.units());
  for_units(
      tiling.units(), parallel, [&] { return std::make_unique<Kernel>(p, state, grad); },
      [&](Kernel& kernel, int64_t unit, const auto& upcoming) {
        const PowerSum sum = kernel.run(tiling, unit, upcoming);
        results.set(unit, sum, kernel.bad());
      });
  return results;
}

template <class T>
RegionBadLabel forward_by(Method method, const RegionCrossEntropyParams& p,
                          const RegionCrossEntropyState& state, Parallel parallel) {
  if (method == Method::probs) return run_forward<T, RegionProbsForward<T>>(p, state, parallel);
  if (method == Method::bands) {
    RegionBadLabel bad;
    run_bands<T, ForwardAnchors<T>>(p, state, {}, parallel).template finish<T>(p, state, bad);
    return bad;
  }
  return with_windows<T>(method, [&]<class Windows>(std::type_identity<Windows>) {
    return run_forward<T, RegionForward<T, Windows>>(p, state, parallel);
  });
}

template <class T>
void backward_by(Method method, const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                 const RegionCrossEntropyGrad& grad, Parallel parallel) {
  if (method == Method::probs) return run_backward<T, RegionProbsBackward<T>>(p, state, grad, parallel);
  if (method == Method::bands) {
    run_bands<T, BackwardAnchors<T>>(p, state, grad, parallel);
    return;
  }
  with_windows<T>(method, [&]<class Windows>(std::type_identity<Windows>) {
    run_backward<T, RegionBackward<T, Windows>>(p, state, grad, parallel);
  });
}

template <class T>
UnitResults loss_and_gradient(Method method, const RegionCrossEntropyParams& p,
                              const RegionCrossEntropyState& state, const RegionCrossEntropyGrad& grad,
                              Parallel parallel) {
  if (method == Method::bands) return run_bands<T, OnceAnchors<T>>(p, state, grad, parallel);
  return with_windows<T>(method, [&]<class Windows>(std::type_identity<Windows>) {
    using Kernel = RegionOnce<T, Windows>;
    UnitResults results(tiling_of<T, Kernel>(p).units());
    run_gradient<T, Kernel>(p, state, grad, parallel, [&](Kernel& kernel, int64_t unit) {
      results.set(unit, kernel.total(), kernel.bad());
    });
    return results;
  });
}

// loss_and_gradient.h where it applies, else forward and backward one after the other.
template <class T>
double once_by(Method method, const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
               RegionCrossEntropyGrad grad, RegionBadLabel& bad, Parallel parallel) {
  const T one = 1;
  grad.grad_value = &one;
  const bool strided = p.stride[0] > 1 || p.stride[1] > 1 || p.stride[2] > 1;
  if (p.merge == RegionMerge::logits && p.label_smoothing == 0 && !strided && p.low[0] == 0) {
    const PowerSum total =
        loss_and_gradient<T>(method, p, state, grad, parallel).template finish<T>(p, state, bad);
    if (const double factor = once_factor(p, total); factor != 0) return factor;
  } else {
    bad = forward_by<T>(method, p, state, parallel);
  }
  backward_by<T>(method, p, state, grad, parallel);
  return 1;
}

// Double precision is compiled for the baseline alone: it serves gradient checks, and its exponentials are
// libm's.
static RegionBadLabel forward(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
                              Parallel parallel) {
  const RegionCrossEntropyParams p = marched(given);
  if (p.logit != RegionLogit::f64) return forward_by<float>(method_of<float>(p), p, state, parallel);
#if DYNPLAN_VECTOR_BYTES == 16
  return forward_by<double>(method_of<double>(p), p, state, parallel);
#else
  return baseline::region_cross_entropy.forward(given, state, parallel);
#endif
}

// Marching order of the gradient's strides.
static RegionCrossEntropyGrad marched(RegionCrossEntropyGrad grad, const RegionCrossEntropyParams& given) {
  if (is_image(given)) {
    exchange(grad.grad_losses_stride[1], grad.grad_losses_stride[2]);
    exchange(grad.grad_input_stride[2], grad.grad_input_stride[3]);
  }
  return grad;
}

static void backward(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
                     const RegionCrossEntropyGrad& given_grad, Parallel parallel) {
  const RegionCrossEntropyParams p = marched(given);
  if (p.logit != RegionLogit::f64)
    return backward_by<float>(method_of<float>(p), p, state, marched(given_grad, given), parallel);
#if DYNPLAN_VECTOR_BYTES == 16
  backward_by<double>(method_of<double>(p), p, state, marched(given_grad, given), parallel);
#else
  baseline::region_cross_entropy.backward(given, state, given_grad, parallel);
#endif
}

static double once(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
                   const RegionCrossEntropyGrad& given_grad, RegionBadLabel& bad, Parallel parallel) {
  const RegionCrossEntropyParams p = marched(given);
  if (p.logit != RegionLogit::f64)
    return once_by<float>(method_of<float>(p), p, state, marched(given_grad, given), bad, parallel);
#if DYNPLAN_VECTOR_BYTES == 16
  return once_by<double>(method_of<double>(p), p, state, marched(given_grad, given), bad, parallel);
#else
  return baseline::region_cross_entropy.once(given, state, given_grad, bad, parallel);
#endif
}

const RegionCrossEntropyKernels region_cross_entropy = {&forward, &backward, &once};

}  // namespace dynplan::kernels::DYNPLAN_ISA
