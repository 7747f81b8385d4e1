// Truth values as tensors hold them. A bool's byte may be any: PyTorch makes such tensors (a view of uint8)
// and takes whatever is not 0 as true, where a C++ bool of another byte than 0 and 1 is undefined, and may be
// counted as its byte in one place and as 1 in the next.
#pragma once

#include <cstdint>
#include <type_traits>

namespace dynplan::kernels {

struct Truth {
  uint8_t byte;
};

// What a kernel reads of a tensor of Element.
template <class Element>
using TruthOr = std::conditional_t<std::is_same_v<Element, bool>, Truth, Element>;

constexpr bool is_set(Truth entry) {
  return entry.byte != 0;
}
template <class Integer>
constexpr bool is_set(Integer entry) {
  return entry != 0;
}

// Whether an entry may stand in a mask: an integer says 0 or 1.
constexpr bool is_mask_entry(Truth) {
  return true;
}
template <class Integer>
constexpr bool is_mask_entry(Integer entry) {
  return entry == 0 || entry == 1;
}

// An entry as an error shows it.
constexpr int64_t shown(Truth entry) {
  return entry.byte;
}
template <class Integer>
constexpr int64_t shown(Integer entry) {
  return entry;
}

// Of a buffer of bools.
inline const Truth* truths(const void* bools) {
  return static_cast<const Truth*>(bools);
}

}  // namespace dynplan::kernels
