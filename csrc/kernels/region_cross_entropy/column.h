// The windows round one vector of columns of an image, from the top of a band of rows to its bottom: made
// from labels once, for the sums of all classes and of both directions (windows_rolling.h).
//
// Sums roll down a column: a row of pixels is added to all centres whose windows hold it, and the oldest of
// them is then complete. Pixels count only with the centre's label, which may be another in every lane. So
// what a row adds is summed for one label at a time in every lane, and added to the centres that have it:
// once in most rows, twice where a boundary between two labels crosses the windows of a lane both ways. Lanes
// and rows of many labels go pixel by pixel.
#pragma once

#include "kernels/region_cross_entropy/geometry.h"

namespace dynplan::kernels::DYNPLAN_ISA {

template <class T>
class ColumnPlan {
 public:
  using S = Simd<T, kWideBytes>;
  using V = typename S::V;
  using M = typename S::M;
  using Mask = typename S::Mask;
  using Int = typename S::Int;

  // What a row of pixels adds may be of all that windows hold of it (`plain`), or of those `pixels` that have
  // the label, and be added to all centres or to those `centres` that have it; or of both, once or more.
  // `none` of its pixels count.
  enum class Kind { none, plain, pixels, centres, both };
  // Rows of pixels.
  struct Piece {
    int64_t begin, end;
    Kind kind;
  };
  // A pixel that agrees with some centre of a row that goes by pixel: its place from the first lane of that
  // row, and its distance.
  struct Tap {
    int16_t y, x;
    int distance;
    Mask agree;
  };
  struct TapRow {
    int64_t row, begin, end;  // its centres, and its taps
  };

  // For columns of `rows` rows.
  void reset(int radius, int64_t rows) {
    radius_ = radius;
    across_ = 2 * radius + 1;
    pieces_.reset(new Piece[rows]);
    share_.reset(new int64_t[rows + 1]);
    masks_.reset(new Mask[rows * kMostShares * 2 * across_]);
    by_pixel_.reset(new bool[rows]);
    tap_rows_.reset(new TapRow[rows]);
    taps_.reset();
    rows_ = rows;
  }

  // Centres are in rows [begin, end), `radius` rows from either end of `labels`, whose first is that of the
  // first lane. (Windows depend on labels alone; in which share a row is added to a centre has no influence
  // on its bits, but whether it goes by pixel has: a centre's sums repeat if its column is planned over the
  // same rows.)
  void make(const Int* labels, int64_t row_stride, int64_t begin, int64_t end) {
    labels_ = labels;
    row_stride_ = row_stride;
    begin_ = begin;
    end_ = end;
    num_pieces_ = 0;
    const bool by_pixel = noisy();
    std::memset(by_pixel_.get() + begin_, by_pixel, end_ - begin_);
    if (!by_pixel) find_pieces();
    find_taps();
  }

  // In order, and without gaps from `radius` rows above the centres to as many below; none if all centres go
  // by pixel.
  const Piece* pieces() const { return num_pieces_ > 0 ? pieces_.get() : nullptr; }
  // What a row adds: shares [share(row), share(row + 1)), of which only the first has a part in the centre
  // `radius` rows below it.
  int64_t share(int64_t row) const { return share_[row]; }
  // Of each share: its pixels, from `radius` columns before the lanes' own to as many after, and its centres,
  // from `radius` rows above the row to as many below.
  const Mask* pixels(int64_t share) const { return masks_.get() + share * 2 * across_; }
  const Mask* centres(int64_t share) const { return pixels(share) + across_; }

  int num_tap_rows() const { return num_tap_rows_; }
  const TapRow& tap_row(int i) const { return tap_rows_[i]; }
  const Tap& tap(int64_t i) const { return taps_[i]; }

 private:
  static constexpr int64_t kMostShares = 4;  // to a row

  M labels(int64_t row, int64_t x = 0) const { return S::load(labels_ + row * row_stride_ + x); }

  // Whether labels change from most pixels to the next.
  bool noisy() const {
    M changes{};
    for (int64_t row = begin_ + 1; row < end_; ++row) changes += labels(row) != labels(row - 1);
    return S::bits(changes < S::fill_int(static_cast<Int>((begin_ - end_) / 2))) == (1u << S::lanes) - 1;
  }

  void find_pieces() {
    int64_t changed = begin_;  // the last centre that has another label than the one above it in some lane
    share_[begin_ - radius_] = 0;
    for (int64_t row = begin_ - radius_; row < end_ + radius_; ++row) {
      const int64_t newest = row + radius_;
      if (newest > begin_ && newest < end_ && !S::all(labels(newest) == labels(newest - 1))) changed = newest;
      share_[row + 1] = share_[row];
      const Kind kind = find_shares(row, changed);
      if (num_pieces_ == 0 || kind != pieces_[num_pieces_ - 1].kind)
        pieces_[num_pieces_++] = {row, row, kind};
      pieces_[num_pieces_ - 1].end = row + 1;
    }
  }

