// The geometry of the CPU kernels.
//
// Work is cut into units, each a tile of rows and columns, marched along the outermost spatial axis (so
// images are read as depth x 1 x width): planes of the march live in rings in scratch, already widened to T,
// with the halo that windows need; rings fit the second-level cache. The units depend on shapes alone, so
// results do not depend on the number of threads.
#pragma once

#include <cstdlib>
#include <memory>

#include "kernels/region_cross_entropy/params.h"
#include "kernels/simd/vec.h"

namespace dynplan::kernels::DYNPLAN_ISA {

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Scratch memory that grows. It holds zeros at first, then what was left there.
template <class T>
class Scratch {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      const int64_t bytes = ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
      memory_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      std::memset(memory_.get(), 0, bytes);
      capacity_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> memory_;
  int64_t capacity_ = 0;
};

// share[e]: what a row of values adds to centres e rows away, where weights are sums of nested boxes: of the
// value of the centres' own column and `both(x)`, the sum of those x columns to either side.
template <class S, int kRadius, class Both>
DYNPLAN_INLINE void row_shares(const typename S::V* steps, typename S::V own, Both both,
                               typename S::V (&share)[kRadius + 1]) {
  typename S::V level[kRadius + 1];
  level[0] = own;
#pragma GCC unroll 7
  for (int x = 1; x <= kRadius; ++x) level[x] = level[x - 1] + both(x);
  share[kRadius] = S::product(steps[kRadius], level[kRadius]);
#pragma GCC unroll 7
  for (int e = kRadius - 1; e >= 0; --e) share[e] = share[e + 1] + steps[e] * level[e];
}

// Half-open box of pixels of one image.
struct Box {
  int64_t begin[3], end[3];

  int64_t extent(int axis) const { return end[axis] - begin[axis]; }
  // Whether row (d, h) is one of the box.
  bool holds(int64_t d, int64_t h) const {
    return d >= begin[0] && d < end[0] && h >= begin[1] && h < end[1];
  }
  Box row() const { return {{begin[0], begin[1], begin[2]}, {end[0], begin[1] + 1, end[2]}}; }
  Box grown(const int* radius, int times) const {
    Box box = *this;
    for (int axis = 0; axis < 3; ++axis) {
      box.begin[axis] -= times * radius[axis];
      box.end[axis] += times * radius[axis];
    }
    return box;
  }
};

// How images are cut into boxes, one unit of work each.
class Tiling {
 public:
  // `columns`: columns of a tile's cross-section that fit in cache; `march`: planes between two restarts;
  // `strip`: planes handled at once.
  Tiling(int64_t batch, const int64_t (&size)[3], int64_t columns, int64_t march, int64_t strip)
      : batch_(batch) {
    const bool flat = size[1] == 1;
    // The cross-section of a volume is a tile about four times as wide as high: halos cost least where they
    // are contiguous.
    const int64_t width = static_cast<int64_t>(std::sqrt(4.0 * static_cast<double>(columns)));
    cut(2, size[2], flat ? columns : larger(32, width), 16);
    cut(1, size[1], flat ? 1 : larger(4, columns / length_[2]), 1);
    cut(0, size[0], march, strip);
  }

  // Room for rings that cost `bytes` per column.
  static constexpr int64_t kScratchBytes = 320 * 1024;  // of a second-level cache of 512 KiB or more
  static int64_t columns(int64_t bytes) { return larger(64, kScratchBytes / larger(1, bytes)); }

  // Every restart recomputes about 2 r planes.
  static int64_t march(const RegionCrossEntropyParams& p) { return 64 + 8 * p.radius[0]; }

  int64_t units() const { return batch_ * count_[0] * count_[1] * count_[2]; }

  // Box of a unit, and the image it is of.
  int64_t box(int64_t unit, Box& box) const {
    for (int axis = 2; axis >= 0; --axis) {
      box.begin[axis] = unit % count_[axis] * length_[axis];
      box.end[axis] = smaller(size_[axis], box.begin[axis] + length_[axis]);
      unit /= count_[axis];
    }
    return unit;
  }

