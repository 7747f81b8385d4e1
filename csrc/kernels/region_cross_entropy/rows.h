// One row of labels or logits into scratch, and one row of gradient out of it: every dtype, any strides.
// Included per instruction set, as simd/vec.h says.
#pragma once

#include "kernels/region_cross_entropy/geometry.h"
#include "kernels/region_cross_entropy/params.h"

namespace dynplan::kernels::DYNPLAN_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float widen(float v) {
  return v;
}
inline double widen(double v) {
  return v;
}
inline float widen(bf16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

// Written without branches so that a loop over it becomes vector code: subnormals come out right because the
// exponent is rebiased by a multiplication.
inline float widen(f16 v) {
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 | magnitude : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(special | sign);
}

inline void narrow(float v, float& out) {
  out = v;
}
inline void narrow(double v, double& out) {
  out = v;
}

// Round to nearest even; NaN stays NaN.
inline void narrow(float v, bf16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(v == v ? rounded : (bits >> 16) | 0x40);
}

inline void narrow(float v, f16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Subnormal results: adding 0.5 leaves the rounded mantissa in the low bits.
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < 0x38800000 ? small : normal;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  out.bits = static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? large : finite));
}

// Calls f with a value of the storage type of a logit.
template <class T, class F>
void with_logit_type(RegionDtype type, F f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else {
    if (type == RegionDtype::bf16) return f(bf16{});
    if (type == RegionDtype::f16) return f(f16{});
    f(float{});
  }
}

template <class F>
void with_label_type(RegionLabel type, F f) {
  switch (type) {
    case RegionLabel::u8:
      return f(uint8_t{});
    case RegionLabel::i8:
      return f(int8_t{});
    case RegionLabel::i16:
      return f(int16_t{});
    case RegionLabel::i32:
      return f(int32_t{});
    case RegionLabel::i64:
      return f(int64_t{});
  }
}

// Logits below this are read as this: a masked class (-inf) then weighs nothing in a window that it does not
// belong to, where -inf * 0 would be NaN, and still has probability 0.
template <class T>
inline constexpr T kLowestLogit = sizeof(T) == 8 ? T(-1e300) : T(-1e36);

template <class T, class Logit>
T read_logit(Logit v) {
  const T x = widen(v);
  return x < kLowestLogit<T> ? kLowestLogit<T> : x;
}

// Rows of labels as Int: the class, or -1 where ignored.
template <class T>
class LabelRows {
 public:
  using Int = typename Simd<T>::Int;

  explicit LabelRows(const RegionCrossEntropyParams& params) : p_(params) {
    for (int i = 0; i < p_.num_ignored; ++i) ignored_class_ |= is_class(p_.ignored[i]);
  }

  // Labels [begin, end) of row (n, d, h).
  void load(int64_t n, int64_t d, int64_t h, int64_t begin, int64_t end, Int* out) {
    with_label_type(p_.label, [&](auto type) {
      using Label = decltype(type);
      const int64_t step = p_.target_stride[3];
      const Label* row = static_cast<const Label*>(p_.target) + n * p_.target_stride[0] +
                         d * p_.target_stride[1] + h * p_.target_stride[2] + begin * step;
      const bool outside = step == 1 ? convert(row, std::integral_constant<int64_t, 1>(), end - begin, out)
                                     : convert(row, step, end - begin, out);
      if (outside)
        for (int64_t x = 0; x < end - begin; ++x) check(row[x * step]);
    });
    if (!ignored_class_) return;
    for (int i = 0; i < p_.num_ignored; ++i)
      for (int64_t x = 0; x < end - begin; ++x) out[x] = out[x] == p_.ignored[i] ? Int(-1) : out[x];
  }

  const RegionBadLabel& bad() const { return bad_; }

 private:
  bool is_class(int64_t label) const { return label >= 0 && label < p_.classes; }

  template <class Label, class Step>
  bool convert(const Label* row, Step step, int64_t count, Int* out) const {
    const uint64_t classes = static_cast<uint64_t>(p_.classes);
    uint64_t outside = 0;
    for (int64_t x = 0; x < count; ++x) {
      const int64_t label = row[x * step];
      const bool in = static_cast<uint64_t>(label) < classes;
      out[x] = in ? static_cast<Int>(label) : Int(-1);
      outside |= !in;
    }
    return outside != 0;
  }

  void check(int64_t label) {
    if (is_class(label) || bad_.found) return;
    for (int i = 0; i < p_.num_ignored; ++i)
      if (p_.ignored[i] == label) return;
    bad_ = {true, label};
  }

  const RegionCrossEntropyParams& p_;
  bool ignored_class_ = false;
  RegionBadLabel bad_;
};

// Columns [begin, end) of row (n, d, h) of all classes: class c goes to out + c * class_stride.
template <class T>
void load_logits(const RegionCrossEntropyParams& p, int64_t n, int64_t d, int64_t h, int64_t begin,
                 int64_t end, T* out, int64_t class_stride) {
  with_logit_type<T>(p.logit, [&](auto type) {
    using Logit = decltype(type);
    const int64_t* stride = p.input_stride;
    const int64_t count = end - begin;
    const Logit* row = static_cast<const Logit*>(p.input) + n * stride[0] + d * stride[2] + h * stride[3] +
                       begin * stride[4];
    if (stride[4] == 1) {
      for (int64_t c = 0; c < p.classes; ++c) {
        const Logit* from = row + c * stride[1];
        T* to = out + c * class_stride;
        for (int64_t x = 0; x < count; ++x) to[x] = read_logit<T>(from[x]);
      }
      return;
    }
    // Channels-last and everything else: a few pixels at a time, so that both sides stay in the first-level
    // cache.
    constexpr int64_t kPixels = 16;
    for (int64_t first = 0; first < count; first += kPixels) {
      const int64_t last = first + kPixels < count ? first + kPixels : count;
      for (int64_t c = 0; c < p.classes; ++c)
        for (int64_t x = first; x < last; ++x)
          out[c * class_stride + x] = read_logit<T>(row[x * stride[4] + c * stride[1]]);
    }
  });
}

