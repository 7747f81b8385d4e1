// dynplan._native: the torch-free kernels over NumPy buffers, and what they were built for.
#include <pybind11/pybind11.h>

#include <thread>

#include "kernels/simd/isa.h"
#include "native/bindings.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "Torch-free dynplan kernels over NumPy buffers, single-threaded: for tests and microbenchmarks.";
  m.def(
      "cpu_features",
      [] {
        py::dict features;
        features["isa"] = dynplan::kernels::name(dynplan::kernels::cpu_isa());
        features["best_isa"] = dynplan::kernels::name(dynplan::kernels::best_cpu_isa());
        features["hardware_threads"] = std::thread::hardware_concurrency();
        return features;
      },
      "isa: the instruction set the kernels run on (DYNPLAN_CPU_ISA forces one); best_isa: the best this CPU has.");
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = DYNPLAN_VERSION;
        info["compiler"] = __VERSION__;
        info["cxx"] = __cplusplus;
        return info;
      },
      "version, compiler and C++ standard this module was built with.");
  dynplan::bind_pack(m);
  dynplan::bind_build_dispatch(m);
  dynplan::bind_embed_tokens(m);
  dynplan::bind_conditional_encoder_layer(m);
  dynplan::bind_region_cross_entropy(m);
}
