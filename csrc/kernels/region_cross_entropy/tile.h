// The windows of a tile of centres: which rows they reach, and which pixels in them agree. Made from labels
// once, for the sums of all classes (windows_general.h).
#pragma once

#include "kernels/region_cross_entropy/geometry.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline constexpr int64_t kRegionStrip = 4;  // rows of a tile along the march, where its stride is 1

// A tile is one vector of centres in each row of a strip.
template <class T>
class TileWindows {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Mask = typename S::Mask;
  using Int = typename S::Int;
  static constexpr int kLanes = S::lanes;

  // Rows of centres to a tile.
  static int64_t strip(const RegionCrossEntropyParams& p) { return p.stride[0] == 1 ? kRegionStrip : 1; }

  // Centres are in the `count` rows (d + i, h); values, with `anchors`, only in rows that hold anchors.
  void aim(int64_t d, int64_t h, int64_t count, bool anchors) {
    count_ = count;
    for (int64_t i = 0; i < count; ++i) {
      own_[i] = labels_.at(d + i, h, labels_.box.begin[2]);
      aim_taps(i, d + i, h, anchors);
    }
    if (!nested_) return;
    const int r = p_.radius[2];
    num_rows_ = num_groups_ = 0;
    for (int ring = 0; ring <= r; ++ring) {
      if (strip_ > 1) {
        for (int64_t y : {h - ring, h + ring}) {
          if (ring > p_.radius[1] || !takes(y, 1, anchors) || (ring == 0 && num_groups_ > 0)) continue;
          ring_[num_groups_++] = ring;
          for (int64_t i = -r; i < strip_ + r; ++i) rows_[num_rows_++] = row_at(d + i, y);
        }
      } else {
        for_rows(d, h, anchors, [&](int64_t z, int64_t y) {
          if (larger(std::abs(z - d), std::abs(y - h)) != ring) return;
          ring_[num_groups_++] = ring;
          rows_[num_rows_++] = row_at(z, y);
        });
      }
    }
  }

  // Number of agreeing pixels of a vector of centres in row i.
  V agreement(int64_t i, int64_t column) {
    const M own = S::load(own_[i] + column);
    V total{};
    for (int64_t t = 0; t < tap_count_[i]; ++t)
      total += S::masked(S::load(labels_.data + column + taps_[i][t].label) == own, S::fill(1));
    return S::masked(own >= 0, total);
  }

 protected:
  // `plain`: all windows hold one label. `masked`: the centres of a column have few labels; there is a pass
  // for the first of each column, for the second, ... over the pixels that have it. `taps`: pixel by pixel,
  // whatever the labels and weights.
  enum class Kind { plain, masked, taps };
  static constexpr int kMaxPasses = 3;

  struct Row {
    int64_t label, value;  // offsets in the rings, to be added to a column
  };
  struct Tap {
    int64_t label, value;
    T weight;
  };
  struct Pass {
    int64_t begin, end;             // rows of the strip that its centres are in
    M mine[kRegionStrip];           // its centres,
    M taken[kRegionStrip];          // and those of the passes before
    std::unique_ptr<Mask[]> masks;  // its pixels, 2 r + 1 columns to a row

    void reach(int64_t i) {
      begin = smaller(begin, i);
      end = larger(end, i + 1);
    }
  };

