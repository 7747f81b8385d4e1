// Memory on huge pages, where the system grants them.
//
// Packed weights: a short text streams every weight once, and with pages of 4 KB a product of 16 rows waits
// for page walks, which cost 5 to 8 % of the encoder (width 384, one sample, Zen 4 under a hypervisor). Large
// outputs: the first write to each page of fresh memory is a fault, which for pages of 4 KB can take longer
// than the arithmetic. (NumPy asks for huge pages too.)
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>
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

// For a new tensor of which nothing has been written.
inline void prefer_huge_pages([[maybe_unused]] const at::Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kLeast = 4 * 1024 * 1024;
  if (fresh.nbytes() < kLeast) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + fresh.nbytes()) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace dynplan
