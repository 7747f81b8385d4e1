// What every file of dynplan._native includes, parsed once by setup.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
