// Contract of dynplan::pack_reduced_encoder_weights.
//
//   pack_reduced_encoder_weights(weights: those of pack_encoder_weights, float32 or bfloat16, on CPU,
//       dtype: int8 or bfloat16)
//     -> opaque uint8 (bytes,), a layout of kernels/encoder/packed_weights.h
//
// conditional_encoder and conditional_encoder_layer take such blobs as packed_weights, all of one type.
// Products of bfloat16 are the kernels' own (encoder/pairs.h), those of int8 are torch's _int_mm.
//
//   _multiplies_bfloat16() -> bool   whether the CPU does, and rows that meet bfloat16 weights are rounded
//   too _int8_weight_levels() -> int     the largest magnitude of an int8 weight here
#pragma once

#include <string_view>

#include "kernels/encoder/packed_weights.h"

namespace dynplan {

kernels::WeightType parse_reduced_dtype(std::string_view dtype);

}  // namespace dynplan
