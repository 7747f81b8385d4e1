#include "kernels/conditional_encoder_layer.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "ops/conditional_encoder_layer.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

template <class T>
void pack_into(const std::vector<at::Tensor>& w, EncoderSizes sizes, void* blob) {
  const auto data = [&](int index) { return static_cast<const T*>(w[index].const_data_ptr()); };
  kernels::pack_encoder_weights<T>({data(0), data(1), data(2), data(3), data(4), data(5), data(6), data(7),
                                    data(8), data(9), data(10), data(11)},
                                   sizes.hidden, sizes.intermediate, blob);
}

at::Tensor pack_encoder_weights_cpu(at::TensorList weights) {
  const EncoderSizes sizes = check_pack_encoder_weights(weights);
  std::vector<at::Tensor> dense;
  for (const at::Tensor& weight : weights) dense.push_back(weight.contiguous());
  const kernels::PackedLayout layout(sizes.hidden, sizes.intermediate);
  at::Tensor blob = at::empty({layout.bytes()}, weights[0].options().dtype(at::kByte));
  if (weights[0].scalar_type() == at::kFloat)
    pack_into<float>(dense, sizes, blob.mutable_data_ptr());
  else
    pack_into<kernels::BFloat16>(dense, sizes, blob.mutable_data_ptr());
  return blob;
}

// The feed-forward width all blobs agree on.
int64_t check_blobs(const char* op, const std::vector<at::Tensor>& blobs, int64_t hidden_size) {
  int64_t intermediate = 0;
  for (const at::Tensor& blob : blobs) {
    kernels::PackedHeader header = {};
    TORCH_CHECK_VALUE(blob.numel() >= static_cast<int64_t>(sizeof(header)), op,
                      ": expected packed_weights to come from pack_encoder_weights, got ", blob.numel(),
                      " bytes");
    std::memcpy(&header, blob.const_data_ptr(), sizeof(header));
    TORCH_CHECK_VALUE(header.magic == kernels::kPackedMagic && header.version == kernels::kPackedVersion, op,
                      ": expected packed_weights to come from pack_encoder_weights of this version");
    TORCH_CHECK_VALUE(header.hidden_size == hidden_size, op, ": expected packed_weights of width ",
                      hidden_size, ", got ", header.hidden_size);
    if (intermediate == 0) intermediate = header.intermediate_size;
    TORCH_CHECK_VALUE(header.intermediate_size == intermediate, op,
                      ": expected packed_weights of one feed-forward width, got ", intermediate, " and ",
                      header.intermediate_size);
    const int64_t bytes = kernels::PackedLayout(hidden_size, intermediate).bytes();
    TORCH_CHECK_VALUE(blob.numel() == bytes, op, ": expected packed_weights to have ", bytes, " bytes, got ",
                      blob.numel());
  }
  return intermediate;
}

// A dispatch that the kernels can follow without leaving their buffers; returns the most active rows of any
// layer.
int64_t check_dispatch(const char* op, const at::Tensor& rows, const at::Tensor& cu_seqlens,
                       const at::Tensor& counts, int64_t layers) {
  const int64_t capacity = rows.size(-1), samples = cu_seqlens.size(-1) - 1;
  int64_t most = 0;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const int32_t* row = rows.const_data_ptr<int32_t>() + layer * capacity;
    const int32_t* offset = cu_seqlens.const_data_ptr<int32_t>() + layer * (samples + 1);
    const int32_t* count = counts.const_data_ptr<int32_t>() + layer * 2;
    TORCH_CHECK_VALUE(count[0] >= 0 && count[0] <= samples && count[1] >= 0 && count[1] <= capacity, op,
                      ": expected counts to be at most ", samples, " samples and ", capacity, " rows, got ",
                      count[0], " and ", count[1]);
    TORCH_CHECK_VALUE(offset[0] == 0 && offset[count[0]] == count[1], op,
                      ": expected cu_seqlens to run from 0 to ", count[1], ", got ", offset[0], " to ",
                      offset[count[0]]);
    for (int32_t s = 0; s < count[0]; ++s)
      TORCH_CHECK_VALUE(offset[s] <= offset[s + 1], op, ": expected cu_seqlens to ascend, got ", offset[s],
                        " then ", offset[s + 1], " at ", s);
    for (int32_t r = 0; r < count[1]; ++r)
      TORCH_CHECK_INDEX(row[r] >= 0 && row[r] < capacity, op, ": expected rows in [0, ", capacity, "), got ",
                        row[r], " at ", r);
    most = std::max<int64_t>(most, count[1]);
  }
  return most;
}