  // `labels` holds classes, or -1. Both rings start at one column.
  TileWindows(const RegionCrossEntropyParams& params, const Ring<Int>& labels, const Ring<T>& values)
      : p_(params), labels_(labels), values_(values), strip_(strip(params)) {
    const int r = p_.radius[2];
    const int64_t rows = (2 * p_.radius[0] + strip_) * (2 * p_.radius[1] + 1);
    const int64_t taps = (2 * p_.radius[0] + 1) * (2 * p_.radius[1] + 1) * (2 * r + 1);
    for (int64_t i = 0; i < strip_; ++i) taps_[i].reset(new Tap[taps]);
    rows_.reset(new Row[rows]);
    ring_.reset(new int[rows]);
    for (Pass& pass : passes_) pass.masks.reset(new Mask[rows * (2 * r + 1)]);
    agree_.reset(new M[strip_ * taps]);
    extra_.reset(new Tap[strip_ * taps]);
    for (int axis = 0; axis < 2; ++axis) {
      if (axis == 1 && p_.size[1] == 1 && p_.radius[1] == 0) continue;
      nested_ = nested_ && p_.radius[axis] == r;
      for (int i = 0; nested_ && i <= r; ++i) nested_ = p_.axis_weight[axis][i] == p_.axis_weight[2][i];
    }
  }

  // Whether windows are of one plane of the march: a single group, of ring 0.
  bool flat() const { return strip_ > 1 && num_groups_ == 1 && ring_[0] == 0; }

  // Finds out about the tile of centres in the ring's columns [column, column + kLanes).
  void plan(int64_t column) {
    const Int label = own_[0][column];
    if (nested_ && label >= 0 && same_everywhere(column, label)) {
      kind_ = Kind::plain;
      num_passes_ = 1;
    } else if (nested_ && find_passes(column)) {
      kind_ = Kind::masked;
    } else {
      kind_ = Kind::taps;
      find_taps(column);
    }
  }

  const RegionCrossEntropyParams& p_;
  const Ring<Int>& labels_;
  const Ring<T>& values_;
  const int64_t strip_;
  bool nested_ = true;                 // all axes have one radius and one set of weights
  int64_t count_ = 0;                  // rows of centres,
  const Int* own_[kRegionStrip] = {};  // and their labels
  // Rows that windows reach, in groups: strip_ + 2 r adjacent planes at one distance |y - h| (the group's
  // ring); without a strip a single row at its distance from the centres.
  std::unique_ptr<Row[]> rows_;
  std::unique_ptr<int[]> ring_;
  int64_t num_rows_ = 0, num_groups_ = 0;

  // The planned tile.
  Kind kind_ = Kind::plain;
  int num_passes_ = 0;
  Pass passes_[kMaxPasses];
  std::unique_ptr<M[]> agree_;  // lanes that take a tap of extra_
  std::unique_ptr<Tap[]> extra_;
  int64_t first_extra_[kRegionStrip + 1];  // taps of row i: [first_extra_[i], first_extra_[i + 1])

 private:
  // Whether centres and windows have this label alone. (The centres' own rows need not be among the rows that
  // hold anchors.)
  bool same_everywhere(int64_t column, Int label) const {
    M same = S::fill_int(-1);
    for (int64_t i = 0; i < count_; ++i) same &= S::load(own_[i] + column) == label;
    const int64_t reach = 2 * p_.radius[2];
    for (int64_t row = 0; row < num_rows_; ++row) {
      const Int* labels = labels_.data + rows_[row].label + column - p_.radius[2];
      for (int64_t x = 0; x < reach; x += kLanes) same &= S::load(labels + x) == label;
      same &= S::load(labels + reach) == label;
    }
    return S::all(same);
  }

