// Contract of dynplan::build_dispatch.
//
//   build_dispatch(keep bool (B,) or (B, L), cu_seqlens int32 (B+1,), capacity T)
//     -> rows int32 (T,) or (L, T), cu_seqlens int32 (B+1,) or (L, B+1), counts int32 (2,) or (L, 2)
//
// One call makes the dispatch of one layer or of all layers; kernels/packing/build_dispatch.h says what the outputs hold.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "kernels/packing/build_dispatch.h"

namespace dynplan {

using DispatchTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // rows, cu_seqlens, counts

// A checked call, ready for the kernel.
struct BuildDispatchCall {
  at::Tensor offsets;  // cu_seqlens, dense
  DispatchTensors results;
  kernels::BuildDispatchParams params;  // points into the caller's keep and into the tensors above
};

BuildDispatchCall begin_build_dispatch(const at::Tensor& keep, const at::Tensor& cu_seqlens,
                                       int64_t capacity);

}  // namespace dynplan
