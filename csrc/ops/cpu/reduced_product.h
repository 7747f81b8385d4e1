// torch's matrix products as the ReducedProduct of the torch-free kernels.
#pragma once

#include "kernels/reduced_encoder.h"

namespace dynplan {

kernels::ReducedProduct torch_product(kernels::ReducedDtype dtype);

}  // namespace dynplan
