// Memory for packed weights, on huge pages where the system grants them.
//
// A short text streams every weight once: with pages of 4 KB a product of 16 rows waits for page walks, which
// cost 5 to 8 % of the encoder (width 384, one sample, Zen 4 under a hypervisor).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dynplan {

// uint8 (bytes,), not initialised.
inline at::Tensor empty_for_weights(int64_t bytes) {
  const at::TensorOptions options = at::TensorOptions().dtype(at::kByte);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t kHugePage = 2 * 1024 * 1024;
  const size_t whole = static_cast<size_t>(bytes) / kHugePage * kHugePage;
  if (whole > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kHugePage, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
    madvise(memory, whole, MADV_HUGEPAGE);  // advice: refused, the pages stay small
    return at::from_blob(
        memory, {bytes}, [](void* data) { std::free(data); }, options);
  }
#endif
  return at::empty({bytes}, options);
}

}  // namespace dynplan
