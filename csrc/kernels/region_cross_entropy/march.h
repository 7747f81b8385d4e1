// How a box of an image is marched through, strip by strip of planes, and the planes that are kept meanwhile.
#pragma once

#include "kernels/region_cross_entropy/rows.h"
#include "kernels/region_cross_entropy/upsampled.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Calls load(d) for the planes of the box and its halo as they are needed, and rows(d, h, count) for strips
// of rows (d + i, h) that hold anchors. Strips begin `lead` planes before the box: with a radius they are
// those of march_backward, for the last bits of sums depend on what else is in a strip.
template <class Load, class Rows>
void march_forward(const RegionCrossEntropyParams& p, const Box& box, int64_t strip, int64_t lead, Load load,
                   Rows rows) {
  const int64_t r = p.radius[0], begin = box.begin[0] - lead;
  for (int64_t d = begin - r; d < begin + r; ++d) load(d);
  for (int64_t q = begin; q < box.end[0]; q += strip) {
    const int64_t done = smaller(q + strip, box.end[0] + lead);
    for (int64_t d = q; d < done; ++d) load(d + r);
    const int64_t first = larger(0, q), last = smaller(p.size[0], done);
    if (first >= last || first % p.stride[0] != 0) continue;
    for (int64_t h = box.begin[1]; h < box.end[1]; ++h)
      if (h % p.stride[1] == 0) rows(first, h, last - first);
  }
}

// Calls load(d) for planes, anchors(d, h, count) for strips of anchors whose windows reach the box, and
// gather(d, h, count), in ascending order of d, for strips of the box as soon as their anchors are done.
template <class Load, class Anchors, class Gather>
void march_backward(const RegionCrossEntropyParams& p, const Box& box, int64_t strip, Load load,
                    Anchors anchors, Gather gather) {
  const int64_t r = p.radius[0];
  for (int64_t d = box.begin[0] - 2 * r; d < box.begin[0]; ++d) load(d);
  int64_t next = box.begin[0];
  for (int64_t q = box.begin[0] - r; q < box.end[0] + r; q += strip) {
    const int64_t done = smaller(q + strip, box.end[0] + r);
    for (int64_t d = q; d < done; ++d) load(d + r);
    const int64_t first = larger(0, q), last = smaller(p.size[0], done);
    if (first < last && first % p.stride[0] == 0)
      for (int64_t h = larger(0, box.begin[1] - p.radius[1]);
           h < smaller(p.size[1], box.end[1] + p.radius[1]); ++h)
        if (h % p.stride[1] == 0) anchors(first, h, last - first);
    while (next < box.end[0] && smaller(next + strip, box.end[0]) + r <= done) {
      const int64_t count = smaller(strip, box.end[0] - next);
      for (int64_t h = box.begin[1]; h < box.end[1]; ++h) gather(next, h, count);
      next += count;
    }
  }
}

// Planes between the oldest anchors that march_backward still gathers from and the newest.
inline int64_t planes_between(const RegionCrossEntropyParams& p, int64_t strip) {
  return 2 * p.radius[0] + 2 * strip - 1;
}

// Planes of labels and of the values that are pooled, loaded as the march reaches them: here logits.
template <class T>
class LogitPlanes {
 public:
  using Int = typename Simd<T>::Int;
  static constexpr bool kReadAgain = false;  // whether gathered gradients are worked on with the values

  explicit LogitPlanes(const RegionCrossEntropyParams& params, bool all_finite = false)
      : p_(params), label_rows_(params), interpolation_(params), finite_(all_finite) {}

  // Classes of a pixel that are pooled, and planes of them.
  int64_t channels() const { return p_.classes; }
  const Ring<T>& values() const { return logits_; }
  const Ring<Int>& labels() const { return labels_; }
  const RegionBadLabel& bad() const { return label_rows_.bad(); }

  // `halo`: radii that the values of a tile reach beyond it. `label_planes`, `value_planes`: how many are
  // kept.
  void reset(const Box& box, int halo, int64_t label_planes, int64_t value_planes) {
    Box region = box.grown(p_.radius, halo);
    region.begin[2] = box.begin[2] - ring_margin<T>(p_);
    labels_.reset(label_memory_, region, 1, label_planes);
    logits_.reset(logit_memory_, region, p_.classes, value_planes, finite_);
    std::memset(labels_.data, 0xff,
                labels_.plane_stride * label_planes * sizeof(Int));  // -1 outside the image
  }

  void load(int64_t n, int64_t d) {
    if (d < 0 || d >= p_.size[0]) {
      std::memset(labels_.plane(d), 0xff, labels_.plane_stride * sizeof(Int));
      return;
    }
    for_rows([&](int64_t h, int64_t begin, int64_t end) {
      label_rows_.load(n, d, h, begin, end, labels_.at(d, h, begin));
      if (interpolation_.enabled())
        interpolation_.load(n, d, begin, end, logits_.at(d, h, begin), logits_.class_stride);
      else
        load_logits(p_, n, d, h, begin, end, logits_.at(d, h, begin), logits_.class_stride);
      if (finite_) clear_ignored(labels_.at(d, h, begin), end - begin, logits_.at(d, h, begin));
    });
  }

  // f(h, begin, end) for the rows of a plane, and their columns inside the image.
  template <class F>
  void for_rows(F f) const {
    const Box& box = logits_.box;
    const int64_t begin = larger(0, box.begin[2]), end = smaller(p_.size[2], box.end[2]);
    for (int64_t h = larger(0, box.begin[1]); h < smaller(p_.size[1], box.end[1]); ++h) f(h, begin, end);
  }

 private:
  void clear_ignored(const Int* row_labels, int64_t count, T* row) const {
    using Wide = Simd<T, kWideBytes>;
    for (int64_t x = 0; x < count; x += Wide::lanes) {
      const typename Wide::M ignored = Wide::load(row_labels + x) < 0;
      for (int64_t c = 0; Wide::bits(ignored) && c < p_.classes; ++c) {
        T* at = row + c * logits_.class_stride + x;
        Wide::store(at, Wide::unmasked(ignored, Wide::load(at)));
      }
    }
  }

  const RegionCrossEntropyParams& p_;
  LabelRows<T> label_rows_;
  Interpolation<T> interpolation_;
  const bool finite_;  // whether logits are, where pixels do not count
  Scratch<Int> label_memory_;
  Scratch<T> logit_memory_;
  Ring<Int> labels_;
  Ring<T> logits_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
