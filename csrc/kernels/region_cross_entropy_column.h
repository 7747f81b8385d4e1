// The windows round one vector of columns of an image, from the top of a band of rows to its bottom: made
// from labels once, for the sums of all classes and of both directions (region_cross_entropy_roll.h).
//
// Sums roll down a column: a row of pixels is added to all centres whose windows hold it, and the oldest of
// them is then complete. Pixels count only with the centre's label, which may be another in every lane, so
// each pass rolls down with one label at a time in every lane: it may take up the next label where no window
// of the last one reaches. The centres of a boundary between two labels take two passes, over the rows round
// the boundary; lanes and rows of many labels go pixel by pixel.
#pragma once

#include "kernels/region_cross_entropy_window.h"

namespace dynplan::kernels::DYNPLAN_ISA {

template <class T>
class ColumnPlan {
 public:
  using S = Simd<T>;
  using V = typename S::V;
  using M = typename S::M;
  using Mask = typename S::Mask;
  using Int = typename S::Int;
  static constexpr int kPasses = 3;

  // Rows of pixels, all of which agree in all lanes with the label of the pass, as do the centres that they
  // complete (`plain`), or not.
  struct Piece {
    int64_t begin, end;
    bool plain;
  };
  // Rows of centres, without a gap longer than a window, and the pieces of [begin + radius, end + radius).
  struct Run {
    int64_t begin, end;
    const Piece *first, *last;
  };
  struct Pass {
    std::unique_ptr<M[]> label;     // of each row of pixels
    std::unique_ptr<Mask[]> agree;  // pixels that have it, 2 radius + 1 columns to a row
    std::unique_ptr<Mask[]> mine;   // centres of this pass
    std::unique_ptr<Run[]> runs;
    std::unique_ptr<Piece[]> pieces;
    int num_runs = 0;
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
    for (Pass& pass : passes_) {
      pass.label.reset(new M[rows]());
      pass.agree.reset(new Mask[rows * (2 * radius + 1)]);
      pass.mine.reset(new Mask[rows]);
      pass.runs.reset(new Run[rows]);
      pass.pieces.reset(new Piece[2 * rows]);
    }
    by_pixel_.reset(new bool[rows]);
    tap_rows_.reset(new TapRow[rows]);
    taps_.reset();
    rows_ = rows;
  }

  // Centres are in rows [begin, end), `radius` rows from either end of `labels`, whose first is that of the
  // first lane. (Windows depend on labels alone; which pass sums a centre has no influence on its bits, but
  // whether one does has: a centre's sums repeat if its column is planned over the same rows.)
  void make(const Int* labels, int64_t row_stride, int64_t begin, int64_t end) {
    labels_ = labels;
    row_stride_ = row_stride;
    begin_ = begin;
    end_ = end;
    num_passes_ = 0;
    if (noisy())
      std::memset(by_pixel_.get() + begin_, true, end_ - begin_);
    else
      find_passes();
    for (int k = 0; k < num_passes_; ++k) find_runs(k);
    find_taps();
  }

  int num_passes() const { return num_passes_; }
  const Pass& pass(int k) const { return passes_[k]; }
  int num_tap_rows() const { return num_tap_rows_; }
  const TapRow& tap_row(int i) const { return tap_rows_[i]; }
  const Tap& tap(int64_t i) const { return taps_[i]; }
  M labels(int64_t row, int64_t x = 0) const { return S::load(labels_ + row * row_stride_ + x); }

 private:
  // Whether labels change from most pixels to the next.
  bool noisy() const {
    M changes{};
    for (int64_t row = begin_ + 1; row < end_; ++row) changes += labels(row) != labels(row - 1);
    return S::bits(changes < S::fill_int(static_cast<Int>((begin_ - end_) / 2))) == (1u << S::lanes) - 1;
  }

