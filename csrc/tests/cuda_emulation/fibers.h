// Runs the threads of one CUDA block as fibers of one host thread.
//
// A fiber runs until it waits at a barrier or ends, so between two barriers the order of the
// threads is the scheduler's choice. A kernel that is right for every order gives the same bits for
// Schedule::forward, reverse and shuffled; one that lacks a barrier usually does not. Blocks run one
// after another, in the same three orders: a kernel must not wait for another block.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

namespace cuda_emulation {

enum class Schedule { forward, reverse, shuffled };

inline Schedule schedule = Schedule::forward;

// Bytes between two inaccessible pages. `at_end` puts the last byte against the upper page, so that
// one byte too far is a fault; otherwise the first byte is 256-aligned as cudaMalloc gives it, and
// what lies around the bytes is checked by intact().
class GuardedBytes {
 public:
  GuardedBytes(size_t size, bool at_end, size_t alignment = 1) : size_(size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t room = (size + alignment + page - 1) / page * page + page;
    mapped_ = room + 2 * page;
    base_ =
        static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page, room, PROT_READ | PROT_WRITE) != 0) {
      std::perror("cuda_emulation: mmap");
      std::abort();
    }
    inside_ = base_ + page;
    room_ = room;
    std::memset(inside_, kCanary, room);
    const size_t padded = (size + alignment - 1) / alignment * alignment;
    bytes_ = at_end ? inside_ + room - padded : inside_ + 256;
  }
  GuardedBytes(const GuardedBytes&) = delete;
  GuardedBytes& operator=(const GuardedBytes&) = delete;
  ~GuardedBytes() { munmap(base_, mapped_); }

  unsigned char* get() const { return bytes_; }

  bool intact() const {
    const auto is_canary = [](unsigned char byte) { return byte == kCanary; };
    return std::all_of(inside_, bytes_, is_canary) && std::all_of(bytes_ + size_, inside_ + room_, is_canary);
  }

 private:
  static constexpr unsigned char kCanary = 0xC7;
  size_t size_, mapped_, room_;
  unsigned char *base_, *inside_, *bytes_;
};

// Everything one warp needs to exchange values among the lanes of a mask.
struct WarpExchange {
  static constexpr size_t kBytesPerLane = 128;
  unsigned arrived = 0;
  uint64_t epoch = 0;
  unsigned char in[32][kBytesPerLane];
  unsigned char out[32][kBytesPerLane];
};

// A thread of execution that gives way only by its own hand. ucontext makes it; setjmp and longjmp switch,
// since swapcontext makes two system calls each time.
class Fiber {
 public:
  explicit Fiber(void (*body)()) : stack_(new unsigned char[kStackBytes]) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
  }

  void resume() {
    if (_setjmp(resumer_) != 0) return;
    if (started_) _longjmp(here_, 1);
    started_ = true;
    setcontext(&context_);
  }

  void give_way() {
    if (_setjmp(here_) == 0) _longjmp(resumer_, 1);
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  ucontext_t context_;
  std::unique_ptr<unsigned char[]> stack_;
  jmp_buf resumer_, here_;
  bool started_ = false;
};

class Block {
 public:
  // body() is the kernel call; `enter(thread)` sets threadIdx before a thread runs on.
  Block(unsigned threads, std::function<void()> body, std::function<void(unsigned)> enter)
      : body_(std::move(body)), enter_(std::move(enter)), threads_(threads), warps_((threads + 31) / 32) {}

  // Returns an empty string, or why the block could not end.
  std::string run(std::mt19937& random) {
    current_ = this;
    while (fibers_.size() < threads_.size()) fibers_.push_back(std::make_unique<Fiber>(&Block::run_fiber));
    std::vector<unsigned> order(threads_.size());
    std::iota(order.begin(), order.end(), 0u);
    if (schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
    live_ = static_cast<unsigned>(threads_.size());
    while (live_ > 0 && failure_.empty()) {
      if (schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), random);
      bool progress = false;
      for (unsigned thread : order) {
        Thread& state = threads_[thread];
        if (state.done || (state.epoch && *state.epoch == state.waits_for)) continue;
        progress = true;
        running_ = thread;
        enter_(thread);
        fibers_[thread]->resume();
        if (!failure_.empty()) break;
      }
      if (!progress && failure_.empty()) failure_ = "deadlock: threads wait at different barriers";
    }
    // What stopped half-way is not resumed.
    if (!failure_.empty()) fibers_.clear();
    current_ = nullptr;
    return failure_;
  }

  static Block& current() { return *current_; }
  unsigned running() const { return running_; }

  // Leaves the block: the launch reports `why`.
  [[noreturn]] void fail(const std::string& why) {
    failure_ = why;
    fibers_[running_]->give_way();
    std::abort();
  }

  // __syncthreads with the sum of every thread's `value`.
  int barrier(int value) {
    const uint64_t epoch = barrier_epoch_;
    barrier_sum_ += value;
    ++arrived_;
    complete_barrier();
    wait_while(&barrier_epoch_, epoch);
    return barrier_result_;
  }

  // Gives every lane of `mask` all the others' values; the lanes of `mask` must all come here.
  template <typename T>
  const T* exchange(unsigned mask, const T& value) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= WarpExchange::kBytesPerLane);
    const unsigned lane = running_ % 32;
    if (!(mask >> lane & 1)) fail("a lane calls a warp function whose mask leaves it out");
    auto& slot = warps_[running_ / 32][mask];
    if (!slot) slot = std::make_unique<WarpExchange>();
    WarpExchange* warp = slot.get();
    std::memcpy(warp->in[lane], &value, sizeof(T));
    warp->arrived |= 1u << lane;
    const uint64_t epoch = warp->epoch;
    if (warp->arrived == mask) {
      std::memcpy(warp->out, warp->in, sizeof(warp->in));
      warp->arrived = 0;
      ++warp->epoch;
    }
    wait_while(&warp->epoch, epoch);
    static T values[32];
    for (int i = 0; i < 32; ++i) std::memcpy(&values[i], warp->out[i], sizeof(T));
    return values;
  }

 private:
  struct Thread {
    const uint64_t* epoch = nullptr;  // waits while *epoch == waits_for
    uint64_t waits_for = 0;
    bool done = false;
  };

  static void run_fiber() {
    for (;;) {
      current_->body_();
      current_->end_thread();
      fibers_[current_->running_]->give_way();
    }
  }

  void end_thread() {
    threads_[running_].done = true;
    --live_;
    complete_barrier();
  }

  // Threads that have ended do not hold up a barrier, as on the device.
  void complete_barrier() {
    if (arrived_ == 0 || arrived_ < live_) return;
    barrier_result_ = barrier_sum_;
    barrier_sum_ = 0;
    arrived_ = 0;
    ++barrier_epoch_;
  }

  void wait_while(const uint64_t* epoch, uint64_t value) {
    Thread& thread = threads_[running_];
    thread.epoch = epoch;
    thread.waits_for = value;
    fibers_[running_]->give_way();
  }

  static inline Block* current_ = nullptr;
  static inline std::vector<std::unique_ptr<Fiber>> fibers_;
  std::function<void()> body_;
  std::function<void(unsigned)> enter_;
  std::vector<Thread> threads_;
  std::vector<std::map<unsigned, std::unique_ptr<WarpExchange>>> warps_;
  std::string failure_;
  unsigned running_ = 0, live_ = 0, arrived_ = 0;
  uint64_t barrier_epoch_ = 0;
  int barrier_sum_ = 0, barrier_result_ = 0;
};

}  // namespace cuda_emulation
