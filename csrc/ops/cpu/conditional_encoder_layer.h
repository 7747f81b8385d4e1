// The encoder on the CPU between checked tensors and the kernels: what conditional_encoder and encode_tokens
// have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "kernels/encoder/checks.h"
#include "kernels/encoder/conditional_encoder_layer.h"

namespace dynplan {

// All layers' packed weights, as the kernels follow them.
struct PackedStack {
  std::vector<const void*> blobs;
  kernels::PackedShape shape;
  std::vector<at::Tensor> dense;  // where a blob was not
};

// Checks what the blobs hold; that they are bytes on the CPU is checked already.
PackedStack read_packed(const char* op, at::TensorList packed_weights, int64_t width);

// Runs the kernels for such weights, from those of layer `first` on. Adds to `p` what is the same for every
// call: weights, threads, workspace for at most `most` active rows in any layer, record of phases.
void run_encoder(kernels::ConditionalEncoderParams p, const PackedStack& weights, int64_t most,
                 int64_t first = 0);

}  // namespace dynplan
