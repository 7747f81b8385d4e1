// One binder per op: its torch-free kernels over NumPy buffers.
#pragma once

#include <pybind11/pybind11.h>

namespace dynplan {

void bind_pack(pybind11::module_& m);
void bind_build_dispatch(pybind11::module_& m);
void bind_embed_tokens(pybind11::module_& m);
void bind_conditional_encoder_layer(pybind11::module_& m);
void bind_region_cross_entropy(pybind11::module_& m);

}  // namespace dynplan
