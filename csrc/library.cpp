// dynplan._C: loading this module registers every op. Of Python's own objects it knows those of object_checks.h.
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

#include "python/object_checks.h"

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, dynplan::object_checks, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

namespace dynplan {
namespace {

std::string build_info() {
#ifdef DYNPLAN_WITH_CUDA
  return "torch " TORCH_VERSION ", cuda, " __VERSION__;
#else
  return "torch " TORCH_VERSION ", cpu, " __VERSION__;
#endif
}

}  // namespace

TORCH_LIBRARY(dynplan, m) {
  m.def("_build_info() -> str", &build_info);
}

}  // namespace dynplan
