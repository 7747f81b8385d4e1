// Stand-ins for the PTX of kernels/cuda/mma.cuh. Copies are put off to the wait that may have let them
// happen, as late as the device may do them: a kernel that reads before its wait, or waits for too few
// groups, reads poison.
#pragma once

#include <deque>

#include "cuda_runtime.h"

namespace cuda_emulation {

struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
};

struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

// One queue a thread; emptied when a new block starts in it, as a block that has ended waits for nothing.
inline AsyncCopies& async_copies() {
  static std::map<unsigned, AsyncCopies> threads;
  static Block* block = nullptr;
  static uint3 index = {};
  Block* const now = &Block::current();
  if (block != now || index.x != ::blockIdx.x || index.y != ::blockIdx.y || index.z != ::blockIdx.z) {
    threads.clear();
    block = now;
    index = ::blockIdx;
  }
  return threads[Block::current().running()];
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
    Block::current().fail("cp.async: an address is not a multiple of 16");
  async_copies().open.push_back({shared, valid ? global : nullptr});
}

inline void commit_copies() {
  AsyncCopies& copies = async_copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kPending>
void wait_copies() {
  AsyncCopies& copies = async_copies();
  while (copies.groups.size() > kPending) {
    for (const AsyncCopy& copy : copies.groups.front()) {
      if (copy.global)
        std::memcpy(copy.shared, copy.global, 16);
      else
        std::memset(copy.shared, 0, 16);
    }
    copies.groups.pop_front();
  }
}

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    Block::current().fail("ldmatrix: an address is not a multiple of 16");
  const void* const* rows = exchange(0xFFFFFFFFu, row);
  for (unsigned m = 0; m < 4; ++m)
    std::memcpy(&matrix[m], static_cast<const char*>(rows[8 * m + lane() / 4]) + lane() % 4 * 4, 4);
}

inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    Block::current().fail("ldmatrix: an address is not a multiple of 16");
  const void* const* rows = exchange(0xFFFFFFFFu, row);
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned e = 0; e < 2; ++e)
      std::memcpy(&pair[e], static_cast<const char*>(rows[8 * m + lane() % 4 * 2 + e]) + lane() / 4 * 2, 2);
    std::memcpy(&matrix[m], pair, 4);
  }
}

// mma.m16n8k16, from the layouts of the PTX manual: register a[r] of lane l holds row l / 4 + 8 * (r % 2),
// columns 2 * (l % 4) + 8 * (r / 2) and the next; b[r] rows 2 * (l % 4) + 8 * r and the next of column l / 4.
template <class Decode>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Decode decode) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const Registers mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const Registers* all = exchange(0xFFFFFFFFu, mine);
  const auto element = [&](uint32_t bits, unsigned k) {
    return decode(static_cast<uint16_t>(k % 2 ? bits >> 16 : bits));
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = lane() / 4, upper = e / 2, column = 2 * (lane() % 4) + e % 2;
    for (unsigned k = 0; k < 16; ++k)
      sum[e] += element(all[4 * row + k % 8 / 2].a[upper + 2 * (k / 8)], k) *
                element(all[4 * column + k % 8 / 2].b[k / 8], k);
  }
}

}  // namespace cuda_emulation
