// torch's matrix product of int8 as the ReducedProduct of the torch-free kernels.
#pragma once

#include "kernels/encoder/reduced_encoder.h"

namespace dynplan {

kernels::ReducedProduct torch_int8_product();

}  // namespace dynplan
