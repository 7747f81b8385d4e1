#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

// Between two forwards of one short text the model's weights have pushed every dictionary out of the caches,
// and a look-up waits for one line after the other: the dictionary, its keys, their values. So those of the
// look-ups to come are asked for: half of the time.
constexpr size_t kTablesAhead = 16, kKeysAhead = 8;

// CPython up to 3.11 numbers every change of every dictionary (PEP 509): one line tells that there was none,
// and those of many dictionaries come together. Of 12 layers' entries: 5 us where look-ups took 40.
#if PY_VERSION_HEX < 0x030C0000
#define DYNPLAN_DICTIONARIES_COUNT_CHANGES
#endif

// Entries of dictionaries that shall stay the objects they are, and dictionaries that shall stay empty.
class Entries {
 public:
  Entries(const py::list& tables, const py::list& names, const py::list& objects, const py::list& empty)
      : owned_{copy(tables), copy(names), copy(objects), copy(empty)} {
    if (py::len(names) != py::len(tables) || py::len(objects) != py::len(tables))
      throw py::value_error("Entries: expected tables, names and objects of one length");
    for (const py::list& list : {tables, empty})
      for (const py::handle table : list) {
        if (!PyDict_Check(table.ptr())) throw py::type_error("Entries: expected tables to be dictionaries");
        if (std::find_if(seen_.begin(), seen_.end(), [&](const Table& t) { return t.dict == table.ptr(); }) ==
            seen_.end())
          seen_.push_back({table.ptr(), 0});
      }
    for (const py::handle table : empty) empty_.push_back(table.ptr());
    for (size_t i = 0; i < py::len(tables); ++i)
      entries_.push_back({PyList_GET_ITEM(tables.ptr(), i), PyList_GET_ITEM(names.ptr(), i),
                          PyList_GET_ITEM(objects.ptr(), i)});
  }

  bool same() {
    if (is_untouched()) return true;
    if (!look()) return false;
    for (Table& table : seen_) table.version = version(table.dict);
    return true;
  }

  // For the garbage collector: what is seen here may well lead back to whoever holds this object.
  int traverse(visitproc visit, void* arg) const {
    for (const py::object& list : owned_) Py_VISIT(list.ptr());
    return 0;
  }
  void clear() {
    seen_.clear(), entries_.clear(), empty_.clear();
    for (py::object& list : owned_) list = py::object();
  }

 private:
  struct Table {
    PyObject* dict;
    uint64_t version;  // when `look` last held; 0 is none of any dictionary's
  };
  struct Entry {
    PyObject *table, *name, *object;
  };

  // The caller may go on to change its lists.
  static py::object copy(const py::list& list) {
    return py::reinterpret_steal<py::object>(PyList_GetSlice(list.ptr(), 0, PyList_GET_SIZE(list.ptr())));
  }

#ifdef DYNPLAN_DICTIONARIES_COUNT_CHANGES
  static uint64_t version(PyObject* table) {
    return reinterpret_cast<const PyDictObject*>(table)->ma_version_tag;
  }
  bool is_untouched() const {
    bool same = true;  // no early way out: the loads of all tables shall be under way together
    for (const Table& table : seen_) same &= version(table.dict) == table.version;
    return same;
  }
#else
  static uint64_t version(PyObject*) {
    return 0;
  }
  bool is_untouched() const {
    return false;
  }
#endif

  bool look() const {
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (i + kTablesAhead < entries_.size()) __builtin_prefetch(entries_[i + kTablesAhead].table);
      if (i + kKeysAhead < entries_.size()) ask_for_keys(entries_[i + kKeysAhead].table);
      PyObject* found = PyDict_GetItemWithError(entries_[i].table, entries_[i].name);
      if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
      if (found != entries_[i].object) return false;
    }
    for (PyObject* table : empty_)
      if (PyDict_GET_SIZE(table) != 0) return false;
    return true;
  }

  static void ask_for_keys(PyObject* table) {
    const auto* dict = reinterpret_cast<const PyDictObject*>(table);
    const char* keys = reinterpret_cast<const char*>(dict->ma_keys);
    for (int line = 0; line < 3; ++line) __builtin_prefetch(keys + 64 * line);  // those of some eight entries
    __builtin_prefetch(dict->ma_values);
  }

  py::object owned_[4];
  std::vector<Table> seen_;  // every dictionary, once
  std::vector<Entry> entries_;
  std::vector<PyObject*> empty_;
};

// Null while the object is being made: garbage may be collected then.
Entries* made(PyObject* self) {
  const auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<Entries>() : nullptr;
}

void collect_garbage_through(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Entries* entries = made(self);
    return entries == nullptr ? 0 : entries->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (Entries* entries = made(self)) entries->clear();
    return 0;
  };
}

}  // namespace

void bind_entries(py::module_& m) {
  py::class_<Entries>(m, "Entries", py::custom_type_setup(collect_garbage_through),
                      "Whether tables[i][names[i]] is objects[i] for all i, and all tables of `empty` are.")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&>(), py::arg("tables"),
           py::arg("names"), py::arg("objects"), py::arg("empty"))
      .def("same", &Entries::same);
}

}  // namespace dynplan