// Asks for the cache lines of some rows of every class, which will be used later, one at a time: between the
// arithmetic, so that memory works meanwhile. Class by class: hardware follows a class along its rows, where
// they are dense, but not as many streams as there are classes.
class PrefetchRows {
 public:
  PrefetchRows() = default;  // none
  // `rows` rows of `bytes` bytes, `row_bytes` apart: of each 64 bytes the line that they end in.
  PrefetchRows(const void* at, int64_t bytes, int64_t rows, int64_t row_bytes, int64_t classes,
               int64_t class_bytes) {
    if (bytes <= 0 || rows <= 0) return;
    if (bytes == row_bytes) bytes *= rows, rows = 1;
    at_ = class_ = row_ = static_cast<const char*>(at) + smaller(64, bytes) - 1;
    step_ = 64;
    lines_left_ = lines_ = ceil_div(bytes, 64);
    rows_left_ = rows_ = rows;
    row_bytes_ = row_bytes;
    classes_left_ = classes;
    class_bytes_ = class_bytes;
  }

  // What will be read of the logits of rows [first, last), columns [begin, end) of plane h.
  static PrefetchRows logits(const RegionCrossEntropyParams& p, int64_t n, int64_t first, int64_t last,
                             int64_t h, int64_t begin, int64_t end) {
    first = larger(0, first), last = smaller(p.size[0], last);
    begin = larger(0, begin), end = smaller(p.size[2], end);
    const int64_t* stride = p.input_stride;
    if (stride[4] != 1 || p.input_size[0] > 0 || h < 0 || h >= p.size[1]) return {};
    const int64_t bytes = p.logit == RegionDtype::f64 ? 8 : p.logit == RegionDtype::f32 ? 4 : 2;
    const int64_t pixel = n * stride[0] + first * stride[2] + h * stride[3] + begin;
    return {static_cast<const char*>(p.input) + bytes * pixel,
            bytes * (end - begin),
            last - first,
            bytes * stride[2],
            p.classes,
            bytes * stride[1]};
  }

  // (Always inline: a function that only prefetches counts as free of effects, and calls to it are dropped.)
  DYNPLAN_INLINE void prefetch_next() {
    __builtin_prefetch(at_, 0, 2);
    at_ += step_;
    if (--lines_left_ == 0) turn();
  }
  // All that are left.
  void prefetch_all() {
    while (classes_left_ > 0) prefetch_next();
  }

 private:
  void turn() {
    if (--rows_left_ > 0) {
      row_ += row_bytes_;
    } else if (--classes_left_ > 0) {
      row_ = class_ += class_bytes_;
      rows_left_ = rows_;
    } else {
      *this = {};
      return;
    }
    at_ = row_;
    lines_left_ = lines_;
  }

  // Where nothing is left, a line that is there anyway.
  const char *at_ = reinterpret_cast<const char*>(this), *row_ = nullptr, *class_ = nullptr;
  int64_t step_ = 0, lines_left_ = -1, lines_ = 0, rows_left_ = 0, rows_ = 0, row_bytes_ = 0,
          classes_left_ = 0, class_bytes_ = 0;
};

// What a strip of tiles asks for.
struct PrefetchAhead {
  PrefetchRows logits, gradient;

  // For the i-th of a tile's vectors, one or two lines each.
  template <bool kBoth>
  DYNPLAN_INLINE void prefetch_next(int64_t i) {
    if (kBoth || i % 2 == 0) logits.prefetch_next();
    if (kBoth || i % 2 != 0) gradient.prefetch_next();
  }
  void prefetch_all() {
    logits.prefetch_all();
    gradient.prefetch_all();
  }
};

// The reverse of load_logits, for the gradient, which has its own strides.
template <class T>
void store_gradient(const RegionCrossEntropyParams& p, const RegionCrossEntropyGrad& grad, int64_t n,
                    int64_t d, int64_t h, int64_t begin, int64_t end, const T* in, int64_t class_stride) {
  with_logit_type<T>(p.logit, [&](auto type) {
    using Logit = decltype(type);
    const int64_t* stride = grad.grad_input_stride;
    const int64_t count = end - begin;
    Logit* row = static_cast<Logit*>(grad.grad_input) + n * stride[0] + d * stride[2] + h * stride[3] +
                 begin * stride[4];
    constexpr int64_t kPixels = 16;
    const int64_t block = stride[4] == 1 ? count : kPixels;
    for (int64_t first = 0; first < count; first += block) {
      const int64_t last = first + block < count ? first + block : count;
      for (int64_t c = 0; c < p.classes; ++c) {
        const T* from = in + c * class_stride;
        Logit* to = row + c * stride[1];
        if (stride[4] == 1)
          for (int64_t x = first; x < last; ++x) narrow(from[x], to[x]);
        else
          for (int64_t x = first; x < last; ++x) narrow(from[x], to[x * stride[4]]);
      }
    }
  });
}

}  // namespace dynplan::kernels::DYNPLAN_ISA
