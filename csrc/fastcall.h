// Binds functions of numbers, addresses and aggregates of them straight to CPython's vectorcall: at
// a batch of 128 the generic dispatch of pybind11 costs as much as the kernel behind it.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "fastis.h"

namespace fastis {

// One Python object as a T. A failure is left in PyErr_Occurred().
template <class T>
struct FromPython {
  static T convert(PyObject* object) {
    if constexpr (std::is_enum_v<T>) {
      return static_cast<T>(FromPython<std::underlying_type_t<T>>::convert(object));
    } else if constexpr (std::is_same_v<T, bool>) {
      if (object != Py_True && object != Py_False) {
        PyErr_Format(PyExc_TypeError, "expected a bool, got %R", object);
      }
      return object == Py_True;
    } else if constexpr (std::is_floating_point_v<T>) {
      return static_cast<T>(PyFloat_AsDouble(object));
    } else if constexpr (std::is_unsigned_v<T>) {
      return narrow(PyLong_AsUnsignedLongLong(object));
    } else {
      return narrow(PyLong_AsLongLong(object));
    }
  }

 private:
  template <class Wide>
  static T narrow(Wide value) {
    if (static_cast<Wide>(static_cast<T>(value)) != value && PyErr_Occurred() == nullptr) {
      PyErr_SetString(PyExc_OverflowError, "the integer does not fit its parameter");
    }
    return static_cast<T>(value);
  }
};
// tensor.data_ptr(), or 0.
template <class T>
struct FromPython<Pointer<T>> {
  static Pointer<T> convert(PyObject* object) {
    return {reinterpret_cast<T*>(PyLong_AsUnsignedLongLong(object))};
  }
};

inline PyObject* to_python(bool value) { return PyBool_FromLong(value); }
inline PyObject* to_python(int value) { return PyLong_FromLong(value); }
inline PyObject* to_python(unsigned value) { return PyLong_FromUnsignedLong(value); }
inline PyObject* to_python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* to_python(const char* value) { return PyUnicode_FromString(value); }
inline PyObject* to_python(const std::string& value) {
  return PyUnicode_FromStringAndSize(value.data(), static_cast<Py_ssize_t>(value.size()));
}

// A parameter that is a struct takes one argument for each of its fields, in their order.
template <class T>
constexpr bool kAggregate = std::is_aggregate_v<T>;
template <class T>
constexpr bool kAggregate<Pointer<T>> = false;

struct Anything {
  template <class T>
  operator T() const;
};
template <class T, class = void, class... Fields>
struct FieldCount : std::integral_constant<size_t, sizeof...(Fields) - 1> {};
template <class T, class... Fields>
struct FieldCount<T, std::void_t<decltype(T{Fields{}...})>, Fields...>
    : FieldCount<T, void, Fields..., Anything> {};

// How many arguments a parameter takes.
template <class T>
constexpr size_t arity() {
  if constexpr (kAggregate<T>) {
    return FieldCount<T>::value;
  } else {
    return 1;
  }
}

// The arguments of a call, taken one after the other.
struct Arguments {
  PyObject* const* next;

  template <class T>
  T take() {
    if constexpr (kAggregate<T>) {
      return take_fields<T>(std::make_index_sequence<arity<T>()>{});
    } else {
      return FromPython<T>::convert(*next++);
    }
  }

 private:
  struct Field {
    Arguments& arguments;
    template <class T>
    operator T() const {
      static_assert(!kAggregate<T>, "a field must be a number or an address");
      return arguments.take<T>();
    }
  };
  // Braces: their elements are evaluated from left to right.
  template <class T, size_t... i>
  T take_fields(std::index_sequence<i...>) {
    return T{(static_cast<void>(i), Field{*this})...};
  }
};

// One per signature and tag; the function is chosen at import (the instruction set).
template <class Tag, class R, class... A>
struct FastCall {
  static inline R (*function)(A...) = nullptr;
  static inline PyMethodDef definition{};
  static constexpr size_t kArity = (size_t{0} + ... + arity<std::decay_t<A>>());

  static PyObject* invoke([[maybe_unused]] Arguments arguments) {
    const std::tuple<std::decay_t<A>...> converted{arguments.take<std::decay_t<A>>()...};
    if (PyErr_Occurred() != nullptr) return nullptr;
    if constexpr (std::is_void_v<R>) {
      std::apply(function, converted);
      Py_RETURN_NONE;
    } else {
      return to_python(std::apply(function, converted));
    }
  }

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(kArity)) {
      return PyErr_Format(PyExc_TypeError, "%s takes %zu positional arguments, got %zd",
                          definition.ml_name, kArity, count);
    }
    try {
      return invoke({arguments});
    } catch (const std::bad_alloc&) {
      return PyErr_NoMemory();
    } catch (const std::out_of_range& error) {
      PyErr_SetString(PyExc_IndexError, error.what());
      return nullptr;
    } catch (const std::domain_error& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }
};

// Adds module.name(...), positional arguments only.
template <class Tag, class R, class... A>
void define(pybind11::module_& module, const char* name, R (*function)(A...)) {
  using Call = FastCall<Tag, R, A...>;
  Call::function = function;
  Call::definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Call::call)),
                      METH_FASTCALL, nullptr};
  module.attr(name) = pybind11::reinterpret_steal<pybind11::object>(
      PyCFunction_NewEx(&Call::definition, nullptr, module.attr("__name__").ptr()));
}

}  // namespace fastis

// A tag of its own for each: two functions may have one signature.
#define FASTIS_DEFINE(module, name, function)      \
  {                                                \
    struct Tag;                                    \
    fastis::define<Tag>(module, name, (function)); \
  }
