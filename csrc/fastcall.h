// Binds a function of numbers and addresses straight to CPython's vectorcall. At a batch of 128 the
// generic dispatch of pybind11 costs as much as the kernel behind it.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fastis.h"

namespace fastis {

template <class T>
struct FromPython {
  static T convert(PyObject* object) {
    if constexpr (std::is_same_v<T, bool>) {
      return object == Py_True;
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(object));
    } else if constexpr (std::is_unsigned_v<T>) {
      return static_cast<T>(PyLong_AsUnsignedLongLong(object));
    } else {
      return static_cast<T>(PyLong_AsLongLong(object));
    }
  }
};
template <class T>
struct FromPython<Pointer<T>> {
  static Pointer<T> convert(PyObject* object) {
    return {reinterpret_cast<T*>(PyLong_AsUnsignedLongLong(object))};
  }
};

inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }

// One per signature and tag; the function is chosen at import (the instruction set).
template <class Tag, class R, class... A>
struct FastCall {
  static inline R (*function)(A...) = nullptr;
  static inline PyMethodDef definition{};

  template <size_t... i>
  static PyObject* invoke(PyObject* const* arguments, std::index_sequence<i...>) {
    const std::tuple<A...> converted{FromPython<A>::convert(arguments[i])...};
    if (PyErr_Occurred() != nullptr) return nullptr;
    if constexpr (std::is_void_v<R>) {
      function(std::get<i>(converted)...);
      Py_RETURN_NONE;
    } else {
      return to_python(function(std::get<i>(converted)...));
    }
  }

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(A))) {
      return PyErr_Format(PyExc_TypeError, "%s takes %zd positional arguments, got %zd",
                          definition.ml_name, sizeof...(A), count);
    }
    try {
      return invoke(arguments, std::index_sequence_for<A...>{});
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    }
  }
};

// Adds m.name(...), positional arguments only.
template <class Tag, class R, class... A>
void define_fast(pybind11::module_& m, const char* name, R (*function)(A...)) {
  using Call = FastCall<Tag, R, A...>;
  Call::function = function;
  Call::definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Call::call)),
                      METH_FASTCALL, nullptr};
  m.attr(name) = pybind11::reinterpret_steal<pybind11::object>(
      PyCFunction_NewEx(&Call::definition, nullptr, m.attr("__name__").ptr()));
}

}  // namespace fastis
