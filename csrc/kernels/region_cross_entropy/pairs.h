// The inner loop for images of scattered labels, where few pixels of a window agree: sums as those of
// windows_general.h, pair by pair of pixels that do. A pair adds all classes of one pixel to those
// of the other, so rows of values are kept pixel by pixel, and sums are turned back class by class.
#pragma once

#include "kernels/region_cross_entropy/image.h"

namespace dynplan::kernels::DYNPLAN_ISA {

template <class T>
bool takes_pairs(const RegionCrossEntropyParams& p) {
  constexpr bool kVectors = sizeof(T) == 4 && DYNPLAN_VECTOR_BYTES == 32;
  return kVectors && is_stepless_image(p) && p.low[0] == 0 && (p.radius[0] > 0 || p.radius[2] > 0);
}

// Rows of values of an image, pixel by pixel, in a ring. Pixels are padded to whole vectors of classes.
template <class T>
class PixelRows {
 public:
  using N = Simd<T>;

  explicit PixelRows(int64_t classes) : classes_(classes), stride_(padded(classes)) {}

  static int64_t padded(int64_t classes) { return ceil_div(classes, N::lanes) * N::lanes; }
  int64_t stride() const { return stride_; }

  // Room for `keep` rows of `width` pixels, and a vector more.
  void reset(int64_t width, int64_t keep) {
    width_ = ceil_div(width, N::lanes) * N::lanes;
    keep_ = keep;
    row_stride_ = (width_ + kWideBytes / static_cast<int64_t>(sizeof(T))) * stride_;
    memory_.get(keep * row_stride_);
  }
  T* row(int64_t d) { return memory_.get(0) + d % keep_ * row_stride_; }

  // Row d, of which class c is at from + c * class_stride.
  void load(int64_t d, const T* from, int64_t class_stride) {
    T* const to = row(d);
    for (int64_t c = 0; c < classes_; c += N::lanes)
      for (int64_t x = 0; x < width_; x += N::lanes) {
        typename N::V v[N::lanes];
#pragma GCC unroll 8
        for (int k = 0; k < N::lanes; ++k)
          v[k] = N::load(from + smaller(c + k, classes_ - 1) * class_stride + x);
        transpose<N>(v);
#pragma GCC unroll 8
        for (int k = 0; k < N::lanes; ++k) N::store(to + (x + k) * stride_ + c, v[k]);
      }
  }

 private:
  const int64_t classes_, stride_;
  int64_t width_ = 0, keep_ = 1, row_stride_ = 0;
  Scratch<T> memory_;
};

// The numbers of the bits that are set in a byte.
typedef uint16_t BitNumbers __attribute__((vector_size(16)));
struct SetBits {
  BitNumbers of[256] = {};
  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte) {
      uint16_t set[8] = {};
      for (int bit = 0, count = 0; bit < 8; ++bit)
        if (byte >> bit & 1) set[count++] = static_cast<uint16_t>(bit);
      of[byte] = BitNumbers{set[0], set[1], set[2], set[3], set[4], set[5], set[6], set[7]};
    }
  }
};
inline constexpr SetBits kSetBits;

template <class T>
class Pairs : public ImageWindows<T> {
  using Base = ImageWindows<T>;
  using Base::classes_, Base::count_, Base::down_, Base::label_row_, Base::last_row_, Base::share_row_,
      Base::shares_, Base::value_row_, Base::values_;

 public:
  using typename Base::Int;
  using typename Base::M;
  using typename Base::S;
  using typename Base::V;
  static constexpr bool kShares = true, kFinite = false, kKeeps = true;

  Pairs(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values, int64_t classes,
        const Ring<T>* shares = nullptr)
      : Base(p, labels, values, classes, shares), pixels_(classes) {
    Base::for_taps(p, [&](int y, int x, T weight, T part) {
      if (x == 0 && y == 0) {
        own_part_ = part;
        return;
      }
      window_[num_taps_++] = {y + down_, x, weight, part};
    });
    found_.get(kRegionStrip * num_taps_ * S::lanes + 8);
    sums_.get(kRegionStrip * S::lanes * pixels_.stride());
  }

  static Pairs gathering(const RegionCrossEntropyParams& p, const Ring<Int>& labels, const Ring<T>& values,
                         const Ring<T>& shares, int64_t classes) {
    return Pairs(p, labels, values, classes, &shares);
  }

  // Another box, for which the rings are ready; `keep` rows of values are needed at a time.
  void reset(int64_t keep) { pixels_.reset(values_.box.extent(2), keep); }
  // The ring of values has row (d, h), and need not keep it.
  void load(int64_t d, int64_t h) {
    if (d >= 0 && d <= last_row_)
      pixels_.load(d, values_.at(d, h, values_.box.begin[2]), values_.class_stride);
  }

  // As Pool's.
  void aim(int64_t d, int64_t h, int64_t count, bool /*anchors*/) {
    this->aim_rows(d, h, count, [&](int64_t row) { return pixels_.row(row); });
    Tap* tap = taps_;
    for (int64_t i = 0; i < count; ++i)
      for (int t = 0; t < num_taps_; ++t) {
        const auto [y, x, weight, part] = window_[t];
        *tap++ = {label_row_[i + y] + x, value_row_[i + y] + x * pixels_.stride(),
                  shares_ ? share_row_[i + y] + x : nullptr, sums_of(i), weight};
      }
  }