  // The passes of a masked tile, unless they are too many.
  bool find_passes(int64_t column) {
    M own[kRegionStrip], taken[kRegionStrip], label[kMaxPasses];
    for (int64_t i = 0; i < kRegionStrip; ++i) {
      own[i] = i < count_ ? S::load(own_[i] + column) : S::fill_int(-1);
      taken[i] = S::fill_int(i < count_ ? 0 : -1);  // rows that do not exist leave what they repeat
    }
    for (num_passes_ = 0;; ++num_passes_) {
      M next = own[0];  // of each column
      for (int64_t i = 1; i < kRegionStrip; ++i) next = next >= 0 ? next : own[i];
      const bool done = !S::bits(next >= 0);
      if (done && num_passes_ > 0) break;
      if (num_passes_ == kMaxPasses) return false;
      label[num_passes_] = next;
      Pass& pass = passes_[num_passes_];
      pass.begin = kRegionStrip;
      pass.end = 0;
      for (int64_t i = 0; i < kRegionStrip; ++i) {
        pass.mine[i] = (own[i] == next) & (next >= 0);
        pass.taken[i] = taken[i];
        taken[i] |= pass.mine[i];
        own[i] |= pass.mine[i];  // -1: done
        if (S::bits(pass.mine[i])) pass.reach(i);
      }
    }
    // Rows that are ignored altogether have to be written too.
    for (int64_t i = 0; i < count_; ++i)
      if (!S::bits(taken[i])) passes_[0].reach(i);
    for (int l = 0; l < num_passes_; ++l) find_pixels(passes_[l], column, label[l]);
    return true;
  }

  void find_pixels(Pass& pass, int64_t column, M label) {
    label = label >= 0 ? label : S::fill_int(-2);
    // One by one from the labels: loads that straddle what was just stored would wait for it.
    const int r = p_.radius[2];
    const int64_t begin = flat() ? pass.begin : 0, end = flat() ? pass.end + 2 * r : num_rows_;
    Mask* mask = pass.masks.get() + begin * (2 * r + 1);
    for (int64_t row = begin; row < end; ++row) {
      const Int* labels = labels_.data + rows_[row].label + column;
      for (int x = -r; x <= r; ++x) *mask++ = S::equal(S::load(labels + x), label);
    }
  }

  // (Kept without branches: most taps agree nowhere.)
  void find_taps(int64_t column) {
    int64_t extra = 0;
    for (int64_t i = 0; i < count_; ++i) {
      first_extra_[i] = extra;
      const M own = S::load(own_[i] + column);
      for (int64_t t = 0; t < tap_count_[i]; ++t) {
        const Tap& tap = taps_[i][t];
        const M agree = (S::load(labels_.data + column + tap.label) == own) & (own >= 0);
        agree_[extra] = agree;
        extra_[extra] = tap;
        extra += S::bits(agree) != 0;
      }
    }
    first_extra_[count_] = extra;
  }

  Row row_at(int64_t z, int64_t y) const {
    return {labels_.offset(z, y, labels_.box.begin[2]), values_.offset(z, y, values_.box.begin[2])};
  }

  bool takes(int64_t at, int axis, bool anchors) const { return !anchors || at % p_.stride[axis] == 0; }

  // Rows in the window of row (d, h). Those outside the image are among them: no pixel there agrees, so a
  // window that is cut is never taken for a whole one.
  template <class F>
  void for_rows(int64_t d, int64_t h, bool anchors, F f) const {
    const int* r = p_.radius;
    for (int64_t z = d - r[0]; z <= d + r[0]; ++z)
      for (int64_t y = h - r[1]; y <= h + r[1]; ++y)
        if (takes(z, 0, anchors) && takes(y, 1, anchors)) f(z, y);
  }

  void aim_taps(int64_t i, int64_t d, int64_t h, bool anchors) {
    int64_t taps = 0;
    for_rows(d, h, anchors, [&](int64_t z, int64_t y) {
      const Row row = row_at(z, y);
      const int r = p_.radius[2];
      const double rows = least(p_.axis_weight[0][std::abs(z - d)], p_.axis_weight[1][std::abs(y - h)]);
      for (int x = -r; x <= r; ++x)
        taps_[i][taps++] = {row.label + x, row.value + x,
                            static_cast<T>(least(rows, p_.axis_weight[2][std::abs(x)]))};
    });
    tap_count_[i] = taps;
  }

  static double least(double a, double b) { return a < b ? a : b; }

  std::unique_ptr<Tap[]> taps_[kRegionStrip];  // all of a row's windows
  int64_t tap_count_[kRegionStrip] = {};
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
