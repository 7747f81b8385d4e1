// The gradient: a march of three stages, r planes apart. Load values; merge them and turn each anchor's
// merged vector into its gradient g_q = s_q / Z_q * d l_q / d z_q; gather g over the windows that hold a
// pixel. Windows and agreement are symmetric, so every output is written once, in a fixed order. The second
// stage is that of the backward here, that of loss_and_gradient.h, or that of probabilities.h.
#pragma once

#include "kernels/region_cross_entropy/loss.h"

namespace dynplan::kernels::DYNPLAN_ISA {

// Where rows of gradient can be written as they are made: dense rows of T.
template <class T>
struct DirectRows {
  T* base = nullptr;
  int64_t stride[4] = {}, class_stride = 0;

  DirectRows() = default;
  explicit DirectRows(const RegionCrossEntropyParams& p, const RegionCrossEntropyGrad& grad) {
    const bool same = p.logit == (sizeof(T) == 8 ? RegionDtype::f64 : RegionDtype::f32);
    if (!same || grad.grad_input_stride[4] != 1 || p.input_size[0] > 0) return;
    base = static_cast<T*>(grad.grad_input);
    stride[0] = grad.grad_input_stride[0];
    for (int axis = 1; axis < 4; ++axis) stride[axis] = grad.grad_input_stride[axis + 1];
    class_stride = grad.grad_input_stride[1];
  }
  T* at(int64_t n, int64_t d, int64_t h, int64_t w) const {
    return base + n * stride[0] + d * stride[1] + h * stride[2] + w * stride[3];
  }
  // What will be written of rows [first, last), columns [begin, end) of plane h of the box.
  PrefetchRows ahead(const RegionCrossEntropyParams& p, const Box& box, int64_t n, int64_t first,
                     int64_t last, int64_t h, int64_t begin, int64_t end) const {
    first = larger(box.begin[0], first), last = smaller(box.end[0], last);
    begin = larger(box.begin[2], begin), end = smaller(box.end[2], end);
    if (!base || h < box.begin[1] || h >= box.end[1]) return {};
    constexpr int64_t kBytes = sizeof(T);
    return {at(n, first, h, begin), kBytes * (end - begin), last - first, kBytes * stride[1], p.classes,
            kBytes * class_stride};
  }
};

// Slopes and logsumexps of a strip of anchors, by column from the first of the ring of anchors.
template <class T>
class SlopeRows {
 public:
  SlopeRows(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
            const RegionCrossEntropyGrad& grad)
      : p_(params), lse_(static_cast<const T*>(state.lse)), slopes_(params, state, grad) {}

  void reset(const Box& anchors, int64_t rows) { rows_.reset(memory_, anchors.row(), 2, rows); }

  T* slopes(int64_t i) { return rows_.data + i * rows_.plane_stride; }
  T* lse(int64_t i) { return slopes(i) + rows_.class_stride; }

  // Row (d, h), the i-th of its strip. Where there is no anchor slopes are 0, and logsumexps so large that
  // exponentials are finite.
  void load(int64_t i, int64_t n, int64_t d, int64_t h, const Box& anchors) {
    std::memset(slopes(i), 0, rows_.class_stride * sizeof(T));
    const AnchorRow row(p_, n, d, h, larger(0, anchors.begin[2]), smaller(p_.size[2], anchors.end[2]));
    const int64_t first = row.first - anchors.begin[2];
    slopes_.row(p_, row, n, d, h, slopes(i) + first);
    if (p_.merge == RegionMerge::probs) return;  // lse is the pixels'
    T* out = lse(i);
    for (int64_t x = 0; x < rows_.class_stride; ++x) out[x] = -kLowestLogit<T>;
    if (row.step == 1)
      std::memcpy(out + first, lse_ + row.index, row.count * sizeof(T));
    else
      for (int64_t x = 0; x < row.count; ++x) out[first + x * row.step] = lse_[row.index + x];
  }

 private:
  const RegionCrossEntropyParams& p_;
  const T* lse_;
  AnchorSlopes<T> slopes_;
  Scratch<T> memory_;
  Ring<T> rows_;
};

// Anchors that windows of a box hold. Their ring has the columns of the logits', so that both pools read
// labels and values at one column.
template <class T>
Box anchor_box(const RegionCrossEntropyParams& p, const Box& box) {
  Box anchors = box.grown(p.radius, 1);
  anchors.begin[2] = box.begin[2] - ring_margin<T>(p);
  anchors.end[2] += p.radius[2];
  return anchors;
}

// What is made of the merged vectors of anchors, by a backward that reads what the forward left.
template <class T>
class SlopeAnchors {
 public:
  SlopeAnchors(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
               const RegionCrossEntropyGrad& grad)
      : p_(params), weights_(params), slopes_(params, state, grad) {}