  void run(int64_t column, const TileOutput<T>& out, V* totals) {
    if (shares_)
      add<true>(column, nullptr);
    else
      add<false>(column, totals);
    for (int64_t i = 0; i < count_; ++i) by_class(i, out.row[i], out.class_stride);
  }

 private:
  using N = typename PixelRows<T>::N;  // vectors of classes
  struct WindowTap {
    int y, x;  // from the window's first row, and from its middle column
    T weight, part;
  };
  // The same of a row of the strip, at column 0, and where its sums are.
  struct Tap {
    const Int* labels;
    const T *pixels, *share;
    T* sums;
    T weight;
  };
  typedef uint16_t AnyCodes __attribute__((vector_size(16), aligned(2)));

  T* sums_of(int64_t i) { return sums_.get(0) + i * S::lanes * pixels_.stride(); }

  template <bool kGather>
  void add(int64_t column, V* totals) {
    for (int64_t i = 0; i < count_; ++i) start<kGather>(i, column);
    add_pairs<kGather>(column, find<kGather>(column, totals));
  }

  // Sums of row i begin with what the centres have themselves.
  template <bool kGather>
  void start(int64_t i, int64_t column) {
    const int64_t stride = pixels_.stride();
    T* const sums = sums_of(i);
    const M valid = S::load(label_row_[i + down_] + column) >= 0;
    alignas(64) T share[S::lanes];
    if constexpr (kGather) S::store(share, S::masked(valid, S::load(share_row_[i + down_] + column)));
    const T* const here = value_row_[i + down_] + column * stride;
    for (int lane = 0; lane < S::lanes; ++lane)
      for (int64_t c = lane * stride; c < (lane + 1) * stride; c += N::lanes)
        N::store(sums + c, kGather ? share[lane] * N::load(here + c)
                                   : N::masked(N::fill_int(valid[lane]), N::load(here + c)));
  }

  // The tile's pairs, each as the number of its tap and its lane. Without branches: which pixels agree is not
  // to be foreseen.
  template <bool kGather>
  int64_t find(int64_t column, V* totals) {
    uint16_t* found = found_.get(0);
    const Tap* tap = taps_;
    const int num_taps = num_taps_;
    BitNumbers first{};  // code of the tap's first lane
    for (int64_t i = 0; i < count_; ++i) {
      M own = S::load(label_row_[i + down_] + column);
      const M valid = own >= 0;
      own = valid ? own : S::fill_int(-2);  // agrees with none
      V total = S::masked(valid, S::fill(own_part_));
      for (int t = 0; t < num_taps; ++t, ++tap) {
        const M agrees = S::load(tap->labels + column) == own;
        if constexpr (!kGather) total += S::masked(agrees, S::fill(window_[t].part));
        const unsigned bits = S::bits(agrees);
        for (int lane = 0; lane < S::lanes; lane += 8, first += 8) {
          const unsigned byte = bits >> lane & 0xff;
          *reinterpret_cast<AnyCodes*>(found) = first + kSetBits.of[byte];
          found += std::popcount(byte);
        }
      }
      if constexpr (!kGather) totals[i] = total;
    }
    return found - found_.get(0);
  }

  template <bool kGather>
  void add_pairs(int64_t column, int64_t count) {
    const int64_t stride = pixels_.stride(), shift = column * stride;
    const uint16_t* const found = found_.get(0);
    for (int64_t k = 0; k < count; ++k) {
      const Tap& tap = taps_[found[k] / S::lanes];
      const int64_t lane = found[k] % S::lanes;
      T weight = tap.weight;
      if constexpr (kGather) weight *= tap.share[column + lane];
      const T* const from = tap.pixels + shift + lane * stride;
      T* const to = tap.sums + lane * stride;
      for (int64_t c = 0; c < stride; c += N::lanes)
        N::store(to + c, N::load(to + c) + weight * N::load(from + c));
    }
  }

  // Turns the sums round: class c to out + c * class_stride.
  void by_class(int64_t i, T* out, int64_t class_stride) {
    const T* const sums = sums_of(i);
    for (int64_t c = 0; c < classes_; c += N::lanes, out += N::lanes * class_stride)
      for (int lane = 0; lane < S::lanes; lane += N::lanes) {
        typename N::V v[N::lanes];
#pragma GCC unroll 8
        for (int k = 0; k < N::lanes; ++k) v[k] = N::load(sums + (lane + k) * pixels_.stride() + c);
        transpose<N>(v);
#pragma GCC unroll 8
        for (int k = 0; k < N::lanes; ++k)
          if (c + k < classes_) N::store(out + k * class_stride + lane, v[k]);
      }
  }

  static constexpr int kAcross = 2 * kRegionMaxRadius + 1;
  PixelRows<T> pixels_;
  Scratch<T> sums_;  // of a tile, pixel by pixel
  Scratch<uint16_t> found_;
  int num_taps_ = 0;  // of a window, without its centre
  WindowTap window_[kAcross * kAcross];
  Tap taps_[kRegionStrip * kAcross * kAcross];
  T own_part_ = 0;  // the centre's
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
