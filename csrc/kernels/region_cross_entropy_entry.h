// The entry points of one instruction set: choose accumulation type and merge, cut the work, combine the
// sums. Included by isa/region_cross_entropy_*.cpp alone.
#pragma once

#include "kernels/region_cross_entropy_cpu.h"
#include "kernels/region_cross_entropy_probs.h"

namespace dynplan::kernels::DYNPLAN_ISA {

template <class T, class Kernel>
RegionBadLabel run_forward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                           Parallel parallel) {
  const Tiling tiling(p.batch, p.size, Tiling::columns(Kernel::bytes_per_column(p)), Tiling::march(p),
                      Pool<T>::strip(p));
  const int64_t units = tiling.units();
  const std::unique_ptr<PowerSum[]> sums(new PowerSum[units]);
  const std::unique_ptr<RegionBadLabel[]> bad(new RegionBadLabel[units]);
  parallel(units, 1, [&](int64_t begin, int64_t end) {
    Kernel kernel(p, state);
    for (int64_t unit = begin; unit < end; ++unit) {
      Box box;
      const int64_t n = tiling.box(unit, box);
      sums[unit] = kernel.run(n, box);
      bad[unit] = kernel.bad();
    }
  });
  PowerSum total;
  RegionBadLabel first_bad;
  for (int64_t unit = 0; unit < units; ++unit) {
    total.merge(sums[unit], p.p);
    if (!first_bad.found) first_bad = bad[unit];
  }
  *static_cast<T*>(state.value) = static_cast<T>(total.value(p));
  *state.normalizer = total.normalizer;
  return first_bad;
}

template <class T, class Kernel>
void run_backward(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                  const RegionCrossEntropyGrad& grad, Parallel parallel) {
  const int64_t columns = Tiling::columns(Kernel::bytes_per_column(p));
  if (p.low[0] == 0) {
    const Tiling tiling(p.batch, p.size, columns, Tiling::march(p), Pool<T>::strip(p));
    parallel(tiling.units(), 1, [&](int64_t begin, int64_t end) {
      Kernel kernel(p, state, grad);
      for (int64_t unit = begin; unit < end; ++unit) {
        Box box;
        const int64_t n = tiling.box(unit, box);
        kernel.run(n, box, DirectRows<T>(p, grad),
                   [&](int64_t d, int64_t h, int64_t first, const T* row, int64_t class_stride) {
                     store_gradient(p, grad, n, d, h, first, box.end[2], row, class_stride);
                   });
      }
    });
    return;
  }
  // Units are boxes of low-resolution pixels: each is written by one unit, in a fixed order.
  const int64_t low[3] = {p.low[0], 1, p.low[1]};
  const auto shrunk = [](int64_t full_length, int64_t low_size, int64_t full_size) {
    return larger(1, full_length * low_size / larger(1, full_size));
  };
  const Tiling tiling(p.batch, low, shrunk(columns, p.low[1], p.size[2]),
                      shrunk(Tiling::march(p), p.low[0], p.size[0]), 1);
  parallel(tiling.units(), 1, [&](int64_t begin, int64_t end) {
    Kernel kernel(p, state, grad);
    UpsampledGradient<T> folded(p, grad);
    for (int64_t unit = begin; unit < end; ++unit) {
      Box box;
      const int64_t n = tiling.box(unit, box);
      folded.begin(n, box);
      kernel.run(n, folded.support(box), DirectRows<T>(),
                 [&](int64_t d, int64_t, int64_t, const T* row, int64_t class_stride) {
                   folded.add(d, row, class_stride);
                 });
      folded.finish();
    }
  });
}

template <class T>
RegionBadLabel forward_of(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                          Parallel parallel) {
  if (p.merge == RegionMerge::probs) return run_forward<T, RegionProbsForward<T>>(p, state, parallel);
  return run_forward<T, RegionForward<T>>(p, state, parallel);
}

template <class T>
void backward_of(const RegionCrossEntropyParams& p, const RegionCrossEntropyState& state,
                 const RegionCrossEntropyGrad& grad, Parallel parallel) {
  if (p.merge == RegionMerge::probs) return run_backward<T, RegionProbsBackward<T>>(p, state, grad, parallel);
  run_backward<T, RegionBackward<T>>(p, state, grad, parallel);
}

// Double precision is compiled for the baseline alone: it serves gradient checks, and its exponentials are
// libm's.
static RegionBadLabel forward(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
                              Parallel parallel) {
  const RegionCrossEntropyParams p = marched(given);
  if (p.logit != RegionLogit::f64) return forward_of<float>(p, state, parallel);
#if DYNPLAN_VECTOR_BYTES == 16
  return forward_of<double>(p, state, parallel);
#else
  return baseline::region_cross_entropy.forward(given, state, parallel);
#endif
}

static void backward(const RegionCrossEntropyParams& given, const RegionCrossEntropyState& state,
                     const RegionCrossEntropyGrad& given_grad, Parallel parallel) {
  const RegionCrossEntropyParams p = marched(given);
  RegionCrossEntropyGrad grad = given_grad;
  if (is_image(given)) {
    exchange(grad.grad_losses_stride[1], grad.grad_losses_stride[2]);
    exchange(grad.grad_input_stride[2], grad.grad_input_stride[3]);
  }
  if (p.logit != RegionLogit::f64) return backward_of<float>(p, state, grad, parallel);
#if DYNPLAN_VECTOR_BYTES == 16
  backward_of<double>(p, state, grad, parallel);
#else
  baseline::region_cross_entropy.backward(given, state, given_grad, parallel);
#endif
}

const RegionCrossEntropyKernels region_cross_entropy = {&forward, &backward};

}  // namespace dynplan::kernels::DYNPLAN_ISA
