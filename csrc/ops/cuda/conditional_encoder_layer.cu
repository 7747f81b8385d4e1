#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <vector>

#include "kernels/conditional_encoder_layer_cuda.h"
#include "ops/conditional_encoder_layer.h"
#include "ops/cuda/launch.h"

namespace dynplan {
namespace {

int device_attribute(cudaDeviceAttr attribute, c10::DeviceIndex device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The twelve parameters end to end, in their own dtype.
at::Tensor pack_encoder_weights_cuda(at::TensorList weights) {
  check_pack_encoder_weights(weights);
  std::vector<at::Tensor> flat;
  for (const at::Tensor& weight : weights) flat.push_back(weight.reshape({-1}));
  return at::cat(flat);
}

// I of the blobs, from the number of their parameters, 4 H H + 9 H + I (2 H + 1).
int64_t intermediate_size(const char* op, at::TensorList packed_weights, int64_t width) {
  const int64_t numel = packed_weights[0].numel(), rest = numel - 4 * width * width - 9 * width;
  TORCH_CHECK_VALUE(rest > 0 && rest % (2 * width + 1) == 0, op,
                    ": expected packed_weights to come from pack_encoder_weights for width ", width, ", got ",
                    numel, " parameters");
  for (const at::Tensor& packed : packed_weights)
    TORCH_CHECK_VALUE(packed.numel() == numel, op,
                      ": expected packed_weights of one feed-forward width, got ", numel, " and ",
                      packed.numel(), " parameters");
  return rest / (2 * width + 1);
}

void check_size(const char* op, const char* name, int64_t size, int64_t most) {
  TORCH_CHECK_VALUE(size % kernels::cuda::kSizeStep == 0 && size <= most, op, ": expected ", name,
                    " on CUDA to be a multiple of ", kernels::cuda::kSizeStep, " and at most ", most,
                    ", got ", size);
}

kernels::cuda::Activation cuda_activation(kernels::Activation activation) {
  switch (activation) {
    case kernels::Activation::gelu:
      return kernels::cuda::Activation::gelu;
    case kernels::Activation::gelu_tanh:
      return kernels::cuda::Activation::gelu_tanh;
    case kernels::Activation::relu:
      return kernels::cuda::Activation::relu;
    case kernels::Activation::silu:
      return kernels::cuda::Activation::silu;
  }
  TORCH_CHECK(false, "conditional_encoder_layer: this activation has no CUDA kernel");
}

struct Dispatch {
  at::Tensor rows, cu_seqlens, counts;  // dense; (L, ...) or of one layer
};

template <class T>
void run_layers(const DeviceScope& device, const Dispatch& dispatch, at::TensorList packed_weights,
                int64_t intermediate, int64_t num_heads, kernels::cuda::Activation activation, double eps,
                at::Tensor& hidden) {
  const int64_t capacity = hidden.size(0), width = hidden.size(1), samples = dispatch.cu_seqlens.size(-1) - 1;
  const at::Tensor workspace =
      at::empty({kernels::cuda::encoder_workspace_size(capacity, width, intermediate)}, hidden.options());
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, hidden.device().index());
  for (int64_t layer = 0; layer < static_cast<int64_t>(packed_weights.size()); ++layer) {
    const at::Tensor packed = packed_weights[layer].contiguous();
    C10_CUDA_CHECK(kernels::cuda::conditional_encoder_layer<T>(
        {.hidden = static_cast<T*>(hidden.mutable_data_ptr()),
         .rows = dispatch.rows.const_data_ptr<int32_t>() + layer * capacity,
         .cu_seqlens = dispatch.cu_seqlens.const_data_ptr<int32_t>() + layer * (samples + 1),
         .counts = dispatch.counts.const_data_ptr<int32_t>() + layer * 2,
         .capacity = capacity,
         .samples = samples,
         .weights = static_cast<const T*>(packed.const_data_ptr()),
         .width = static_cast<int32_t>(width),
         .intermediate = static_cast<int32_t>(intermediate),
         .num_heads = static_cast<int32_t>(num_heads),
         .activation = activation,
         .eps = static_cast<float>(eps),
         .workspace = static_cast<T*>(workspace.mutable_data_ptr()),
         .multiprocessors = multiprocessors},
        device.stream()));
  }
}

at::Tensor run(const char* op, const at::Tensor& hidden, const at::Tensor& rows, const at::Tensor& cu_seqlens,
               const at::Tensor& counts, at::TensorList packed_weights, int64_t num_heads,
               c10::string_view activation, double eps) {
  check_conditional_encoder(op, hidden, rows, cu_seqlens, counts, packed_weights, num_heads);
  const kernels::cuda::Activation chosen = cuda_activation(parse_activation(op, activation));
  const DeviceScope device(op, hidden.device());
  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.copy_(hidden);
  if (packed_weights.empty() || out.numel() == 0) return out;

  const int64_t width = hidden.size(1), intermediate = intermediate_size(op, packed_weights, width);
  check_size(op, "the width", width, kernels::cuda::kMaxWidth);
  check_size(op, "the feed-forward width", intermediate, std::numeric_limits<int32_t>::max());
  check_size(op, "the head dimension", width / num_heads, kernels::cuda::kMaxHeadDim);
  const Dispatch dispatch{rows.contiguous(), cu_seqlens.contiguous(), counts.contiguous()};
  const auto run_as = [&]<class T>(T*) {
    run_layers<T>(device, dispatch, packed_weights, intermediate, num_heads, chosen, eps, out);
  };
  switch (hidden.scalar_type()) {
    case at::kFloat:
      run_as(static_cast<float*>(nullptr));
      break;
    case at::kBFloat16:
      run_as(static_cast<__nv_bfloat16*>(nullptr));
      break;
    case at::kHalf:
      run_as(static_cast<__half*>(nullptr));
      break;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected hidden on CUDA to be float32, bfloat16 or float16, got ",
                       hidden.scalar_type());
  }
  return out;
}

at::Tensor conditional_encoder_layer_cuda(const at::Tensor& hidden, const at::Tensor& rows,
                                          const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                          const at::Tensor& packed_weights, int64_t num_heads,
                                          c10::string_view activation, double eps) {
  return run("conditional_encoder_layer", hidden, rows, cu_seqlens, counts, packed_weights, num_heads,
             activation, eps);
}

at::Tensor conditional_encoder_cuda(const at::Tensor& hidden, const at::Tensor& rows,
                                    const at::Tensor& cu_seqlens, const at::Tensor& counts,
                                    at::TensorList packed_weights, int64_t num_heads,
                                    c10::string_view activation, double eps) {
  return run("conditional_encoder", hidden, rows, cu_seqlens, counts, packed_weights, num_heads, activation,
             eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cuda);
  m.impl("conditional_encoder_layer", &conditional_encoder_layer_cuda);
  m.impl("conditional_encoder", &conditional_encoder_cuda);
}

}  // namespace dynplan