  // Gives every centre to the first pass that has its label or is free to take it. Pass k has label now[k]
  // since a centre in row last[k].
  void find_passes() {
    M now[kPasses], last[kPasses];
    for (int64_t row = begin_; row < end_; ++row) {
      const M own = labels(row);
      if (num_passes_ > 0 && S::all(own == now[0])) {  // as in most rows
        last[0] = S::fill_int(static_cast<Int>(row));
        for (int k = 0; k < num_passes_; ++k) {
          passes_[k].label[row + radius_] = now[k];
          passes_[k].mine[row] = S::mask(S::fill_int(k == 0 ? -1 : 0));
        }
        by_pixel_[row] = false;
        continue;
      }
      M left = own >= 0;
      for (int k = 0; k < kPasses; ++k) {
        Pass& pass = passes_[k];
        if (k == num_passes_) {
          if (k > 0 && !S::bits(left)) break;
          num_passes_ = k + 1;
          now[k] = S::fill_int(-2);
          last[k] = S::fill_int(-4 * kRegionMaxRadius);
          for (int64_t before = begin_; before < row; ++before) pass.mine[before] = Mask{};
        }
        const M same = (own == now[k]) & left;
        const M free = (last[k] < S::fill_int(static_cast<Int>(row - 2 * radius_))) & left & ~same;
        if (S::bits(free)) {
          now[k] = free ? own : now[k];
          for (int64_t before = row - radius_; before < row + radius_; ++before)
            pass.label[before] = free ? own : pass.label[before];
        }
        const M mine = same | free;
        last[k] = mine ? S::fill_int(static_cast<Int>(row)) : last[k];
        left &= ~mine;
        pass.label[row + radius_] = now[k];
        pass.mine[row] = S::mask(mine);
      }
      by_pixel_[row] = S::bits(left) != 0;
      for (int k = 0; by_pixel_[row] && k < num_passes_; ++k) passes_[k].mine[row] = Mask{};
    }
  }

  // The first pass writes all rows but those that go by pixel, so that the others can add to them.
  bool takes(int k, int64_t row) const { return k == 0 ? !by_pixel_[row] : S::any(passes_[k].mine[row]); }

  void find_runs(int k) {
    Pass& pass = passes_[k];
    pass.num_runs = 0;
    Piece* piece = pass.pieces.get();
    int64_t seen = begin_ - radius_;  // rows of pixels before it have been compared
    for (int64_t row = begin_; row < end_; ++row) {
      if (!takes(k, row)) continue;
      Run run{row, row + 1, piece, piece};
      for (int64_t next = row + 1; next < end_ && next <= run.end + 2 * radius_; ++next)
        if (takes(k, next)) run.end = next + 1;
      for (int64_t at = larger(seen, row - radius_); at < row + radius_; ++at) compare(pass, at);
      for (int64_t at = row + radius_; at < run.end + radius_; ++at) {
        const bool plain = S::full(S::both(compare(pass, at), pass.mine[at - radius_]));
        if (at == row + radius_ || plain != piece[-1].plain) *piece++ = {at, at, plain};
        piece[-1].end = at + 1;
      }
      run.last = piece;
      pass.runs[pass.num_runs++] = run;
      seen = run.end + radius_;
      row = run.end - 1;
    }
  }

  // Lanes of which all pixels of a row agree.
  Mask compare(Pass& pass, int64_t row) {
    const M label = pass.label[row];
    Mask* agree = pass.agree.get() + row * (2 * radius_ + 1);
    Mask all = S::mask(S::fill_int(-1));
    for (int x = -radius_; x <= radius_; ++x) {
      *agree = S::equal(labels(row, x), label);
      all = S::both(all, *agree++);
    }
    return all;
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
  int radius_ = 0, num_passes_ = 0;
  Pass passes_[kPasses];
  std::unique_ptr<bool[]> by_pixel_;  // centres whose windows no pass sums
  int num_tap_rows_ = 0;
  std::unique_ptr<TapRow[]> tap_rows_;
  std::unique_ptr<Tap[]> taps_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
