// A forward from ids to states on the CPU, any number of layers at a time: what encode_tokens and
// encode_until_sure have in common.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "kernels/packing/truth.h"
#include "ops/cpu/conditional_encoder_layer.h"
#include "ops/cpu/embed_tokens.h"
#include "ops/encode_tokens.h"

namespace dynplan {

// keep[b * sample_stride + l * layer_stride], the layers counted from the first that is run.
struct KeptSamples {
  const kernels::Truth* keep;
  int64_t sample_stride, layer_stride;
};

class TokenEncoder {
 public:
  // Finds the tokens and checks what they and the weights hold. `call` must outlive it.
  explicit TokenEncoder(const EncodeTokensCall& call);

  // Runs layers [first, last); embeds the tokens before the first of them.
  void run(int64_t first, int64_t last, const KeptSamples& kept);

  // The states, padding restored. The last call.
  at::Tensor finish();

  int64_t samples() const { return samples_; }
  int64_t width() const { return rows_.params.width; }
  int64_t tokens() const { return rows_.params.tokens; }
  const int32_t* cu_seqlens() const { return rows_.tokens.cu_seqlens.const_data_ptr<int32_t>(); }
  const float* packed() const { return rows_.params.packed; }  // (T, H), once some layer was run

 private:
  void embed(int64_t begin, int64_t end);  // of the packed rows

  const EncodeTokensCall& call_;
  int64_t samples_, length_;
  TokenRows rows_;
  PackedStack weights_;
  at::Tensor out_, packed_;
  bool embedded_ = false;
};

}  // namespace dynplan
