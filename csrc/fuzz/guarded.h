// Memory that ends where it says: guard bytes on both sides, checked when it goes, and poisoned under an address
// sanitizer, so that a read beyond the end is a finding too.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "fuzz/source.h"
#include "tests/check.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(at, bytes) static_cast<void>(at), static_cast<void>(bytes)
#define ASAN_UNPOISON_MEMORY_REGION(at, bytes) static_cast<void>(at), static_cast<void>(bytes)
#endif

namespace dynplan::fuzz {

constexpr int kGuardBytes = 128;
constexpr unsigned char kGuard = 0xa5;

template <class T>
class Guarded {
 public:
  // At any multiple of T's size, or of `alignment`.
  Guarded(Source& random, int64_t count, int64_t alignment = sizeof(T)) : count_(count) {
    const int64_t shift = random.between(0, 63) / alignment * alignment;
    front_ = kGuardBytes + shift;
    bytes_ = front_ + count * static_cast<int64_t>(sizeof(T));
    const int64_t whole = (bytes_ + kGuardBytes + 63) / 64 * 64;
    back_ = whole - bytes_;
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(64, whole));
    if (memory_ == nullptr) throw std::bad_alloc();
    std::memset(memory_, kGuard, front_);
    std::memset(memory_ + bytes_, kGuard, back_);
    ASAN_POISON_MEMORY_REGION(memory_, front_);
    ASAN_POISON_MEMORY_REGION(memory_ + bytes_, back_);
  }
  template <class Values>
  static Guarded copy_of(Source& random, const Values& values) {
    Guarded copy(random, static_cast<int64_t>(values.size()));
    for (int64_t i = 0; i < copy.size(); ++i) copy[i] = static_cast<T>(values[i]);
    return copy;
  }
  Guarded(Guarded&& other) noexcept
      : count_(other.count_), front_(other.front_), bytes_(other.bytes_), back_(other.back_),
        memory_(std::exchange(other.memory_, nullptr)) {}
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (memory_ == nullptr) return;
    ASAN_UNPOISON_MEMORY_REGION(memory_, bytes_ + back_);
    const auto whole = [](const unsigned char* at, int64_t bytes) {
      bool same = true;
      for (int64_t i = 0; i < bytes; ++i) same &= at[i] == kGuard;
      return same;
    };
    EXPECT(whole(memory_, front_) && whole(memory_ + bytes_, back_));
    std::free(memory_);
  }

  int64_t size() const { return count_; }
  T* data() { return reinterpret_cast<T*>(memory_ + front_); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + front_); }
  T* begin() { return data(); }
  T* end() { return data() + count_; }
  const T* begin() const { return data(); }
  const T* end() const { return data() + count_; }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

  Guarded& fill(T value) {
    std::fill(begin(), end(), value);
    return *this;
  }

 private:
  int64_t count_, front_ = 0, bytes_ = 0, back_ = 0;
  unsigned char* memory_ = nullptr;
};

}  // namespace dynplan::fuzz
