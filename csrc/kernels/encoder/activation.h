// The activations of a feed-forward, by name: what both devices' encoders share.
#pragma once

#include <optional>
#include <string_view>

namespace dynplan::kernels {

enum class Activation { gelu, gelu_tanh, relu, silu };

// By the names of Hugging Face configurations.
constexpr const char* kActivationNames = "gelu, gelu_new, gelu_pytorch_tanh, relu, silu";
inline std::optional<Activation> activation_of(std::string_view name) {
  if (name == "gelu") return Activation::gelu;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
  if (name == "relu") return Activation::relu;
  if (name == "silu") return Activation::silu;
  return std::nullopt;
}

}  // namespace dynplan::kernels