  static constexpr bool kGradient = true;

  void reset(const Box& anchors, int64_t rows) { slopes_.reset(anchors, rows); }
  void begin(int64_t i, int64_t n, int64_t d, int64_t h, const Box& anchors) {
    slopes_.load(i, n, d, h, anchors);
  }
  template <class S>
  void place(int64_t row, int64_t column, AnchorTile<S>& tile, int64_t i) {
    tile.losses[i] = slopes_.slopes(row) + column;
    tile.lse[i] = slopes_.lse(row) + column;
  }
  static constexpr bool counts() { return false; }
  T* agreement(int64_t) { return nullptr; }
  template <class Int>
  void end(int64_t, int64_t, int64_t, int64_t, const Box&, int64_t, const Int*, PowerSum&) {}

 protected:
  const RegionCrossEntropyParams& p_;
  ClassWeights<T> weights_;
  SlopeRows<T> slopes_;
};

// s_q from the losses, softmax(z_q) from the logsumexp less the largest z_q: a small number, and so one with
// more digits.
template <class T>
class BackwardAnchors : public SlopeAnchors<T> {
  using SlopeAnchors<T>::p_, SlopeAnchors<T>::weights_;

 public:
  using SlopeAnchors<T>::SlopeAnchors;

  template <class S>
  DYNPLAN_INLINE void tile(const MergedTile<S>& merged, const AnchorTile<S>& at) {
    using V = typename S::V;
    const TileLabels<S> labels(at.own, at.count);
    V top[kRegionStrip];
    merged.tops(p_.classes, top);
    for (int64_t i = 0; i < at.count; ++i) {
      if (at.share[i]) S::store(at.share[i], S::fill(1));
      const V log_mass = S::load(at.lse[i]), share = S::load(at.losses[i]) * at.scale[i];
      V hard = share * weights_.hard;
      if (weights_.weight) hard *= weights_.template of<S>(at.own[i]);
      const V mass = hard + share * weights_.soft_sum;
      for (int64_t c = 0; c < p_.classes; ++c) {
        at.prefetch(i, c);
        V g = mass * S::exp((merged.at(c, i) - top[i]) * at.scale[i] - log_mass);
        if (weights_.soft > 0) g -= share * (weights_.soft * weights_.at(c));
        S::store(at.out[i] + c * at.class_stride, g);
      }
      labels.for_each(
          at.own[i],
          [&](int64_t c) __attribute__((always_inline)) {
            T* out = at.out[i] + c * at.class_stride;
            S::store(out, S::load(out) - S::masked(at.own[i] == static_cast<typename S::Int>(c), hard));
          },
          [&](int lane, int64_t c)
              __attribute__((always_inline)) { at.out[i][c * at.class_stride + lane] -= hard[lane]; });
    }
  }
};

// Merged logits.
template <class T>
struct LogitValues {
  using Planes = LogitPlanes<T>;
  using Loss = ForwardAnchors<T>;
  using Gradient = BackwardAnchors<T>;
};

// Anchors: the second stage.
template <class T, class Anchors, class Windows, class Values>
class RegionGradient {
 public:
  using S = typename Windows::S;
  using V = typename S::V;
  using M = typename S::M;
  using Int = typename S::Int;

  RegionGradient(const RegionCrossEntropyParams& params, const RegionCrossEntropyState& state,
                 const RegionCrossEntropyGrad& grad)
      : p_(params),
        strip_(Windows::strip(params)),
        stage_(params, state, grad),
        planes_(params, Windows::kFinite),
        merge_(params, planes_.labels(), planes_.values(), planes_.channels()),
        gather_(Windows::gathering(params, planes_.labels(), anchors_, shares_, planes_.channels())),
        merged_(planes_.channels()) {}

  // Calls store(d, h, row, class_stride) for the rows of the box, in ascending order of d, unless `direct`
  // can take them in place.
  template <class Store>
  void run(int64_t n, const Box& box, const DirectRows<T>& direct, Store store) {
    const int64_t between = planes_between(p_, strip_);
    const int64_t planes = 2 * p_.radius[0] + strip_;
    const int64_t channels = planes_.channels();
    planes_.reset(box, 2, between + p_.radius[0], kReadAgain ? between + p_.radius[0] : planes);
    anchors_.reset(anchor_memory_, anchor_box<T>(p_, box), channels, between, Windows::kFinite);
    if (Windows::kShares) shares_.reset(share_memory_, anchors_.box, 1, between);
    stage_.reset(anchors_.box, kRegionStrip);
    total_ = {};
    row_.reset(row_memory_, box.row(), channels, kRegionStrip);
    march_backward(
        p_, box, strip_, [&](int64_t d) { planes_.load(n, d); },
        [&](int64_t d, int64_t h, int64_t count) { anchor_rows(n, d, h, count, box, direct); },
        [&](int64_t d, int64_t h, int64_t count) {
          if (gather_rows(n, d, h, count, box, direct)) return;
          for (int64_t i = 0; i < count; ++i) {
            const T* const row = row_.data + i * row_.plane_stride;
            if constexpr (kReadAgain)
              planes_.gradient(d + i, h, box, row, row_.class_stride, store);
            else
              store(d + i, h, row, row_.class_stride);
          }
        });
  }

