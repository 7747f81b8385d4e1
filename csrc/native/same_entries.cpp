#include <pybind11/pybind11.h>

#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

// Between two forwards of one short text the model's weights have pushed every dictionary out of the caches,
// and a look-up waits for one line after the other: the dictionary, its keys, their values. So those of the
// look-ups to come are asked for: half of the time.
constexpr Py_ssize_t kTablesAhead = 16, kKeysAhead = 8;

void ask_for_table(const py::list& tables, Py_ssize_t i) {
  if (i < PyList_GET_SIZE(tables.ptr())) __builtin_prefetch(PyList_GET_ITEM(tables.ptr(), i));
}

void ask_for_keys(const py::list& tables, Py_ssize_t i) {
  if (i >= PyList_GET_SIZE(tables.ptr()) || !PyDict_Check(PyList_GET_ITEM(tables.ptr(), i))) return;
  const auto* table = reinterpret_cast<const PyDictObject*>(PyList_GET_ITEM(tables.ptr(), i));
  const char* keys = reinterpret_cast<const char*>(table->ma_keys);
  for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);  // those of some eight entries
  __builtin_prefetch(table->ma_values);
}

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
    ask_for_table(tables, i + kTablesAhead);
    ask_for_keys(tables, i + kKeysAhead);
    PyObject* table = PyList_GET_ITEM(tables.ptr(), i);
    check(table);
    PyObject* found = PyDict_GetItemWithError(table, PyList_GET_ITEM(names.ptr(), i));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found != PyList_GET_ITEM(objects.ptr(), i)) return false;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(empty.ptr()); ++i) {
    ask_for_table(empty, i + kTablesAhead);
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