 private:
  // Even lengths of about `most`, multiples of `grain`.
  void cut(int axis, int64_t size, int64_t most, int64_t grain) {
    size_[axis] = size;
    const int64_t count = larger(1, ceil_div(size, larger(1, most)));
    length_[axis] = larger(1, ceil_div(ceil_div(size, count), grain)) * grain;
    count_[axis] = ceil_div(size, length_[axis]);  // none of an image without pixels
  }

  int64_t batch_, size_[3], count_[3], length_[3];
};

// Planes of a march, kept for as long as a window reaches back: rows of `width` columns, `classes` to a pixel
// row.
template <class T>
struct Ring {
  T* data = nullptr;
  Box box{};  // columns and rows of a plane
  int64_t planes = 0;
  int64_t class_stride = 0, row_stride = 0, plane_stride = 0;

  // Room for `planes` planes of the cross-section of `region`.
  // Other columns than before hold zeros at first, if those outside the image have to be `finite`.
  void reset(Scratch<T>& scratch, const Box& region, int64_t classes, int64_t keep, bool finite = false) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const bool same_columns = box.begin[2] == region.begin[2] && box.end[2] == region.end[2];
    box = region;
    planes = keep;
    // Vectors run up to one over the end. An odd number of cache lines keeps classes out of each other's
    // sets.
    class_stride =
        (ceil_div(box.extent(2) + kWideBytes / static_cast<int64_t>(sizeof(T)), kLine) | 1) * kLine;
    row_stride = class_stride * classes;
    plane_stride = row_stride * box.extent(1);
    data = scratch.get(plane_stride * planes + kLine);
    if (finite && !same_columns) std::memset(data, 0, plane_stride * planes * sizeof(T));
  }

  // d may lie before the image.
  T* plane(int64_t d) const {
    const int64_t slot = d % planes;
    return data + (slot < 0 ? slot + planes : slot) * plane_stride;
  }
  int64_t offset(int64_t d, int64_t h, int64_t w) const {
    return plane(d) - data + (h - box.begin[1]) * row_stride + (w - box.begin[2]);
  }
  T* at(int64_t d, int64_t h, int64_t w) const { return data + offset(d, h, w); }
};

template <class A>
void exchange(A& a, A& b) {
  const A kept = a;
  a = b;
  b = kept;
}

// Columns of a ring before those of the box: room for windows and for the vectors beside a tile, such that
// tiles of the box begin with a cache line.
template <class T>
int64_t ring_margin(const RegionCrossEntropyParams& p) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kBeside = larger(2 * kRegionMaxRadius, kWideBytes / sizeof(T) + 1);
  return p.radius[2] == 0 ? 0 : ceil_div(kBeside, kLine) * kLine;
}

inline bool is_image(const RegionCrossEntropyParams& p) {
  return p.size[0] == 1 && p.radius[0] == 0;
}

// In marching order.
inline bool is_stepless_image(const RegionCrossEntropyParams& p) {
  const bool flat = p.size[1] == 1 && p.radius[1] == 0;
  return flat && p.stride[0] == 1 && p.stride[1] == 1 && p.stride[2] == 1;
}

// Marching order: images become height x 1 x width.
inline RegionCrossEntropyParams marched(RegionCrossEntropyParams p) {
  if (!is_image(p)) return p;
  exchange(p.size[0], p.size[1]);
  exchange(p.anchors[0], p.anchors[1]);
  exchange(p.stride[0], p.stride[1]);
  exchange(p.radius[0], p.radius[1]);
  exchange(p.input_stride[2], p.input_stride[3]);
  exchange(p.target_stride[1], p.target_stride[2]);
  for (int i = 0; i <= kRegionMaxRadius; ++i) exchange(p.axis_weight[0][i], p.axis_weight[1][i]);
  return p;
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
