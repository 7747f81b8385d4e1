#include "python/object_checks.h"

#include <cstddef>
#include <optional>

#include "ops/weight_watch.h"

namespace dynplan {
namespace {

constexpr Py_ssize_t kAhead = 16;  // objects prefetched before their turn

void prefetch(PyObject* tuple, Py_ssize_t index, Py_ssize_t size) {
  if (index < size) __builtin_prefetch(PyTuple_GetItem(tuple, index));
}

// Takes `count` tuples of one length out of `arguments`; false with an exception set if they are not.
bool take_tuples(const char* function, PyObject* arguments, PyObject** tuples, Py_ssize_t count) {
  bool fit = PyTuple_Size(arguments) == count;
  for (Py_ssize_t i = 0; fit && i < count; ++i) {
    tuples[i] = PyTuple_GetItem(arguments, i);
    fit = PyTuple_Check(tuples[i]) && PyTuple_Size(tuples[i]) == PyTuple_Size(tuples[0]);
  }
  if (!fit) PyErr_Format(PyExc_TypeError, "%s: expected %zd tuples of one length", function, count);
  return fit;
}

bool check_dict(const char* function, PyObject* object) {
  if (PyDict_Check(object)) return true;
  PyErr_Format(PyExc_TypeError, "%s: expected dictionaries, got another object", function);
  return false;
}

PyObject* types_are(PyObject*, PyObject* arguments) {
  PyObject* tuples[2];
  if (!take_tuples("types_are", arguments, tuples, 2)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(tuples[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    prefetch(tuples[0], i + kAhead, size);
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GetItem(tuples[0], i)));
    if (type != PyTuple_GetItem(tuples[1], i)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* sizes_are(PyObject*, PyObject* arguments) {
  PyObject* tuples[2];
  if (!take_tuples("sizes_are", arguments, tuples, 2)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(tuples[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    prefetch(tuples[0], i + kAhead, size);
    PyObject* dict = PyTuple_GetItem(tuples[0], i);
    if (!check_dict("sizes_are", dict)) return nullptr;
    const Py_ssize_t wanted = PyLong_AsSsize_t(PyTuple_GetItem(tuples[1], i));
    if (wanted < 0 && PyErr_Occurred() != nullptr) return nullptr;
    if (PyDict_Size(dict) != wanted) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* entries_are(PyObject*, PyObject* arguments) {
  PyObject* tuples[3];
  if (!take_tuples("entries_are", arguments, tuples, 3)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(tuples[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    prefetch(tuples[0], i + kAhead, size);
    PyObject* dict = PyTuple_GetItem(tuples[0], i);
    if (!check_dict("entries_are", dict)) return nullptr;
    PyObject* found = PyDict_GetItemWithError(dict, PyTuple_GetItem(tuples[1], i));
    if (found == nullptr && PyErr_Occurred() != nullptr) return nullptr;
    PyObject* wanted = PyTuple_GetItem(tuples[2], i);
    if (found != wanted && !(found == nullptr && wanted == Py_None)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* attributes_are(PyObject*, PyObject* arguments) {
  PyObject* tuples[3];
  if (!take_tuples("attributes_are", arguments, tuples, 3)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(tuples[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    prefetch(tuples[0], i + kAhead, size);
    PyObject* found = PyObject_GetAttr(PyTuple_GetItem(tuples[0], i), PyTuple_GetItem(tuples[1], i));
    if (found == nullptr) {
      if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) return nullptr;
      PyErr_Clear();
      Py_RETURN_FALSE;
    }
    const bool same = found == PyTuple_GetItem(tuples[2], i);
    Py_DECREF(found);
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* dicts_are(PyObject*, PyObject* arguments) {
  PyObject* tuples[2];
  if (!take_tuples("dicts_are", arguments, tuples, 2)) return nullptr;
  const Py_ssize_t size = PyTuple_Size(tuples[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    prefetch(tuples[0], i + kAhead, size);
    PyObject* dict = PyObject_GenericGetDict(PyTuple_GetItem(tuples[0], i), nullptr);
    if (dict == nullptr) return nullptr;
    const bool same = dict == PyTuple_GetItem(tuples[1], i);
    Py_DECREF(dict);
    if (!same) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyObject* weights_are_unchanged(PyObject*, PyObject* handle) {
  const long long value = PyLong_AsLongLong(handle);
  if (value == -1 && PyErr_Occurred() != nullptr) return nullptr;
  const std::optional<bool> unchanged = dynplan::weights_are_unchanged(value);
  if (!unchanged.has_value()) {
    PyErr_Format(PyExc_ValueError, "weights_are_unchanged: expected a WeightWatch's handle, got %lld", value);
    return nullptr;
  }
  return PyBool_FromLong(*unchanged);
}

}  // namespace

PyMethodDef object_checks[] = {
    {"types_are", types_are, METH_VARARGS, "type(objects[i]) is types[i] for all i"},
    {"sizes_are", sizes_are, METH_VARARGS, "len(dicts[i]) == sizes[i] for all i"},
    {"entries_are", entries_are, METH_VARARGS, "dicts[i].get(keys[i]) is values[i] for all i"},
    {"attributes_are", attributes_are, METH_VARARGS, "getattr(objects[i], names[i]) is values[i] for all i"},
    {"dicts_are", dicts_are, METH_VARARGS, "objects[i].__dict__ is dicts[i] for all i"},
    {"weights_are_unchanged", weights_are_unchanged, METH_O,
     "whether the tensors of the WeightWatch with this handle are as they were"},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace dynplan
