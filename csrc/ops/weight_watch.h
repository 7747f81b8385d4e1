// Tells whether tensors have been written to or moved since they were first seen.
//
// The integrations ask before each forward. Asking 192 tensors through Python cost 0.1 to 0.2 ms of a short
// text's forward, since the weights streamed before have left nothing of theirs in cache; here the misses
// overlap, and it takes 0.01.
//
// Python holds a torch.classes.dynplan.WeightWatch; an op that shall ask is given its number, since to hand
// over such an object costs eight times what the answer does.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

namespace dynplan {

class WatchedTensors {
 public:
  explicit WatchedTensors(std::vector<at::Tensor> tensors);
  bool unchanged() const;

 private:
  struct Seen {
    const c10::TensorImpl* impl;
    const c10::StorageImpl* storage;
    int64_t offset;
    uint32_t version;
    bool counts;
    const void* counter;  // where the version was counted: to be asked for, never to be read
  };
  std::vector<at::Tensor> owned_;
  std::vector<Seen> seen_;
};

// Of the WeightWatch of this number. `op` is the name that an error carries if there is none.
bool weights_unchanged(const char* op, int64_t watch);

}  // namespace dynplan
