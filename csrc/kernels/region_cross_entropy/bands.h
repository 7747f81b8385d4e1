// Merged logits of images, stride 1, windows as wide as high. A unit of work is a band of rows, marched
// through from left to right in blocks of columns: merge the anchors of a block, a few classes at a time and
// vector by vector from the top of the band to its bottom; turn what is merged into losses and gradients g_q;
// gather g over the windows of a block kLag columns further back. What is made of merged vectors is the
// stage's: that of the forward, of the backward, or of both at once.
//
// Rows are counted from the first that the gradients of a band depend on, two radii above it.
#pragma once

#include "kernels/region_cross_entropy/gradient.h"
#include "kernels/region_cross_entropy/windows_rolling.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Rows of logits have to be dense and in full precision: they are read in short pieces, class by class. The
// smallest windows cost less by taps.
template <class T>
bool takes_bands(const RegionCrossEntropyParams& p) {
  const bool dense = p.input_stride[4] == 1 && (p.logit == RegionDtype::f32 || p.logit == RegionDtype::f64);
  bool square = is_stepless_image(p) && p.radius[0] == p.radius[2] && p.radius[2] != 1 &&
                p.merge == RegionMerge::logits;
  for (int i = 0; square && i <= p.radius[2]; ++i) square = p.axis_weight[0][i] == p.axis_weight[2][i];
  return dense && square && p.input_size[0] == 0;
}

template <class T, class Stage>
class Band {
 public:
  using S = typename ColumnPlan<T>::S;
  using Int = typename S::Int;

  // Bands whose anchors, and what is asked for ahead, leave room in the second-level cache for what is read
  // and written; with or without a gradient alike, so that a loss has the same bits.
  static Tiling tiling(const RegionCrossEntropyParams& p) {
    // Of a second-level cache of 512 KiB or more.
    constexpr int64_t kBytes = (kBlock > 32 ? 320 : 256) * 1024;
    const int64_t bytes = 2 * kWidth * p.classes * static_cast<int64_t>(sizeof(T));
    const int64_t rows = kBytes / larger(1, bytes) - 3 * p.radius[0];
    return Tiling(p.batch, p.size, p.size[2], larger(32, smaller(rows, Tiling::march(p))), 1);
  }

  Band(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
       const RegionCrossEntropyGrad& grad)
      : p_(params),
        r_(p_.radius[2]),
        grad_(grad),
        direct_(kGradient ? DirectRows<T>(params, grad) : DirectRows<T>()),
        extent_(1 + (p_.batch - 1) * p_.input_stride[0] + (p_.classes - 1) * p_.input_stride[1] +
                (p_.size[0] - 1) * p_.input_stride[2] + (p_.size[2] - 1) * p_.input_stride[4]),
        label_rows_(params),
        stage_(params, state, grad),
        roll_(params),
        in_place_(roll_.keeps_infinity()) {}

  // upcoming() tells which unit will probably be the next.
  template <class Upcoming>
  PowerSum run(const Tiling& tiling, int64_t unit, const Upcoming& upcoming) {
    const bool asked_for = unit == next_unit_;
    n_ = tiling.box(unit, box_);
    next_unit_ = -1;
    reset();
    if (!asked_for) logits_ahead(n_, box_, 0).prefetch_all();
    PowerSum total;
    for (int64_t x = 0; x - (kGradient ? kLag : 0) < p_.size[2]; x += kBlock) {
      if (next_unit_ < 0 && !goes_on(x)) {
        next_unit_ = upcoming();
        next_n_ = next_unit_ < tiling.units() ? tiling.box(next_unit_, next_) : -1;
      }
      if (x < p_.size[2]) merge(x);
      if constexpr (kGradient) gather(x);
    }
    for (int64_t row = first_; row < last_; ++row)
      stage_.end(row - first_, n_, image_row(row), 0, box_, 0, labels(row, 0), total);
    return total;
  }

  const RegionBadLabel& bad() const { return label_rows_.bad(); }

