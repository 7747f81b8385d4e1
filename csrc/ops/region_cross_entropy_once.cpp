// The autograd of _region_cross_entropy_once, whose forward has made the gradient. In C++, for it runs in
// every step of a training loop, where it finds the caches full of logits.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace dynplan {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Values = std::vector<c10::IValue>;

void call(const char* op, torch::jit::Stack& stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(stack);
}

struct RegionCrossEntropyOnce : torch::autograd::Function<RegionCrossEntropyOnce> {
  static variable_list forward(AutogradContext* ctx, const Tensor& input, const Tensor& target,
                               const std::optional<Tensor>& weight, const Values& options) {
    torch::jit::Stack stack{input, target, weight};
    stack.insert(stack.end(), options.begin(), options.end());
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      call("dynplan::_region_cross_entropy_once", stack);
    }
    variable_list outputs;
    for (const c10::IValue& output : stack) outputs.push_back(output.toTensor());
    const Tensor &value = outputs[0], &normalizer = outputs[1], &losses = outputs[2], &lse = outputs[3];
    ctx->save_for_backward({input, target, weight.value_or(Tensor()), value, normalizer, losses, lse});
    ctx->saved_data["gradient"] = outputs[4];
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(options);
    ctx->mark_non_differentiable({normalizer, lse, outputs[4]});
    ctx->set_materialize_grads(false);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();  // first: here changed logits are noticed
    const Tensor &grad_value = grads[0], &grad_losses = grads[2];
    // Several at once (vmap): their number cannot be read, and each takes a gradient of its own.
    const auto is_batched = [](const Tensor& grad) {
      constexpr c10::DispatchKeySet kBatched({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
      return grad.defined() && grad.unsafeGetTensorImpl()->key_set().has_any(kBatched);
    };
    if (is_batched(grad_value) && !grad_losses.defined() && !at::GradMode::is_enabled() &&
        !ctx->saved_data["gradient"].isNone())
      return {grad_value.mul(ctx->saved_data["gradient"].toTensor()), Tensor(), Tensor(), Tensor()};
    // Handed out once; who receives it may write to it.
    c10::IValue kept = std::exchange(ctx->saved_data["gradient"], c10::IValue());
    if (kept.isNone() || grad_losses.defined() || at::GradMode::is_enabled()) {
      torch::jit::Stack stack{optional(grad_value), optional(grad_losses), saved[0], saved[1],
                              optional(saved[2])};
      stack.insert(stack.end(), saved.begin() + 3, saved.end());
      const auto& options = ctx->saved_data["options"].toTupleRef().elements();
      stack.insert(stack.end(), options.begin(), options.end());
      call("dynplan::_region_cross_entropy_backward", stack);
      return {stack[0].toTensor(), Tensor(), Tensor(), Tensor()};
    }
    Tensor gradient = std::move(kept).toTensor();
    if (grad_value.item<double>() != 1) gradient.mul_(grad_value);
    return {gradient, Tensor(), Tensor(), Tensor()};
  }

 private:
  static std::optional<Tensor> optional(const Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  }
};

void once(const c10::OperatorHandle&, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const Values options(stack->begin() + 3, stack->end());
  const variable_list outputs = RegionCrossEntropyOnce::apply(
      stack->at(0).toTensor(), stack->at(1).toTensor(), stack->at(2).toOptional<Tensor>(), options);
  stack->assign(outputs.begin(), outputs.end());
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, AutogradCPU, m) {
  m.impl("_region_cross_entropy_once", torch::CppFunction::makeFromBoxedFunction<&once>());
}

}  // namespace dynplan
