// What the kernels must be able to trust before they follow pointers: checked by whoever calls them, worded
// once.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "kernels/encoder/packed_weights.h"

namespace dynplan::kernels {

struct DispatchView {
  const int32_t* rows;        // (L, T)
  const int32_t* cu_seqlens;  // (L, B + 1)
  const int32_t* counts;      // (L, 2)
  int64_t layers, capacity, samples;
};

// Whether rows are as build_dispatch gives them: each above the one before, all in [0, capacity).
inline bool ascend_within(const int32_t* row, int32_t count, int64_t capacity) {
  bool ascends = true;
  for (int32_t r = 1; r < count; ++r) ascends &= row[r - 1] < row[r];
  return count == 0 || (ascends && row[0] >= 0 && row[count - 1] < capacity);
}

// Whether rows are distinct and in [0, capacity), in any order; else `problem` is set.
inline bool distinct_within(const int32_t* row, int32_t count, int64_t capacity, std::string& problem) {
  std::vector<bool> taken(capacity);
  for (int32_t r = 0; r < count; ++r) {
    if (row[r] < 0 || row[r] >= capacity) {
      problem = "rows in [0, " + std::to_string(capacity) + "), got " + std::to_string(row[r]) + " at " +
                std::to_string(r);
      return false;
    }
    if (taken[row[r]]) {
      problem = "rows to be distinct, got " + std::to_string(row[r]) + " again at " + std::to_string(r);
      return false;
    }
    taken[row[r]] = true;
  }
  return true;
}

// The most active rows of any layer, or -1 with `problem` set to what was expected and what came.
inline int64_t check_dispatch(const DispatchView& d, std::string& problem) {
  const auto text = [](int64_t number) { return std::to_string(number); };
  int64_t most = 0;
  for (int64_t layer = 0; layer < d.layers; ++layer) {
    const int32_t* row = d.rows + layer * d.capacity;
    const int32_t* offset = d.cu_seqlens + layer * (d.samples + 1);
    const int32_t sequences = d.counts[2 * layer], active = d.counts[2 * layer + 1];
    if (sequences < 0 || sequences > d.samples || active < 0 || active > d.capacity) {
      problem = "counts to be at most " + text(d.samples) + " samples and " + text(d.capacity) +
                " rows, got " + text(sequences) + " and " + text(active);
      return -1;
    }
    if (offset[0] != 0 || offset[sequences] != active) {
      problem = "cu_seqlens to run from 0 to " + text(active) + ", got " + text(offset[0]) + " to " +
                text(offset[sequences]);
      return -1;
    }
    for (int32_t s = 0; s < sequences; ++s)
      if (offset[s] > offset[s + 1]) {
        problem = "cu_seqlens to ascend, got " + text(offset[s]) + " then " + text(offset[s + 1]) + " at " +
                  text(s);
        return -1;
      }
    if (!ascend_within(row, active, d.capacity) && !distinct_within(row, active, d.capacity, problem))
      return -1;
    most = most < active ? active : most;
  }
  return most;
}

// Whether a blob's header may be read where it is.
inline bool is_aligned(const void* blob) {
  return reinterpret_cast<uintptr_t>(blob) % alignof(PackedHeader) == 0;
}

struct PackedShape {
  WeightType type;
  int64_t intermediate_size;
  bool operator==(const PackedShape&) const = default;
};

// What a blob for layers of width `hidden_size` holds; nothing, with `problem` set, if it is not one.
inline std::optional<PackedShape> check_packed(const void* blob, int64_t bytes, int64_t hidden_size,
                                               std::string& problem) {
  if (!is_aligned(blob)) {
    problem = "packed_weights to begin at a multiple of " + std::to_string(alignof(PackedHeader)) +
              " bytes, got another address";
    return std::nullopt;
  }
  PackedHeader header = {};
  if (bytes >= static_cast<int64_t>(sizeof(header))) std::memcpy(&header, blob, sizeof(header));
  const bool known = header.type == WeightType::float32 || header.type == WeightType::bfloat16 ||
                     header.type == WeightType::int8;
  if (header.magic != kPackedMagic || header.version != kPackedVersion || !known ||
      header.hidden_size <= 0 || header.intermediate_size <= 0) {
    problem =
        "packed_weights to come from pack_encoder_weights or pack_reduced_encoder_weights of this version, "
        "got "
        "other bytes";
    return std::nullopt;
  }
  if (header.hidden_size != hidden_size) {
    problem = "packed_weights of width " + std::to_string(hidden_size) + ", got " +
              std::to_string(header.hidden_size);
    return std::nullopt;
  }
  // There is a byte at least for each element of a weight: no larger sizes, whose products could overflow.
  const int64_t widest = bytes / hidden_size;
  if (hidden_size > widest || header.intermediate_size > widest) {
    problem = "packed_weights to hold weights of widths " + std::to_string(hidden_size) + " and " +
              std::to_string(header.intermediate_size) + ", got " + std::to_string(bytes) + " bytes";
    return std::nullopt;
  }
  const int64_t expected = header.type == WeightType::int8
                               ? ReducedLayout(hidden_size, header.intermediate_size).bytes
                               : PackedLayout(header.type, hidden_size, header.intermediate_size).bytes();
  if (bytes != expected) {
    problem = "packed_weights to have " + std::to_string(expected) + " bytes, got " + std::to_string(bytes);
    return std::nullopt;
  }
  return PackedShape{header.type, header.intermediate_size};
}

// The one shape of all layers' blobs, pairs of address and bytes; nothing, with `problem` set, where they
// differ.
template <class Blobs>
std::optional<PackedShape> check_all_packed(const Blobs& blobs, int64_t hidden_size, std::string& problem) {
  std::optional<PackedShape> shape;
  for (const auto& [blob, bytes] : blobs) {
    const std::optional<PackedShape> found = check_packed(blob, bytes, hidden_size, problem);
    if (!found) return std::nullopt;
    if (shape && shape != found) {
      problem = "packed_weights of one feed-forward width and one type, got " +
                std::to_string(shape->intermediate_size) + " and " +
                std::to_string(found->intermediate_size) + " of types " + name(shape->type) + " and " +
                name(found->type);
      return std::nullopt;
    }
    shape = found;
  }
  return shape.value_or(PackedShape{WeightType::float32, 0});
}

}  // namespace dynplan::kernels