 private:
  static constexpr bool kGradient = Stage::kGradient;
  static constexpr int64_t kLag = larger(8, S::lanes), kBlock = larger(32, 3 * kLag),
                           kWidth = kBlock + 2 * kLag;
  static constexpr int64_t kPlans = (kBlock + kLag) / S::lanes;
  static_assert(kLag >= kRegionMaxRadius && kLag % S::lanes == 0);

  int64_t image_row(int64_t row) const { return box_.begin[0] - 2 * r_ + row; }
  // Whether blocks after that at x have logits of their own.
  bool goes_on(int64_t x) const { return x + kBlock + kLag < p_.size[2]; }
  int64_t inside(int64_t x) const { return smaller(x, p_.size[2]); }
  Int* labels(int64_t row, int64_t x) const { return labels_.data + row * labels_.row_stride + kLag + x; }
  ColumnPlan<T>& plan(int64_t w) { return plans_[w / S::lanes % kPlans]; }

  template <class Number>
  Columns<Number> columns(Scratch<Number>& memory, int64_t classes, int64_t width) const {
    // An odd number of cache lines keeps classes out of each other's sets.
    constexpr int64_t kLine = 64 / sizeof(Number);
    const int64_t class_stride = (ceil_div(rows_ * width, kLine) | 1) * kLine;
    // Tiles of fewer rows than a strip read whole ones.
    const int64_t beyond = kRegionStrip * width + kLine;
    return {memory.get(class_stride * classes + beyond, /*zeros=*/false), class_stride, width};
  }

  void reset() {
    rows_ = box_.extent(0) + 4 * r_;
    // Anchors that windows of the band hold, and those that are merged.
    first_anchor_ = larger(r_, 2 * r_ - box_.begin[0]);
    last_anchor_ = smaller(rows_ - r_, 2 * r_ + p_.size[0] - box_.begin[0]);
    first_ = kGradient ? first_anchor_ : 2 * r_;
    last_ = kGradient ? last_anchor_ : rows_ - 2 * r_;
    staged_ = columns(staged_memory_, Roll<T>::kMostClasses, kWidth);
    anchors_ = columns(anchor_memory_, p_.classes, kWidth);
    normalizers_ = columns(normalizer_memory_, 1, kBlock);
    agreement_ = columns(agreement_memory_, stage_.counts(), kBlock);
    if (planned_rows_ < rows_)
      for (ColumnPlan<T>& plan : plans_) plan.reset(r_, rows_);
    planned_rows_ = larger(planned_rows_, rows_);
    load_labels();
    stage_.reset(box_, last_ - first_);
    for (int64_t row = first_; row < last_; ++row) stage_.begin(row - first_, n_, image_row(row), 0, box_);
  }

  void load_labels() {
    labels_ = columns(label_memory_, 1, ceil_div(p_.size[2] + 2 * kLag + S::lanes, 16) * 16);
    std::memset(labels_.data, 0xff, labels_.class_stride * sizeof(Int));  // -1 outside the image
    for (int64_t row = 0; row < rows_; ++row)
      if (const int64_t d = image_row(row); d >= 0 && d < p_.size[0])
        label_rows_.load(n_, d, 0, 0, p_.size[2], labels(row, 0));
  }

