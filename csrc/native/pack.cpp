#include "kernels/packing/pack.h"

#include <pybind11/numpy.h>

#include <limits>
#include <string>

#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

py::tuple pack(const Dense<float>& hidden, const Dense<bool>& mask) {
  if (hidden.ndim() != 3 || mask.ndim() != 2 || mask.shape(0) != hidden.shape(0) ||
      mask.shape(1) != hidden.shape(1))
    throw py::value_error("pack: expected hidden (B, S, H) and mask (B, S)");
  const int64_t batch = hidden.shape(0), length = hidden.shape(1), width = hidden.shape(2);
  if (batch * length > std::numeric_limits<int32_t>::max())
    throw py::value_error("pack: expected at most 2^31 - 1 positions, got " + std::to_string(batch * length));
  Dense<int32_t> cu_seqlens(batch + 1);
  const kernels::Truth* const entries = kernels::truths(mask.data());
  const int64_t tokens = kernels::count_tokens(entries, batch, length, cu_seqlens.mutable_data());
  Dense<int32_t> indices(tokens);
  kernels::token_indices(entries, batch * length, indices.mutable_data());
  Dense<float> packed({tokens, width});
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(float));
  kernels::pack_rows({.hidden = reinterpret_cast<const char*>(hidden.data()),
                      .batch_stride = length * row_bytes,
                      .length_stride = row_bytes,
                      .row_bytes = row_bytes,
                      .length = length,
                      .indices = indices.data(),
                      .tokens = tokens,
                      .packed = reinterpret_cast<char*>(packed.mutable_data())},
                     kernels::serial);
  return py::make_tuple(packed, indices, cu_seqlens);
}

}  // namespace

void bind_pack(py::module_& m) {
  m.def("pack", &pack, py::arg("hidden").noconvert(), py::arg("mask").noconvert(),
        "hidden float32 (B, S, H), mask bool (B, S) -> packed (T, H), indices (T,), cu_seqlens (B+1,)");
}

}  // namespace dynplan
