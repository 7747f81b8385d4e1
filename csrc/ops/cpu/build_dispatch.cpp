#include "kernels/packing/build_dispatch.h"

#include <torch/library.h>

#include "ops/build_dispatch.h"
#include "ops/cpu/parallel.h"

namespace dynplan {
namespace {

void check_offsets(const kernels::BuildDispatchParams& p) {
  const int32_t* offset = p.cu_seqlens;
  TORCH_CHECK_VALUE(offset[0] == 0, "build_dispatch: expected cu_seqlens to start at 0, got ", offset[0]);
  for (int64_t b = 0; b < p.samples; ++b)
    TORCH_CHECK_VALUE(offset[b] <= offset[b + 1], "build_dispatch: expected cu_seqlens to ascend, got ",
                      offset[b], " then ", offset[b + 1], " at ", b);
  TORCH_CHECK_VALUE(offset[p.samples] <= p.capacity,
                    "build_dispatch: expected cu_seqlens to end within the capacity of ", p.capacity,
                    ", got ", offset[p.samples]);
}

DispatchTensors build_dispatch_cpu(const at::Tensor& keep, const at::Tensor& cu_seqlens, int64_t capacity) {
  const BuildDispatchCall call = begin_build_dispatch(keep, cu_seqlens, capacity);
  check_offsets(call.params);
  kernels::build_dispatch(call.params, at_parallel);
  return call.results;
}

}  // namespace

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("build_dispatch", &build_dispatch_cpu);
}

}  // namespace dynplan
