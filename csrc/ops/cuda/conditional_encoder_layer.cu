#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "kernels/encoder/cuda/kernels.h"
#include "ops/conditional_encoder_layer.h"
#include "ops/cuda/launch.h"

namespace dynplan {
namespace {

// The twelve parameters end to end, in their own dtype.
at::Tensor pack_encoder_weights_cuda(at::TensorList weights) {
  check_pack_encoder_weights("pack_encoder_weights", weights);
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

// For measurements: DYNPLAN_CUDA_TILE forces one of kProductTiles.
int32_t forced_tile(const char* op) {
  const char* const name = std::getenv("DYNPLAN_CUDA_TILE");
  if (name == nullptr) return kernels::cuda::kChosenTile;
  int32_t number = 0;
  for (const std::string_view tile : kernels::cuda::kProductTiles) {
    if (tile == name) return number;
    ++number;
  }
  TORCH_CHECK_VALUE(false, op, ": expected DYNPLAN_CUDA_TILE to be one of ", kernels::cuda::kProductTiles[0],
                    " to ", kernels::cuda::kProductTiles[number - 1], ", got ", name);
}

template <class T>
void run_layers(const EncoderCall& call, const DeviceScope& device, int64_t intermediate,
                at::Tensor& hidden) {
  const int64_t capacity = call.capacity(), width = call.width(), samples = call.samples();
  const at::Tensor workspace =
      at::empty({kernels::cuda::encoder_workspace_size(capacity, width, intermediate)}, hidden.options());
  const int multiprocessors = device.attribute(cudaDevAttrMultiProcessorCount);
  const int32_t tile = forced_tile(call.op);
  for (int64_t layer = 0; layer < call.layers(); ++layer) {
    at::Tensor packed = call.packed_weights[layer].contiguous();
    // Kernels read 16 bytes at a time; what pack_encoder_weights gave may have been cut out of something
    // larger since.
    if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 != 0) packed = packed.clone();
    C10_CUDA_CHECK(kernels::cuda::conditional_encoder_layer<T>(
        {.hidden = static_cast<T*>(hidden.mutable_data_ptr()),
         .rows = call.rows.const_data_ptr<int32_t>() + layer * capacity,
         .cu_seqlens = call.cu_seqlens.const_data_ptr<int32_t>() + layer * (samples + 1),
         .counts = call.counts.const_data_ptr<int32_t>() + layer * 2,
         .capacity = capacity,
         .samples = samples,
         .weights = static_cast<const T*>(packed.const_data_ptr()),
         .width = static_cast<int32_t>(width),
         .intermediate = static_cast<int32_t>(intermediate),
         .num_heads = static_cast<int32_t>(call.num_heads),
         .activation = cuda_activation(call.activation),
         .eps = call.eps,
         .workspace = static_cast<T*>(workspace.mutable_data_ptr()),
         .multiprocessors = multiprocessors,
         .tile = tile},
        device.stream()));
  }
}

at::Tensor conditional_encoder_cuda(const EncoderCall& call) {
  const at::Tensor& hidden = call.hidden;
  const char* const op = call.op;
  const DeviceScope device(op, hidden.device());
  at::Tensor out = at::empty(hidden.sizes(), hidden.options());
  out.copy_(hidden);
  if (call.layers() == 0 || out.numel() == 0) return out;

  const int64_t intermediate = intermediate_size(op, call.packed_weights, call.width());
  check_size(op, "the width", call.width(), kernels::cuda::kMaxWidth);
  check_size(op, "the feed-forward width", intermediate, std::numeric_limits<int32_t>::max());
  check_size(op, "the head dimension", call.width() / call.num_heads, kernels::cuda::kMaxHeadDim);
  switch (hidden.scalar_type()) {
    case at::kFloat:
      run_layers<float>(call, device, intermediate, out);
      break;
    case at::kBFloat16:
      run_layers<__nv_bfloat16>(call, device, intermediate, out);
      break;
    case at::kHalf:
      run_layers<__half>(call, device, intermediate, out);
      break;
    default:
      TORCH_CHECK_TYPE(false, op, ": expected hidden on CUDA to be float32, bfloat16 or float16, got ",
                       hidden.scalar_type());
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CUDA, m) {
  m.impl("pack_encoder_weights", &pack_encoder_weights_cuda);
  m.impl("conditional_encoder_layer", &conditional_encoder_layer<conditional_encoder_cuda>);
  m.impl("conditional_encoder", &conditional_encoder<conditional_encoder_cuda>);
}

}  // namespace dynplan
