// Padding out and in, on the CPU.
//
//   pack:   indices = flat positions b*S+s where mask[b, s], ascending; cu_seqlens[b+1] = tokens of rows 0..b;
//           packed[t, :] = hidden[indices[t], :]
//   unpack: hidden[indices[t], :] = packed[t, :] into zeros; an index of -1 marks a row to skip
//
// Rows are copied as bytes, so every dtype runs the same code. Parallel over rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/parallel.h"
#include "kernels/packing/truth.h"

namespace dynplan::kernels {

// Rows of at least this many bytes in all make a parallel range worth waking a thread for.
constexpr int64_t kCopyGrainBytes = 64 * 1024;

inline int64_t copy_grain(int64_t row_bytes) {
  return row_bytes > 0 ? (kCopyGrainBytes + row_bytes - 1) / row_bytes : kCopyGrainBytes;
}

// Writes cu_seqlens (batch + 1) and returns the number of tokens, or -1 - p where the entry at flat position p
// may not stand in a mask.
template <class Mask>
int64_t count_tokens(const Mask* mask, int64_t batch, int64_t length, int32_t* cu_seqlens) {
  int64_t total = 0;
  cu_seqlens[0] = 0;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < length; ++s) {
      const Mask entry = mask[b * length + s];
      if (!is_mask_entry(entry)) return -1 - (b * length + s);
      total += is_set(entry);
    }
    cu_seqlens[b + 1] = static_cast<int32_t>(total);
  }
  return total;
}

template <class Mask>
void token_indices(const Mask* mask, int64_t positions, int32_t* indices) {
  for (int64_t p = 0; p < positions; ++p)
    if (is_set(mask[p])) *indices++ = static_cast<int32_t>(p);
}

struct PackParams {
  const char* hidden;      // row (b, s) starts at hidden + b * batch_stride + s * length_stride
  int64_t batch_stride;    // bytes
  int64_t length_stride;   // bytes
  int64_t row_bytes;
  int64_t length;          // S
  const int32_t* indices;  // (tokens,)
  int64_t tokens;
  char* packed;            // (tokens, row_bytes), dense
};

// An index below 0 gives a row of zeros.
inline void pack_rows(const PackParams& p, Parallel parallel) {
  if (p.row_bytes == 0) return;  // there need be no memory
  parallel(p.tokens, copy_grain(p.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      char* row = p.packed + t * p.row_bytes;
      const int64_t index = p.indices[t];
      if (index < 0) {
        std::memset(row, 0, p.row_bytes);
        continue;
      }
      const char* source =
          p.hidden + (index / p.length) * p.batch_stride + (index % p.length) * p.length_stride;
      std::memcpy(row, source, p.row_bytes);
    }
  });
}

struct UnpackParams {
  const char* packed;      // (tokens, row_bytes), dense
  const int32_t* indices;  // (tokens,)
  int64_t tokens;
  int64_t row_bytes;
  char* hidden;            // (positions, row_bytes), dense, already zero
};

inline void unpack_rows(const UnpackParams& p, Parallel parallel) {
  if (p.row_bytes == 0) return;
  parallel(p.tokens, copy_grain(p.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (p.indices[t] < 0) continue;
      std::memcpy(p.hidden + p.indices[t] * p.row_bytes, p.packed + t * p.row_bytes, p.row_bytes);
    }
  });
}

}  // namespace dynplan::kernels
