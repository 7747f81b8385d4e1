// region_cross_entropy by plain loops in double: forward, and the gradient scattered window by window.
// The oracle of the kernel tests; float or double logits, int64 labels, dense tensors, no upsampling.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/region_cross_entropy/params.h"

namespace dynplan::kernels {

struct NaiveRegionLoss {
  std::vector<double> losses, lse, grad_input;  // lse as in RegionCrossEntropyState
  std::vector<int> agreement;
  double value = 0, normalizer = 0;
};

template <class T>
class NaiveRegion {
 public:
  explicit NaiveRegion(const RegionCrossEntropyParams& params) : p_(params) {}

  NaiveRegionLoss run(double grad_value, const double* grad_losses = nullptr) {
    const int64_t anchors = p_.anchors[0] * p_.anchors[1] * p_.anchors[2];
    NaiveRegionLoss out;
    out.losses.assign(p_.batch * anchors, 0);
    out.agreement.assign(p_.batch * anchors, 0);
    out.grad_input.assign(p_.batch * p_.classes * pixels(), 0);
    const bool probs = p_.merge == RegionMerge::probs;
    out.lse.assign(p_.batch * (probs ? pixels() : anchors), 0);
    if (probs)
      for (int64_t n = 0; n < p_.batch; ++n)
        for (int64_t pixel = 0; pixel < pixels(); ++pixel) out.lse[n * pixels() + pixel] = lse(n, pixel);
    std::vector<double> weights;
    for_each_anchor([&](int64_t n, int64_t anchor, int64_t pixel) {
      const int64_t y = label(n, pixel);
      if (y < 0) return;
      const Window window = gather(n, pixel, y);
      const int64_t at = n * anchors + anchor;
      out.agreement[at] = static_cast<int>(window.pixels.size());
      weights.push_back(class_weight(y));
      if (probs) {
        for (int64_t c = 0; c < p_.classes; ++c)
          out.losses[at] -= share(c, y) * std::log(pooled_probability(n, window, c));
        return;
      }
      const std::vector<double> z = pooled(n, window);
      const double top = *std::max_element(z.begin(), z.end());
      double sum = 0;
      for (double v : z) sum += std::exp(v - top);
      out.lse[at] = top + std::log(sum);
      for (int64_t c = 0; c < p_.classes; ++c) out.losses[at] += share(c, y) * (out.lse[at] - z[c]);
    });
    double total = 0;
    for (double l : out.losses) total += std::pow(l, p_.p);
    for (double w : weights) out.normalizer += std::pow(w, p_.p);
    const bool mean = p_.reduction == RegionReduction::mean;
    out.value = !mean ? total : total > 0 ? std::pow(total / out.normalizer, 1 / p_.p) : 0;
    for_each_anchor([&](int64_t n, int64_t anchor, int64_t pixel) {
      const int64_t y = label(n, pixel);
      if (y < 0) return;
      const int64_t at = n * anchors + anchor;
      double s = grad_value;
      if (mean)
        s *= out.value > 0 || p_.p == 1 ? std::pow(out.losses[at] / out.value, p_.p - 1) / out.normalizer : 0;
      if (grad_losses) s += grad_losses[at];
      scatter(n, y, gather(n, pixel, y), s, probs ? 0 : out.lse[at], out.grad_input);
    });
    return out;
  }

 private:
  struct Window {
    std::vector<int64_t> pixels;
    std::vector<double> a;
  };

  int64_t pixels() const { return p_.size[0] * p_.size[1] * p_.size[2]; }

  double logit(int64_t n, int64_t c, int64_t pixel) const {
    return static_cast<const T*>(p_.input)[(n * p_.classes + c) * pixels() + pixel];
  }

  double class_weight(int64_t c) const {
    return p_.class_weight ? static_cast<const T*>(p_.class_weight)[c] : 1;
  }

  // What -log of class c's probability counts in the loss of an anchor labelled y.
  double share(int64_t c, int64_t y) const {
    return ((1 - p_.label_smoothing) * (c == y) + p_.label_smoothing / p_.classes) * class_weight(c);
  }

  int64_t label(int64_t n, int64_t pixel) const {
    const int64_t y = static_cast<const int64_t*>(p_.target)[n * pixels() + pixel];
    return std::count(p_.ignored, p_.ignored + p_.num_ignored, y) ? -1 : y;
  }