at::Tensor run(const char* op, const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& cu_seqlens,
               const at::Tensor& counts, at::TensorList packed_weights, int64_t num_heads,
               c10::string_view activation, double eps) {
  check_conditional_encoder(op, hidden, rows, cu_seqlens, counts, packed_weights, num_heads);
  const kernels::Activation chosen = parse_activation(op, activation);
  TORCH_CHECK_TYPE(hidden.scalar_type() == at::kFloat || hidden.scalar_type() == at::kBFloat16, op,
                   ": expected hidden to be float32 or bfloat16, got ", hidden.scalar_type());
  const int64_t layers = static_cast<int64_t>(packed_weights.size());
  const at::Tensor dense_rows = rows.contiguous(), offsets = cu_seqlens.contiguous(),
                   dense_counts = counts.contiguous();
  const int64_t most = check_dispatch(op, dense_rows, offsets, dense_counts, layers);
  std::vector<at::Tensor> blobs;
  std::vector<const void*> packed;
  for (const at::Tensor& blob : packed_weights) {
    blobs.push_back(blob.contiguous());
    packed.push_back(blobs.back().const_data_ptr());
  }
  const int64_t intermediate = check_blobs(op, blobs, hidden.size(1));

  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.copy_(hidden);
  if (most == 0) return out;
  const at::Tensor workspace =
      at::empty({kernels::encoder_workspace_floats(most, hidden.size(1), intermediate)},
                hidden.options().dtype(at::kFloat));
  kernels::conditional_encoder({.hidden = out.mutable_data_ptr(),
                                .row_type = hidden.scalar_type() == at::kFloat ? kernels::RowType::float32
                                                                               : kernels::RowType::bfloat16,
                                .rows = dense_rows.const_data_ptr<int32_t>(),
                                .cu_seqlens = offsets.const_data_ptr<int32_t>(),
                                .counts = dense_counts.const_data_ptr<int32_t>(),
                                .packed = packed.data(),
                                .layers = layers,
                                .capacity = hidden.size(0),
                                .samples = offsets.size(-1) - 1,
                                .hidden_size = hidden.size(1),
                                .intermediate_size = intermediate,
                                .heads = num_heads,
                                .activation = chosen,
                                .eps = static_cast<float>(eps),
                                .workspace = workspace.mutable_data_ptr<float>()},
                               at_parallel);
  return out;
}

at::Tensor conditional_encoder_layer_cpu(const at::Tensor& hidden, const at::Tensor& rows,
                                         const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                         const at::Tensor& packed_weights, int64_t num_heads,
                                         c10::string_view activation, double eps) {
  return run("conditional_encoder_layer", hidden, rows, cu_seqlens, counts, packed_weights, num_heads,
             activation, eps);
}

at::Tensor conditional_encoder_cpu(const at::Tensor& hidden, const at::Tensor& rows,
                                   const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                   at::TensorList packed_weights, int64_t num_heads,
                                   c10::string_view activation, double eps) {
  return run("conditional_encoder", hidden, rows, cu_seqlens, counts, packed_weights, num_heads, activation,
             eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cpu);
  m.impl("conditional_encoder_layer", &conditional_encoder_layer_cpu);
  m.impl("conditional_encoder", &conditional_encoder_cpu);
}

}  // namespace dynplan
