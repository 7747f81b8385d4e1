#include "kernels/packing/build_dispatch.h"

#include <pybind11/numpy.h>

#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

py::tuple build_dispatch(const Dense<bool>& keep, const Dense<int32_t>& cu_seqlens) {
  if (keep.ndim() != 2 || cu_seqlens.ndim() != 1 || cu_seqlens.shape(0) != keep.shape(0) + 1)
    throw py::value_error("build_dispatch: expected keep (B, L) and cu_seqlens (B+1,)");
  const int64_t samples = keep.shape(0), layers = keep.shape(1);
  const int32_t* offset = cu_seqlens.data();
  for (int64_t b = 0; b <= samples; ++b)
    if (offset[b] < (b == 0 ? 0 : offset[b - 1]) || (b == 0 && offset[0] != 0))
      throw py::value_error("build_dispatch: expected cu_seqlens to ascend from 0");
  const int64_t capacity = offset[samples];
  Dense<int32_t> rows({layers, capacity}), active({layers, samples + 1}), counts({layers, int64_t{2}});
  kernels::build_dispatch({.keep = kernels::truths(keep.data()),
                           .sample_stride = layers,
                           .layer_stride = 1,
                           .cu_seqlens = offset,
                           .samples = samples,
                           .layers = layers,
                           .capacity = capacity,
                           .rows = rows.mutable_data(),
                           .active_cu_seqlens = active.mutable_data(),
                           .counts = counts.mutable_data()},
                          kernels::serial);
  return py::make_tuple(rows, active, counts);
}

}  // namespace

void bind_build_dispatch(py::module_& m) {
  m.def("build_dispatch", &build_dispatch, py::arg("keep").noconvert(), py::arg("cu_seqlens").noconvert(),
        "keep bool (B, L), cu_seqlens int32 (B+1,) -> rows (L, T), cu_seqlens (L, B+1), counts (L, 2)");
}

}  // namespace dynplan
