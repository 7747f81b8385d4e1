// dynplan._C: loading this module registers every op; Python sees no symbol but the init function.
#include <Python.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static struct PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
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