  const PowerSum& total() const { return total_; }
  const RegionBadLabel& bad() const { return planes_.bad(); }

 private:
  static constexpr bool kReadAgain = Values::Planes::kReadAgain;

  void anchor_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box,
                   const DirectRows<T>& direct) {
    // Tiles begin where the box's do.
    const int64_t before = smaller(box.begin[2], ceil_div(p_.radius[2], S::lanes) * S::lanes),
                  begin = box.begin[2] - before;
    const int64_t margin = ring_margin<T>(p_),
                  width = before + smaller(box.end[2] + p_.radius[2], p_.size[2]) - box.begin[2];
    merge_.aim(d, h, count, /*anchors=*/false);
    const Int* own[kRegionStrip];
    T* out[kRegionStrip];
    for (int64_t i = 0; i < count; ++i) {
      stage_.begin(i, n, d + i, h, anchors_.box);
      own[i] = planes_.labels().at(d + i, h, begin);
      out[i] = anchors_.at(d + i, h, begin);
    }
    const int64_t next = d + count + p_.radius[0], end = begin + width;
    PrefetchAhead ahead{PrefetchRows::logits(p_, n, next, next + strip_, h, begin, end + p_.radius[2]),
                        direct.ahead(p_, box, n, next - strip_, next, h, begin, end)};
    for (int64_t x = 0; x < width; x += S::lanes) {
      const int64_t column = margin - before + x;
      merged_.pool(merge_, column);
      AnchorTile<S> tile(ahead);
      tile.count = count;
      tile.class_stride = anchors_.class_stride;
      for (int64_t i = 0; i < count; ++i) {
        tile.own[i] = S::load(own[i] + x);
        tile.scale[i] = merged_.scale(i, tile.own[i]);
        stage_.place(i, column, tile, i);
        tile.out[i] = out[i] + x;
        if (Windows::kShares) tile.share[i] = shares_.at(d + i, h, begin) + x;
      }
      stage_.tile(merged_, tile);
    }
    ahead.prefetch_all();
    for (int64_t i = 0; i < count; ++i) stage_.end(i, n, d + i, h, box, margin, own[i] + before, total_);
  }

  // Rows go to `direct` where it can take them, else to row_. The last tile of a row in place starts where it
  // ends with the row, and repeats some columns of the one before.
  bool gather_rows(int64_t n, int64_t d, int64_t h, int64_t count, const Box& box,
                   const DirectRows<T>& direct) {
    const int64_t width = box.extent(2);
    const bool in_place = !kReadAgain && direct.base && width >= S::lanes;
    gather_.aim(d, h, count, /*anchors=*/true);
    for (int64_t column = 0; column < width; column += S::lanes) {
      const int64_t x = in_place ? smaller(column, width - S::lanes) : column;
      TileOutput<T> out{{}, in_place ? direct.class_stride : row_.class_stride};
      for (int64_t i = 0; i < kRegionStrip; ++i) {
        const int64_t row = smaller(i, count - 1);
        out.row[i] =
            in_place ? direct.at(n, d + row, h, box.begin[2] + x) : row_.data + row * row_.plane_stride + x;
      }
      // A cache line ahead: stores wait for their lines one after the other.
      constexpr int64_t kLine = 64 / sizeof(T);
      for (int64_t i = 0; in_place && column % kLine == 0 && i < count; ++i)
        for (int64_t c = 0; c < p_.classes; ++c)
          __builtin_prefetch(out.row[i] + c * out.class_stride + kLine, /*to write*/ 1);
      gather_.run(ring_margin<T>(p_) + x, out, nullptr);
    }
    return in_place;
  }

  const RegionCrossEntropyParams& p_;
  int64_t strip_;
  Anchors stage_;
  PowerSum total_;
  typename Values::Planes planes_;
  Ring<T> anchors_;  // g_q
  Ring<T> shares_;   // what they are yet to be multiplied by
  Ring<T> row_;      // a strip of gradient
  Scratch<T> anchor_memory_, share_memory_, row_memory_;
  Windows merge_, gather_;
  MergedTile<S> merged_;
};

}  // namespace dynplan::kernels::DYNPLAN_ISA
