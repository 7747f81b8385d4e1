// Tells whether tensors have been written to or moved since it first saw them.
//
// integrations/weights.py asks before each forward. Asking 192 tensors through Python cost 0.1 to 0.2 ms of a
// short text's forward, since the weights streamed before have left nothing of theirs in cache; here the
// misses overlap.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <vector>

namespace dynplan {
namespace {

class WeightWatch : public torch::CustomClassHolder {
 public:
  explicit WeightWatch(const std::vector<at::Tensor>& tensors) {
    // A tensor made under inference_mode counts no versions, and never will.
    for (const at::Tensor& tensor : tensors)
      seen_.push_back({tensor, !tensor.is_inference(), tensor.is_inference() ? 0 : tensor._version(),
                       storage(tensor), tensor.storage_offset()});
  }

  bool unchanged() const {
    // No early way out, and what comes next is asked for: the loads of many tensors shall be under way
    // together.
    bool same = true;
    for (size_t i = 0; i < seen_.size(); ++i) {
      if (i + kAhead < seen_.size()) {
        const char* next = reinterpret_cast<const char*>(seen_[i + kAhead].tensor.unsafeGetTensorImpl());
        for (size_t line = 0; line < sizeof(c10::TensorImpl); line += 64) __builtin_prefetch(next + line);
      }
      const Seen& seen = seen_[i];
      same &= (!seen.counts || seen.tensor._version() == seen.version) &&
              storage(seen.tensor) == seen.storage && seen.tensor.storage_offset() == seen.offset;
    }
    return same;
  }

 private:
  static constexpr size_t kAhead = 16;

  struct Seen {
    at::Tensor tensor;
    bool counts;
    int64_t version;
    const c10::StorageImpl* storage;
    int64_t offset;
  };

  // Where a tensor lies, told by the storage rather than by its address: one line of memory less to look at.
  static const c10::StorageImpl* storage(const at::Tensor& tensor) {
    return tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
  }

  std::vector<Seen> seen_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.class_<WeightWatch>("WeightWatch")
      .def(torch::init<const std::vector<at::Tensor>&>())
      .def("unchanged", &WeightWatch::unchanged);
}

}  // namespace dynplan