  // `changed`: the last of the row's centres that has another label than the one above it.
  Kind find_shares(int64_t row, int64_t changed) {
    const int64_t first = larger(row - radius_, begin_), last = smaller(row + radius_, end_ - 1);
    const Int* at = labels_ + row * row_stride_;
    const M label = S::fill_int(*at), own = labels(last);
    M same = S::load(at + radius_) == label;
    for (int x = -radius_; x < radius_; x += S::lanes) same &= S::load(at + x) == label;
    const bool one = S::all(same), alike = changed <= first;
    if (one && *at < 0) return Kind::none;
    if (one && alike && S::all(own == label)) return Kind::plain;
    if (alike) {
      add_pixels(row, own >= 0 ? own : S::fill_int(-2));
      ++share_[row + 1];
      return Kind::pixels;
    }
    if (one) {
      add_centres(row, label, first, last);
      ++share_[row + 1];
      return Kind::centres;
    }
    if (!find_two_shares(row, first, last)) find_mixed_shares(row, first, last);
    return Kind::both;
  }

  // Where centres have no labels but the newest's and the oldest's, as most have.
  bool find_two_shares(int64_t row, int64_t first, int64_t last) {
    const M newest = labels(last), oldest = labels(first);
    M others{};
    for (int64_t i = first + 1; i < last; ++i) {
      const M own = labels(i);
      others |= (own >= 0) & (own != newest) & (own != oldest);
    }
    if (S::bits(others)) return false;
    M finds_newest{}, finds_oldest{};
    for (int x = -radius_; x <= radius_; ++x) {
      const M pixel = labels(row, x);
      finds_newest |= pixel == newest;
      finds_oldest |= pixel == oldest;
    }
    finds_newest &= newest >= 0;
    finds_oldest &= (oldest >= 0) & (oldest != newest);
    const M none = S::fill_int(-2), both = finds_newest & finds_oldest;
    add_share(row, finds_newest ? newest : finds_oldest ? oldest : none, first, last);
    if (S::bits(both)) add_share(row, both ? oldest : none, first, last);
    return true;
  }

  // Labels that centres have left, the newest centre's first, as long as some pixel of the row has them.
  void find_mixed_shares(int64_t row, int64_t first, int64_t last) {
    M left[2 * kRegionMaxRadius + 1];
    for (int64_t i = first; i <= last; ++i) left[i - first] = by_pixel_[i] ? S::fill_int(-1) : labels(i);
    for (int64_t shares = 0;; ++shares) {
      M label = S::fill_int(-2), found{};
      for (;;) {
        M next = S::fill_int(-2);
        for (int64_t i = 0; i <= last - first; ++i) next = left[i] >= 0 ? left[i] : next;
        const M open = (next >= 0) & ~found;
        if (!S::bits(open)) break;
        label = open ? next : label;
        found = M{};
        for (int x = -radius_; x <= radius_; ++x) found |= labels(row, x) == label;
        for (int64_t i = 0; i <= last - first; ++i) left[i] |= left[i] == label;  // -1: done
      }
      if (!S::bits(found) && shares > 0) return;
      if (shares < kMostShares) {
        add_share(row, label, first, last);
      } else {
        for (int64_t i = first; i <= last; ++i)
          if (S::bits((labels(i) == label) & found)) by_pixel_[i] = true;
      }
    }
  }

  void add_share(int64_t row, M label, int64_t first, int64_t last) {
    add_pixels(row, label);
    add_centres(row, label, first, last);
    ++share_[row + 1];
  }
  // The next share of a row, of those pixels that have a label.
  void add_pixels(int64_t row, M label) {
    Mask* to = masks_.get() + share_[row + 1] * 2 * across_;
    for (int x = -radius_; x <= radius_; ++x) *to++ = S::equal(labels(row, x), label);
  }
  // The same of centres.
  void add_centres(int64_t row, M label, int64_t first, int64_t last) {
    Mask* to = masks_.get() + share_[row + 1] * 2 * across_ + across_;
    for (int64_t i = row - radius_; i <= row + radius_; ++i)
      *to++ = i < first || i > last ? Mask{} : S::equal(labels(i), label);
  }

  // (Kept without branches: most pixels agree nowhere.)
  void find_taps() {
    num_tap_rows_ = 0;
    int64_t taps = 0;
    for (int64_t row = begin_; row < end_; ++row) {
      if (!by_pixel_[row]) continue;
      if (!taps_) taps_.reset(new Tap[rows_ * (2 * radius_ + 1) * (2 * radius_ + 1)]);
      const M own = labels(row);
      TapRow& found = tap_rows_[num_tap_rows_++];
      found = {row, taps, taps};
      for (int y = -radius_; y <= radius_; ++y)
        for (int x = -radius_; x <= radius_; ++x) {
          const M agree = (labels(row + y, x) == own) & (own >= 0);
          const int distance = std::abs(y) > std::abs(x) ? std::abs(y) : std::abs(x);
          taps_[taps] = {static_cast<int16_t>(y), static_cast<int16_t>(x), distance, S::mask(agree)};
          taps += S::bits(agree) != 0;
        }
      found.end = taps;
    }
  }

  const Int* labels_ = nullptr;
  int64_t rows_ = 0, row_stride_ = 0, begin_ = 0, end_ = 0;
  int radius_ = 0, across_ = 1, num_pieces_ = 0;
  std::unique_ptr<Piece[]> pieces_;
  std::unique_ptr<int64_t[]> share_;
  std::unique_ptr<Mask[]> masks_;
  std::unique_ptr<bool[]> by_pixel_;  // centres whose windows are not summed by rows
  int num_tap_rows_ = 0;
  std::unique_ptr<TapRow[]> tap_rows_;
  std::unique_ptr<Tap[]> taps_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
