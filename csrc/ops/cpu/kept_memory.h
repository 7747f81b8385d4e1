// Large gradients, whose memory is kept for the next of the same size.
//
// A training step asks for a gradient and gives it back; the system clears fresh pages on their first write.
// Whether malloc keeps what it is given depends on what else the process has freed.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "ops/cpu/huge_pages.h"

namespace dynplan {

// One block, or none.
class KeptMemory {
 public:
  static constexpr size_t kLeast = size_t{4} << 20, kMost = size_t{128} << 20;  // bytes

  // (Never destroyed: tensors may outlive static objects.)
  static KeptMemory& instance() {
    static auto* const memory = new KeptMemory();
    return *memory;
  }

  // The block, if it has this size; else it is let go, for sizes have changed.
  void* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    void* block = std::exchange(block_, nullptr);
    if (bytes_ == bytes) return block;
    std::free(block);
    return nullptr;
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::free(std::exchange(block_, block));
    bytes_ = bytes;
  }

 private:
  std::mutex mutex_;
  void* block_ = nullptr;
  size_t bytes_ = 0;
};

// As at::empty_like, dense on CPU.
inline at::Tensor empty_like_in_kept_memory(const at::Tensor& like) {
  const size_t bytes = static_cast<size_t>(like.numel()) * like.itemsize();
  if (bytes < KeptMemory::kLeast || bytes > KeptMemory::kMost) {
    at::Tensor fresh = at::empty_like(like);
    prefer_huge_pages(fresh);
    return fresh;
  }
  void* block = KeptMemory::instance().take(bytes);
  const bool kept = block != nullptr;
  if (!kept && posix_memalign(&block, 64, bytes) != 0) throw std::bad_alloc();
  c10::profiledCPUMemoryReporter().New(block, bytes);
  const bool dense = like.is_non_overlapping_and_dense();
  const auto strides = dense ? like.strides().vec() : at::infer_dense_strides(like.sizes(), like.strides());
  at::Tensor tensor = at::from_blob(
      block, like.sizes(), strides,
      [bytes](void* data) {
        c10::profiledCPUMemoryReporter().Delete(data);
        KeptMemory::instance().give(data, bytes);
      },
      like.options());
  if (!kept) prefer_huge_pages(tensor);
  return tensor;
}

}  // namespace dynplan
