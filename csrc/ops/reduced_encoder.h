// Contract of dynplan::pack_reduced_encoder_weights.
//
//   pack_reduced_encoder_weights(weights: those of pack_encoder_weights, float32 or bfloat16, on CPU,
//       dtype: int8 or bfloat16)
//     -> opaque uint8 (bytes,), the layout of kernels/reduced_encoder.h
//
// conditional_encoder and conditional_encoder_layer take such blobs as packed_weights, all of one dtype, and
// then run their products through torch: _int_mm for int8, mm for bfloat16.
//
//   _multiplies_bfloat16() -> bool   whether products of bfloat16 are faster here than those of float32
//   _int8_weight_levels() -> int     the largest magnitude of an int8 weight here
#pragma once

#include <string_view>

#include "kernels/reduced_encoder.h"

namespace dynplan {

kernels::ReducedDtype parse_reduced_dtype(std::string_view dtype);

}  // namespace dynplan
