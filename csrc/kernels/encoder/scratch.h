// A thread's scratch memory for one parallel range. It grows to the largest block asked for (bounded by the
// block size of layer.h and one sequence's keys) and stays with the thread, so the layer loop allocates
// nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace dynplan::kernels {

class ThreadScratch {
 public:
  ThreadScratch() = default;
  ThreadScratch(const ThreadScratch&) = delete;
  ThreadScratch& operator=(const ThreadScratch&) = delete;
  ~ThreadScratch() { std::free(data_); }

  float* at_least(int64_t floats) {
    if (floats > floats_) {
      std::free(data_);
      floats_ = 0;
      const size_t bytes = (static_cast<size_t>(floats) * 4 + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      floats_ = floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t floats_ = 0;
};

inline float* thread_scratch(int64_t floats) {
  thread_local ThreadScratch scratch;
  return scratch.at_least(floats);
}

}  // namespace dynplan::kernels
