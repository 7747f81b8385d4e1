// Contract of dynplan::build_dispatch.
//
//   build_dispatch(keep bool (B,) or (B, L), cu_seqlens int32 (B+1,), capacity T)
//     -> rows int32 (T,) or (L, T), cu_seqlens int32 (B+1,) or (L, B+1), counts int32 (2,) or (L, 2)
//
// One call makes the dispatch of one layer or of all layers; kernels/build_dispatch.h says what the outputs hold.
#pragma once

#include <ATen/core/Tensor.h>

namespace dynplan {

void check_build_dispatch(const at::Tensor& keep, const at::Tensor& cu_seqlens, int64_t capacity);

}  // namespace dynplan