  // Anchors of columns [x, x + kBlock).
  void merge(int64_t x) {
    // Tiles are whole: their columns beyond the image are ignored pixels.
    const int64_t end = x + ceil_div(inside(x + kBlock) - x, S::lanes) * S::lanes;
    for (int64_t w = x; w < end; w += S::lanes) {
      plan(w).make(labels(0, w), labels_.row_stride, first_anchor_, last_anchor_);
      const Columns<T> to{normalizers_.data + (w - x), 0, normalizers_.row_stride};
      roll_.normalizers(plan(w), to, first_, last_);
      if (stage_.counts())
        roll_.agreement(plan(w), {agreement_.data + (w - x), 0, agreement_.row_stride}, first_, last_);
    }
    const int64_t group = classes_at_once(x, end);
    for (int64_t c = 0; c < p_.classes; c += group) {
      const int64_t classes = smaller(group, p_.classes - c);
      const auto sums = [&](const Columns<const T>& from) {
        T lowest = 0;
        for (int64_t w = x; w < end; w += S::lanes) {
          const T low = roll_.sums(plan(w), {from.data + (w - x), from.class_stride, from.row_stride},
                                   anchors(c, w - x), classes, first_, last_);
          lowest = low < lowest ? low : lowest;
        }
        return lowest;
      };
      const Columns<const T> there = logits(c, classes, x);
      if (!there.data || sums(there) < kLowestLogit<T>) sums(staged_logits(c, classes, x));
    }
    // The logits that the next block, or the next unit's first, adds to those of this one, and the gradient
    // that will be gathered.
    PrefetchAhead ahead{
        goes_on(x) ? logits_ahead(n_, box_, x + kBlock + kLag) : logits_ahead(next_n_, next_, 0),
        direct_.ahead(p_, box_, n_, box_.begin[0], box_.end[0], 0, x - kLag, x - kLag + kBlock)};
    for (int64_t row = first_; row < last_; row += kRegionStrip)
      for (int64_t w = x; w < end; w += S::lanes) tile(row, w, x, ahead);
    ahead.prefetch_all();
  }

  // Of columns [begin, end).
  int64_t classes_at_once(int64_t begin, int64_t end) {
    int64_t taps = 0, rows = 0;
    for (int64_t w = begin; w < end; w += S::lanes, rows += rows_) taps += plan(w).num_tap_rows();
    return 2 * taps > rows ? Roll<T>::kMostClasses : Roll<T>::kClasses;
  }

  // Anchors of class c on, from column `w` of the block on.
  Columns<T> anchors(int64_t c, int64_t w) const {
    return {anchors_.data + c * anchors_.class_stride + 2 * kLag + w, anchors_.class_stride,
            anchors_.row_stride};
  }

  // Rows of logits that windows of the band hold.
  int64_t first_logits() const { return larger(0, image_row(first_ - r_)); }
  int64_t last_logits() const { return smaller(p_.size[0], image_row(last_ + r_)); }

  // Logits of classes c on, from column x on, where they are; null where windows of the block reach beyond
  // the tensor. (Those that reach beyond a row find pixels that do not count, and rows beyond the image are
  // not read.) What is lower than kLowestLogit shows in the sums of windows.
  Columns<const T> logits(int64_t c, int64_t classes, int64_t x) const {
    const int64_t* stride = p_.input_stride;
    const int64_t at = n_ * stride[0] + c * stride[1] + x;
    const int64_t end = at + (classes - 1) * stride[1] + (last_logits() - 1) * stride[2] + kBlock + r_;
    if (!in_place_ || at + first_logits() * stride[2] < r_ || end > extent_) return {};
    return {static_cast<const T*>(p_.input) + at + image_row(0) * stride[2], stride[1], stride[2]};
  }

  // The same, staged by read_logit.
  Columns<const T> staged_logits(int64_t c, int64_t classes, int64_t x) const {
    const int64_t first = first_logits(), begin = larger(0, x - kLag), end = inside(x + kBlock + kLag);
    T* to = staged_.data + (first - image_row(0)) * staged_.row_stride + begin - (x - kLag);
    for (int64_t k = 0; k < classes; ++k, to += staged_.class_stride)
      load_class<kWidth>(p_, n_, c + k, first, last_logits(), begin, end, to, staged_.row_stride);
    return {staged_.data + kLag, staged_.class_stride, staged_.row_stride};
  }

