#include "ops/weight_watch.h"

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace dynplan {
namespace {

// Those that Python holds, by number.
class Registry {
 public:
  int64_t add(std::shared_ptr<const WatchedTensors> tensors) {
    const std::lock_guard lock(mutex_);
    held_.emplace(++last_, std::move(tensors));
    return last_;
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    held_.erase(number);
  }
  std::shared_ptr<const WatchedTensors> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = held_.find(number);
    return found == held_.end() ? nullptr : found->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const WatchedTensors>> held_;
  int64_t last_ = 0;
};

// Never destroyed: Python may let go of its watches after static objects have gone.
Registry& registry() {
  static Registry& one = *new Registry;
  return one;
}

class WeightWatch : public torch::CustomClassHolder {
 public:
  explicit WeightWatch(std::vector<at::Tensor> tensors)
      : tensors_(std::make_shared<const WatchedTensors>(std::move(tensors))),
        number_(registry().add(tensors_)) {}
  ~WeightWatch() override { registry().remove(number_); }
  bool unchanged() const { return tensors_->unchanged(); }
  int64_t number() const { return number_; }

 private:
  std::shared_ptr<const WatchedTensors> tensors_;
  int64_t number_;
};

uint32_t version(const c10::TensorImpl* impl) {
  return impl->version_counter().current_version();
}

const void* counter(const c10::TensorImpl* impl) {
  const void* address;
  static_assert(sizeof(c10::VariableVersion) == sizeof(address));
  std::memcpy(&address, static_cast<const void*>(&impl->version_counter()), sizeof(address));
  return address;
}

// Where a tensor lies, told by the storage rather than by its address: one line of memory less to look at.
const c10::StorageImpl* storage(const c10::TensorImpl* impl) {
  return impl->unsafe_storage().unsafeGetStorageImpl();
}

}  // namespace

WatchedTensors::WatchedTensors(std::vector<at::Tensor> tensors) : owned_(std::move(tensors)) {
  for (const at::Tensor& tensor : owned_) {
    const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
    // A tensor made under inference_mode counts no versions, and never will.
    const bool counts = !tensor.is_inference();
    seen_.push_back(
        {impl, storage(impl), impl->storage_offset(), counts ? version(impl) : 0, counts, counter(impl)});
  }
}

bool WatchedTensors::unchanged() const {
  // No early way out, and what comes next is asked for: the loads of many tensors shall be under way
  // together.
  constexpr size_t kAhead = 24;
  bool same = true;
  for (size_t i = 0; i < seen_.size(); ++i) {
    if (i + kAhead < seen_.size()) {
      const char* next = reinterpret_cast<const char*>(seen_[i + kAhead].impl);
      for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(next + line);
      __builtin_prefetch(seen_[i + kAhead].counter);
    }
    const Seen& seen = seen_[i];
    same &= (!seen.counts || version(seen.impl) == seen.version) && storage(seen.impl) == seen.storage &&
            seen.impl->storage_offset() == seen.offset;
  }
  return same;
}

bool weights_unchanged(const char* op, int64_t watch) {
  const std::shared_ptr<const WatchedTensors> tensors = registry().find(watch);
  TORCH_CHECK_VALUE(tensors != nullptr, op, ": expected watch to be the number of a WeightWatch, got ",
                    watch);
  return tensors->unchanged();
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<std::vector<at::Tensor>>())
      .def("unchanged", &WeightWatch::unchanged)
      .def("number", &WeightWatch::number);
}

}  // namespace dynplan