  double lse(int64_t n, int64_t pixel) const {
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t c = 0; c < p_.classes; ++c) top = std::max(top, logit(n, c, pixel));
    for (int64_t c = 0; c < p_.classes; ++c) sum += std::exp(logit(n, c, pixel) - top);
    return top + std::log(sum);
  }

  double probability(int64_t n, int64_t pixel, int64_t c) const {
    return std::exp(logit(n, c, pixel) - lse(n, pixel));
  }

  template <class F>
  void for_each_anchor(F f) const {
    for (int64_t n = 0; n < p_.batch; ++n) {
      int64_t anchor = 0;
      for (int64_t d = 0; d < p_.size[0]; d += p_.stride[0])
        for (int64_t h = 0; h < p_.size[1]; h += p_.stride[1])
          for (int64_t w = 0; w < p_.size[2]; w += p_.stride[2])
            f(n, anchor++, (d * p_.size[1] + h) * p_.size[2] + w);
    }
  }

  Window gather(int64_t n, int64_t centre, int64_t y) const {
    const int64_t at[3] = {centre / (p_.size[1] * p_.size[2]), centre / p_.size[2] % p_.size[1],
                           centre % p_.size[2]};
    Window window;
    double total = 0;
    for (int64_t d = at[0] - p_.radius[0]; d <= at[0] + p_.radius[0]; ++d)
      for (int64_t h = at[1] - p_.radius[1]; h <= at[1] + p_.radius[1]; ++h)
        for (int64_t w = at[2] - p_.radius[2]; w <= at[2] + p_.radius[2]; ++w) {
          if (d < 0 || h < 0 || w < 0 || d >= p_.size[0] || h >= p_.size[1] || w >= p_.size[2]) continue;
          const int64_t pixel = (d * p_.size[1] + h) * p_.size[2] + w;
          if (label(n, pixel) != y) continue;
          window.pixels.push_back(pixel);
          window.a.push_back(
              std::min({p_.axis_weight[0][std::abs(d - at[0])], p_.axis_weight[1][std::abs(h - at[1])],
                        p_.axis_weight[2][std::abs(w - at[2])]}));
          total += p_.normalize == RegionNormalize::weight ? window.a.back() : 1;
        }
    for (double& a : window.a) a /= total;
    return window;
  }

  std::vector<double> pooled(int64_t n, const Window& window) const {
    std::vector<double> z(p_.classes);
    for (int64_t c = 0; c < p_.classes; ++c)
      for (size_t i = 0; i < window.pixels.size(); ++i) z[c] += window.a[i] * logit(n, c, window.pixels[i]);
    return z;
  }

  double pooled_probability(int64_t n, const Window& window, int64_t c) const {
    double v = 0;
    for (size_t i = 0; i < window.pixels.size(); ++i) v += window.a[i] * probability(n, window.pixels[i], c);
    return v;
  }

  // Adds s * d l_q / d x_p for every pixel p of the window.
  void scatter(int64_t n, int64_t y, const Window& window, double s, double lse_q,
               std::vector<double>& grad) const {
    const auto add = [&](int64_t c, int64_t pixel, double g) {
      grad[(n * p_.classes + c) * pixels() + pixel] += g;
    };
    if (p_.merge == RegionMerge::probs) {
      for (int64_t j = 0; j < p_.classes; ++j) {
        const double slope = s * share(j, y) / pooled_probability(n, window, j);
        for (size_t i = 0; slope != 0 && i < window.pixels.size(); ++i) {
          const int64_t pixel = window.pixels[i];
          const double g = slope * window.a[i] * probability(n, pixel, j);
          for (int64_t c = 0; c < p_.classes; ++c) add(c, pixel, g * (probability(n, pixel, c) - (c == j)));
        }
      }
      return;
    }
    const std::vector<double> z = pooled(n, window);
    double mass = 0;
    for (int64_t c = 0; c < p_.classes; ++c) mass += share(c, y);
    for (int64_t c = 0; c < p_.classes; ++c) {
      const double g = mass * std::exp(z[c] - lse_q) - share(c, y);
      for (size_t i = 0; i < window.pixels.size(); ++i) add(c, window.pixels[i], s * window.a[i] * g);
    }
  }

  const RegionCrossEntropyParams& p_;
};

}  // namespace dynplan::kernels
