#include "ops/embed_tokens.h"

#include <torch/library.h>

#include <limits>
#include <utility>

namespace dynplan {
namespace {

void check_ids(const char* op, const char* name, const at::Tensor& ids, const at::Tensor& input_ids) {
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, op, ": expected ", name,
                   " to be int64 or int32, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.sizes() == input_ids.sizes(), op, ": expected ", name, " to have shape ",
                    input_ids.sizes(), ", got ", ids.sizes());
}

}  // namespace

void check_embed_tokens(const EmbedTokensCall& call) {
  const char* const op = call.op;
  const at::Tensor& ids = call.input_ids;
  TORCH_CHECK_VALUE(ids.dim() == 2, op, ": expected input_ids to have shape (B, S), got ", ids.sizes());
  check_ids(op, "input_ids", ids, ids);
  if (call.token_type_ids) check_ids(op, "token_type_ids", *call.token_type_ids, ids);
  if (call.attention_mask) {
    const at::Tensor& mask = *call.attention_mask;
    TORCH_CHECK_TYPE(at::isIntegralType(mask.scalar_type(), /*includeBool=*/true), op,
                     ": expected attention_mask to be bool or integer, got ", mask.scalar_type());
    TORCH_CHECK_VALUE(mask.sizes() == ids.sizes(), op, ": expected attention_mask to have shape ",
                      ids.sizes(), ", got ", mask.sizes());
  }
  TORCH_CHECK_VALUE(call.word.dim() == 2, op, ": expected word to have shape (V, E), got ",
                    call.word.sizes());
  const int64_t width = call.word.size(1);
  const std::pair<const char*, const at::Tensor&> tables[] = {
      {"word", call.word}, {"type", call.type}, {"position", call.position}};
  const std::pair<const char*, const at::Tensor&> vectors[] = {{"norm_weight", call.norm_weight},
                                                               {"norm_bias", call.norm_bias}};
  const auto check_float = [op](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat, op, ": expected ", name, " to be float32, got ",
                     tensor.scalar_type());
  };
  for (const auto& [name, table] : tables) {
    check_float(name, table);
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(0) > 0 && table.size(1) == width, op, ": expected ",
                      name, " to have rows of width ", width, ", got ", table.sizes());
  }
  for (const auto& [name, vector] : vectors) {
    check_float(name, vector);
    TORCH_CHECK_VALUE(vector.dim() == 1 && vector.size(0) == width, op, ": expected ", name,
                      " to have shape [", width, "], got ", vector.sizes());
  }
  TORCH_CHECK_VALUE(ids.size(0) * ids.size(1) <= std::numeric_limits<int32_t>::max(), op,
                    ": expected at most 2^31 - 1 positions, got ", ids.size(0) * ids.size(1));
  const int64_t padding_idx = call.padding_idx.value_or(0), last = call.position.size(0) - 1;
  TORCH_CHECK_VALUE(padding_idx >= 0 && padding_idx <= last, op, ": expected padding_idx to be within 0..",
                    last, ", got ", padding_idx);
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  m.def(
      "embed_tokens(Tensor input_ids, Tensor? attention_mask, Tensor? token_type_ids, Tensor word, Tensor "
      "type, "
      "Tensor position, Tensor norm_weight, Tensor norm_bias, float eps, int? padding_idx) "
      "-> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace dynplan