  // What is merged of a strip of rows of a vector, in place.
  DYNPLAN_INLINE void tile(int64_t row, int64_t w, int64_t x, PrefetchAhead& ahead) {
    const int64_t count = smaller(kRegionStrip, last_ - row), column = w - x;
    const Columns<T> here = anchors(0, column);
    MergedTile<S> merged(here.data + row * here.row_stride, here.class_stride, here.row_stride);
    AnchorTile<S> tile(ahead);
    tile.count = count;
    tile.class_stride = here.class_stride;
    for (int64_t i = 0; i < count; ++i) {
      merged.totals[i] = S::load(normalizers_.data + (row + i) * normalizers_.row_stride + column);
      tile.own[i] = S::load(labels(row + i, w));
      tile.scale[i] = merged.scale(i, tile.own[i]);
      tile.out[i] = merged.address(0, i);
      stage_.place(row - first_ + i, w, tile, i);
      if (stage_.counts())
        S::store(stage_.agreement(row - first_ + i) + w,
                 S::load(agreement_.data + (row + i) * agreement_.row_stride + column));
    }
    stage_.tile(merged, tile);
  }

  // Gradients of columns [x - kLag, x - kLag + kBlock).
  void gather(int64_t x) {
    const int64_t first = 2 * r_, last = rows_ - 2 * r_;
    const int64_t begin = larger(0, x - kLag), end = inside(x - kLag + kBlock);
    const int64_t group = classes_at_once(begin, end);
    for (int64_t c = 0; c < p_.classes; c += group) {
      const int64_t classes = smaller(group, p_.classes - c);
      const auto sums = [&](int64_t w, const Columns<T>& to) {
        const Columns<T> at = anchors(c, w - x);
        roll_.sums(plan(w), {at.data, at.class_stride, at.row_stride}, to, classes, first, last);
      };
      int64_t w = begin;
      for (; direct_.base && w + S::lanes <= end; w += S::lanes)
        sums(w, {direct_.at(n_, box_.begin[0], 0, w) + c * direct_.class_stride - first * direct_.stride[1],
                 direct_.class_stride, direct_.stride[1]});
      // Others are staged.
      for (int64_t to = w; to < end; to += S::lanes)
        sums(to, {staged_.data + (to - w), staged_.class_stride, staged_.row_stride});
      for (int64_t row = first; w < end && row < last; ++row)
        store_gradient(p_, grad_, n_, image_row(row), 0, c, c + classes, w, end,
                       staged_.data + row * staged_.row_stride, staged_.class_stride);
    }
    // What windows of the next block reach.
    for (int64_t c = 0; c < p_.classes; ++c) {
      T* at = anchors_.data + c * anchors_.class_stride + first_ * kWidth;
      for (int64_t row = first_; row < last_; ++row, at += kWidth)
        std::memcpy(at, at + kBlock, 2 * kLag * sizeof(T));
    }
  }

  // The logits of a band that a block adds whose first are those of column `begin`.
  PrefetchRows logits_ahead(int64_t n, const Box& box, int64_t begin) const {
    const int64_t width = begin == 0 ? kBlock + kLag : kBlock;
    return PrefetchRows::logits(p_, n, box.begin[0] - 2 * r_, box.end[0] + 2 * r_, 0, begin, begin + width);
  }

  const RegionCrossEntropyParams& p_;
  const int r_;
  const RegionCrossEntropyGrad& grad_;
  const DirectRows<T> direct_;
  const int64_t extent_;  // of the logits
  LabelRows<T> label_rows_;
  Stage stage_;
  const Roll<T> roll_;
  const bool in_place_;  // whether logits may be read where they are
  ColumnPlan<T> plans_[kPlans];
  int64_t planned_rows_ = 0;
  int64_t n_ = 0, next_n_ = -1, next_unit_ = -1;
  Box box_{}, next_{};
  int64_t rows_ = 0, first_anchor_ = 0, last_anchor_ = 0, first_ = 0, last_ = 0;
  Columns<Int> labels_{};
  // Of a few classes, what cannot be read or written in place: logits, [x - kLag, x + kBlock + kLag),
  // gradients.
  Columns<T> staged_{};
  Columns<T> anchors_{};  // merged vectors, then their gradients, [x - 2 kLag, x + kBlock)
  Columns<T> normalizers_{}, agreement_{};
  Scratch<Int> label_memory_;
  Scratch<T> staged_memory_, anchor_memory_, normalizer_memory_, agreement_memory_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
