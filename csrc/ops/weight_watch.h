#pragma once

#include <cstdint>
#include <optional>

namespace dynplan {

// Whether the tensors of the WeightWatch with this handle are as they were; nothing where there is none.
std::optional<bool> weights_are_unchanged(int64_t handle);

}  // namespace dynplan
