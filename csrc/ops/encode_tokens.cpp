#include "ops/encode_tokens.h"

#include <torch/library.h>

#include <string>

#include "ops/conditional_encoder_layer.h"

namespace dynplan {

EncodeTokensCall check_encode_tokens(EmbedTokensCall embed, const std::optional<at::Tensor>& keep,
                                     at::TensorList packed_weights, int64_t num_heads,
                                     std::string_view activation, double eps, bool reads_first) {
  check_embed_tokens(embed);
  const char* const op = embed.op;
  if (keep) {
    const int64_t samples = embed.input_ids.size(0), layers = static_cast<int64_t>(packed_weights.size());
    TORCH_CHECK_TYPE(keep->scalar_type() == at::kBool, op, ": expected keep to be bool, got ",
                     keep->scalar_type());
    TORCH_CHECK_VALUE(keep->dim() == 2 && keep->size(0) == samples && keep->size(1) == layers, op,
                      ": expected keep to have shape (B, L) = [", samples, ", ", layers, "], got ",
                      keep->sizes());
  }
  const kernels::Activation chosen =
      check_encoder_options(op, embed.word.size(1), packed_weights, at::kByte, num_heads, activation);
  return {embed, keep, packed_weights, num_heads, chosen, static_cast<float>(eps), reads_first};
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def(
      "encode_tokens(Tensor input_ids, Tensor? attention_mask, Tensor? token_type_ids, Tensor word, "
      "Tensor type, Tensor position, Tensor norm_weight, Tensor norm_bias, float norm_eps, "
      "int? padding_idx, Tensor? keep, Tensor[] packed_weights, int num_heads, str activation, float eps, "
      "bool reads_first) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
