#include "ops/cpu/embed_tokens.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

kernels::Ids view(const at::Tensor& ids) {
  return {ids.const_data_ptr(), ids.scalar_type() == at::kLong};
}

void check_rows(const char* op, const char* name, kernels::Ids ids, int64_t count, int64_t rows) {
  const int64_t at = kernels::find_outside(ids, count, rows);
  TORCH_CHECK_INDEX(at < 0, op, ": expected ", name, " within 0..", rows - 1, ", got ", ids[at < 0 ? 0 : at]);
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
  const EmbedTokensCall call = {"embed_tokens", input_ids, attention_mask, token_type_ids,
                                word,           type,      position,       norm_weight,
                                norm_bias,      eps,       padding_idx};
  check_embed_tokens(call);
  TokenRows rows = find_token_rows(call);
  const at::Tensor packed = at::empty({rows.params.tokens, rows.params.width}, word.options());
  rows.params.packed = packed.mutable_data_ptr<float>();
  kernels::embed_tokens(rows.params, at_parallel);
  return {packed, rows.tokens.indices, rows.tokens.cu_seqlens};
}

}  // namespace

TokenRows find_token_rows(const EmbedTokensCall& call) {
  const int64_t batch = call.input_ids.size(0), length = call.input_ids.size(1);
  TokenRows rows;
  const auto dense = [&](const at::Tensor& tensor) {
    rows.dense.push_back(tensor.contiguous());
    return rows.dense.back();
  };
  const kernels::Ids ids = view(dense(call.input_ids)),
                     types = call.token_type_ids ? view(dense(*call.token_type_ids)) : kernels::Ids{};
  const int64_t positions = call.input_ids.numel();
  check_rows(call.op, "input_ids", ids, positions, call.word.size(0));
  if (call.token_type_ids) check_rows(call.op, "token_type_ids", types, positions, call.type.size(0));
  rows.tokens = call.attention_mask ? find_tokens(call.op, *call.attention_mask) : all_tokens(batch, length);
  const int64_t count = rows.tokens.indices.size(0);

  const int32_t* indices = rows.tokens.indices.const_data_ptr<int32_t>();
  rows.positions.resize(count);
  kernels::token_positions(ids, length, call.padding_idx.value_or(-1), indices, count, rows.positions.data());
  for (const int64_t place : rows.positions)
    TORCH_CHECK_INDEX(place < call.position.size(0), call.op, ": expected positions within 0..",
                      call.position.size(0) - 1, ", got ", place);
  rows.params = {.ids = ids,
                 .token_types = types,
                 .indices = indices,
                 .positions = rows.positions.data(),
                 .tokens = count,
                 .width = call.word.size(1),
                 .word = dense(call.word).const_data_ptr<float>(),
                 .type = dense(call.type).const_data_ptr<float>(),
                 .position = dense(call.position).const_data_ptr<float>(),
                 .norm_weight = dense(call.norm_weight).const_data_ptr<float>(),
                 .norm_bias = dense(call.norm_bias).const_data_ptr<float>(),
                 .eps = static_cast<float>(call.eps),
                 .packed = nullptr};
  return rows;
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("embed_tokens", &embed_tokens_cpu);
}

}  // namespace dynplan
