// torch.classes.dynplan.WeightWatch(tensors): whether they are as they were when it was made.
//
// A tensor has changed if it counts another version, if its storage, its place in it, its shape or its dtype is
// another, or if one of a few of its cache lines is: fused optimizers, writes through `tensor.data` and those of
// other processes count no version, but change nearly every element. Contents are looked at on the CPU only;
// elsewhere a look would wait for the device.
//
// It keeps storages alive, so that no new one can come to lie at the address of one seen before, but no tensor:
// torch.utils.swap_tensors asks for tensors that nobody else holds. Who asks holds their Python objects, and has
// seen that these were not swapped (python/object_checks.h, dicts_are).
//
// The integrations ask before each forward. Asking 192 tensors through Python cost 0.1 to 0.2 ms of a short
// text's forward, since the weights streamed before have left nothing of theirs in cache; here the misses
// overlap. Calling a method of a torch class costs 0.1 ms then too, so that the question is asked through
// `_C.weights_are_unchanged(watch.handle())`.
#include "ops/weight_watch.h"

#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace dynplan {
namespace {

uint32_t version(const c10::TensorImpl* impl) {
  return impl->version_counter().current_version();
}

const void* counter(const c10::TensorImpl* impl) {
  const void* address;
  static_assert(sizeof(c10::VariableVersion) == sizeof(address));
  std::memcpy(&address, static_cast<const void*>(&impl->version_counter()), sizeof(address));
  return address;
}

const c10::StorageImpl* storage(const c10::TensorImpl* impl) {
  return impl->unsafe_storage().unsafeGetStorageImpl();
}

constexpr int64_t kLine = 64;  // bytes

class WeightWatch;

// All that are alive, by handle. Never destroyed: the last of them may outlive it.
struct Watches {
  std::mutex mutex;
  std::unordered_map<int64_t, const WeightWatch*> alive;
  int64_t next = 0;
};

Watches& watches() {
  static Watches* all = new Watches;
  return *all;
}

class WeightWatch : public torch::CustomClassHolder {
 public:
  explicit WeightWatch(const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& tensor : tensors) {
      const c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
      TORCH_CHECK_VALUE(impl->has_storage(), "WeightWatch: expected tensors with a storage, got ",
                        tensor.toString());
      // A tensor made under inference_mode counts no versions, and never will.
      const bool counts = !tensor.is_inference();
      const c10::IntArrayRef sizes = impl->sizes(), strides = impl->strides();
      seen_.push_back({impl, storage(impl), storage(impl)->data(), impl->storage_offset(), impl->dtype(),
                       sizes.size(), counts ? version(impl) : 0, counts, counter(impl)});
      storages_.push_back(impl->unsafe_storage());
      shapes_.insert(shapes_.end(), sizes.begin(), sizes.end());
      shapes_.insert(shapes_.end(), strides.begin(), strides.end());
      if (tensor.is_cpu() && tensor.numel() > 0 && storage(impl)->data() != nullptr) sample(tensor);
    }
    const std::lock_guard lock(watches().mutex);
    handle_ = watches().next++;
    watches().alive.emplace(handle_, this);
  }

  ~WeightWatch() override {
    const std::lock_guard lock(watches().mutex);
    watches().alive.erase(handle_);
  }

  int64_t handle() const { return handle_; }

  bool unchanged() const {
    // No early way out where a tensor has changed, and what comes next is prefetched: the loads of many
    // tensors shall be under way together.
    constexpr size_t kAhead = 24;
    bool same = true;
    const int64_t* shape = shapes_.data();
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (i + kAhead < seen_.size()) {
        const char* next = reinterpret_cast<const char*>(seen_[i + kAhead].impl);
        for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(next + line);
        __builtin_prefetch(seen_[i + kAhead].counter);
        __builtin_prefetch(seen_[i + kAhead].storage);
      }
      const Seen& seen = seen_[i];
      const c10::IntArrayRef sizes(shape, seen.dim), strides(shape + seen.dim, seen.dim);
      same &= (!seen.counts || version(seen.impl) == seen.version) && storage(seen.impl) == seen.storage &&
              seen.storage->data() == seen.data && seen.impl->storage_offset() == seen.offset &&
              seen.impl->dtype() == seen.dtype && seen.impl->sizes() == sizes &&
              seen.impl->strides() == strides;
      shape += 2 * seen.dim;
    }
    if (!same) return false;  // the pieces may lie in memory that is gone
    const char* was = contents_.data();
    for (size_t i = 0; i < pieces_.size(); ++i) {
      if (i + kAhead < pieces_.size()) __builtin_prefetch(pieces_[i + kAhead].at);
      same &= std::memcmp(pieces_[i].at, was, pieces_[i].bytes) == 0;
      was += pieces_[i].bytes;
    }
    return same;
  }

 private:
  struct Seen {
    const c10::TensorImpl* impl;
    const c10::StorageImpl* storage;
    const void* data;
    int64_t offset;
    caffe2::TypeMeta dtype;
    size_t dim;
    uint32_t version;
    bool counts;
    const void* counter;  // where the version is counted: to be prefetched, never to be read
  };
  struct Piece {
    const char* at;
    size_t bytes;
  };

  void add(const char* at, int64_t bytes) {
    pieces_.push_back({at, static_cast<size_t>(bytes)});
    contents_.insert(contents_.end(), at, at + bytes);
  }

  // A few pieces, spread over the tensor by the golden ratio: lines where it is dense, else elements. Integers
  // are small tables, of positions or token types: all of them.
  void sample(const at::Tensor& tensor) {
    const char* data = static_cast<const char*>(tensor.const_data_ptr());
    const int64_t size = tensor.element_size(), numel = tensor.numel();
    const bool dense = tensor.is_non_overlapping_and_dense();
    const bool table = !tensor.is_floating_point() && !tensor.is_complex() && numel <= 4096;
    if (table && dense) return add(data, numel * size);
    const int64_t count = table ? numel : tensor.dim() > 1 || !dense ? 2 : 1;
    for (int64_t k = 0; k < count; ++k) {
      const double share = 0.5 + static_cast<double>(k) * 0.6180339887498949;
      int64_t index = table ? k : static_cast<int64_t>((share - static_cast<int64_t>(share)) * numel);
      if (dense) {
        // Weights begin at a multiple of a line; where one does not, its pieces lie on two.
        const int64_t begin = index * size / kLine * kLine;
        add(data + begin, std::min(kLine, numel * size - begin));
        continue;
      }
      int64_t place = 0;
      for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
        place += index % tensor.size(d) * tensor.stride(d);
        index /= tensor.size(d);
      }
      add(data + place * size, size);
    }
  }

  int64_t handle_;
  std::vector<Seen> seen_;
  std::vector<c10::Storage> storages_;  // kept alive
  std::vector<int64_t> shapes_;         // sizes and strides, tensor after tensor
  std::vector<Piece> pieces_;
  std::vector<char> contents_;  // of the pieces, one after another, as they were
};

}  // namespace

std::optional<bool> weights_are_unchanged(int64_t handle) {
  const std::lock_guard lock(watches().mutex);
  const auto found = watches().alive.find(handle);
  if (found == watches().alive.end()) return std::nullopt;
  return found->second->unchanged();
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<std::vector<at::Tensor>>())
      .def("handle", &WeightWatch::handle);
}

}  // namespace dynplan
