#include "kernels/embed_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "ops/cpu/pack.h"
#include "ops/cpu/parallel.h"
#include "ops/embed_tokens.h"

namespace dynplan {
namespace {

kernels::Ids view(const at::Tensor& ids) {
  return {ids.const_data_ptr(), ids.scalar_type() == at::kLong};
}

void check_rows(const char* name, kernels::Ids ids, int64_t count, int64_t rows) {
  const int64_t at = kernels::find_outside(ids, count, rows);
  TORCH_CHECK_INDEX(at < 0, "embed_tokens: expected ", name, " within 0..", rows - 1, ", got ",
                    ids[at < 0 ? 0 : at]);
}

// Every position of every sample is a token.
Tokens all_tokens(int64_t batch, int64_t length) {
  Tokens tokens = empty_tokens(batch, batch * length);
  int32_t *indices = tokens.indices.mutable_data_ptr<int32_t>(),
          *cu_seqlens = tokens.cu_seqlens.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < batch * length; ++t) indices[t] = static_cast<int32_t>(t);
  for (int64_t b = 0; b <= batch; ++b) cu_seqlens[b] = static_cast<int32_t>(b * length);
  return tokens;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> embed_tokens_cpu(
    const at::Tensor& input_ids, const std::optional<at::Tensor>& attention_mask,
    const std::optional<at::Tensor>& token_type_ids, const at::Tensor& word, const at::Tensor& type,
    const at::Tensor& position, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    std::optional<int64_t> padding_idx) {
  check_embed_tokens({input_ids, attention_mask, token_type_ids, word, type, position, norm_weight, norm_bias,
                      eps, padding_idx});
  const int64_t batch = input_ids.size(0), length = input_ids.size(1), width = word.size(1);
  const at::Tensor ids = input_ids.contiguous();
  const at::Tensor types = token_type_ids ? token_type_ids->contiguous() : at::Tensor();
  const kernels::Ids id_view = view(ids),
                     type_view = types.defined() ? view(types) : kernels::Ids{nullptr, false};
  check_rows("input_ids", id_view, ids.numel(), word.size(0));
  if (types.defined()) check_rows("token_type_ids", type_view, types.numel(), type.size(0));
  const Tokens tokens =
      attention_mask ? find_tokens("embed_tokens", *attention_mask) : all_tokens(batch, length);
  const int64_t count = tokens.indices.size(0);

  const int32_t* indices = tokens.indices.const_data_ptr<int32_t>();
  std::vector<int32_t> positions(count);
  kernels::token_positions(id_view, length, padding_idx.value_or(-1), indices, count, positions.data());
  for (const int32_t place : positions)
    TORCH_CHECK_INDEX(place < position.size(0), "embed_tokens: expected positions within 0..",
                      position.size(0) - 1, ", got ", place);

  const at::Tensor packed = at::empty({count, width}, word.options());
  const at::Tensor words = word.contiguous(), kinds = type.contiguous(), places = position.contiguous(),
                   weight = norm_weight.contiguous(), bias = norm_bias.contiguous();
  kernels::embed_tokens({.ids = id_view,
                         .token_types = type_view,
                         .indices = indices,
                         .positions = positions.data(),
                         .tokens = count,
                         .width = width,
                         .word = words.const_data_ptr<float>(),
                         .type = kinds.const_data_ptr<float>(),
                         .position = places.const_data_ptr<float>(),
                         .norm_weight = weight.const_data_ptr<float>(),
                         .norm_bias = bias.const_data_ptr<float>(),
                         .eps = static_cast<float>(eps),
                         .packed = packed.mutable_data_ptr<float>()},
                        at_parallel);
  return {packed, tokens.indices, tokens.cu_seqlens};
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("embed_tokens", &embed_tokens_cpu);
}

}  // namespace dynplan
