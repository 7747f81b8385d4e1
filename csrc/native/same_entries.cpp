#include <pybind11/pybind11.h>

#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

// Whether tables[i][names[i]] is objects[i] for all i, and every table of `empty` is empty.
bool same_entries(const py::list& tables, const py::list& names, const py::list& objects,
                  const py::list& empty) {
  const Py_ssize_t count = PyList_GET_SIZE(tables.ptr());
  if (PyList_GET_SIZE(names.ptr()) != count || PyList_GET_SIZE(objects.ptr()) != count)
    throw py::value_error("same_entries: expected tables, names and objects of one length");
  const auto check = [](PyObject* table) {
    if (!PyDict_Check(table)) throw py::type_error("same_entries: expected tables to be dictionaries");
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* table = PyList_GET_ITEM(tables.ptr(), i);
    check(table);
    PyObject* found = PyDict_GetItemWithError(table, PyList_GET_ITEM(names.ptr(), i));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(empty.ptr()); ++i) {
    check(PyList_GET_ITEM(empty.ptr(), i));
    if (PyDict_Size(PyList_GET_ITEM(empty.ptr(), i)) != 0) return false;
  }
  return true;
}

}  // namespace

void bind_same_entries(py::module_& m) {
  m.def("same_entries", &same_entries, py::arg("tables"), py::arg("names"), py::arg("objects"),
        py::arg("empty"),
        "Whether tables[i][names[i]] is objects[i] for all i, and all tables of `empty` are.");
}

}  // namespace dynplan
