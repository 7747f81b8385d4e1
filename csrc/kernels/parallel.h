// How torch-free kernels run in parallel: they are handed a Parallel and never know whose threads it drives.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace dynplan::kernels {

// A non-owning reference to a callable: what std::function would be without its allocation.
template <class Signature>
class FunctionRef;

template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& f)  // NOLINT: implicit, so that a lambda can be passed where a FunctionRef is expected
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<Args>(args)...);
        }) {}

  R operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

// body(begin, end) handles the half-open range; ranges are disjoint and cover [0, n).
using RangeBody = FunctionRef<void(int64_t begin, int64_t end)>;

// parallel(n, grain, body): ranges hold at least `grain` items, except where n itself is smaller.
using Parallel = FunctionRef<void(int64_t n, int64_t grain, RangeBody body)>;

// On the calling thread alone. (An object, not a function: FunctionRef holds the address of an object.)
inline constexpr auto serial = [](int64_t n, int64_t /*grain*/, RangeBody body) {
  if (n > 0) body(0, n);
};

}  // namespace dynplan::kernels
