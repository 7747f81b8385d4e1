// A device array for emulated kernels: poisoned where the kernel shall write, and guarded on both sides.
#pragma once

#include <vector>

#include "fibers.h"
#include "tests/check.h"

namespace cuda_emulation {

// Where a buffer lies: aligned as cudaMalloc gives it, or with its end against an inaccessible page (a read
// or write past the end is a fault there; its begin has only the alignment that the size leaves it).
inline bool buffers_at_end = false;

template <typename T>
class DeviceBuffer {
 public:
  // All-ones bytes: NaN, or -1. What a kernel leaves unwritten shows.
  explicit DeviceBuffer(size_t size) : size_(size), bytes_(size * sizeof(T), buffers_at_end, alignof(T)) {
    std::memset(bytes_.get(), 0xFF, size * sizeof(T));
  }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) {
    std::copy(values.begin(), values.end(), get());
  }
  ~DeviceBuffer() { EXPECT(bytes_.intact()); }

  T* get() const { return reinterpret_cast<T*>(bytes_.get()); }
  size_t size() const { return size_; }
  std::vector<T> host() const { return std::vector<T>(get(), get() + size_); }

 private:
  size_t size_;
  GuardedBytes bytes_;
};

// Runs `test` for every order of threads and both placements of buffers.
template <typename Test>
void for_every_schedule(Test test) {
  for (Schedule order : {Schedule::forward, Schedule::reverse, Schedule::shuffled}) {
    schedule = order;
    buffers_at_end = order != Schedule::forward;
    test();
  }
}

}  // namespace cuda_emulation
