// Threads that go through the stages of an encoder together, within one parallel range.
//
// The units of a stage are taken by whoever comes, in pieces that shrink towards the end: a thread that the
// machine holds up takes fewer of them. A stage is over when its units are done, not when threads have
// arrived: one thread alone gets through, and nobody waits for a thread that the pool did not grant. Which
// thread takes which piece leaves no trace in the bits.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace dynplan::kernels {

// Waits without giving up the processor at first: what is waited for takes microseconds.
template <class Ready>
void wait_until(Ready ready) {
  constexpr int kSpins = 2000;
  for (int spins = 0; !ready(); ++spins) {
    if (spins >= kSpins) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }
}

struct alignas(64) Stage {
  std::atomic<int64_t> taken{0}, done{0};
};

class Team {
 public:
  Team(int64_t stages, int64_t workers) : stages_(new Stage[stages]), workers_(workers) {}
  int64_t workers() const { return workers_; }
  Stage& stage(int64_t index) const { return stages_[index]; }

 private:
  std::unique_ptr<Stage[]> stages_;
  int64_t workers_;
};

// One thread's way through the stages; every member asks for the same ones in the same order.
class Member {
 public:
  explicit Member(const Team& team) : team_(team) {}

  // body(begin, end, next) on pieces of [0, units). Returns when all of them are done. next: where this
  // member will probably go on, if each of the others takes one piece meanwhile; `units` if nothing will be
  // left.
  template <class Body>
  void share_out(int64_t units, Body body) {
    Stage& stage = team_.stage(next_++);
    const int64_t workers = team_.workers();
    for (int64_t begin = stage.taken.load(std::memory_order_relaxed); begin < units;) {
      const auto piece = [&](int64_t from) {
        const int64_t fair = workers == 1 ? units : (units - from) / (2 * workers);
        return fair < 1 ? 1 : fair;
      };
      const int64_t end = begin + piece(begin);
      if (!stage.taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      int64_t next = end;
      for (int64_t other = 1; other < workers && next < units; ++other) next += piece(next);
      body(begin, end, next < units ? next : units);
      stage.done.fetch_add(end - begin, std::memory_order_release);
      begin = stage.taken.load(std::memory_order_relaxed);
    }
    wait_until([&] { return stage.done.load(std::memory_order_acquire) >= units; });
  }

 private:
  const Team& team_;
  int64_t next_ = 0;
};

}  // namespace dynplan::kernels
