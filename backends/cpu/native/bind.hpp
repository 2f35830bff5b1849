// From a C++ function on arrays and numbers to a Python function with the same parameters, in place, without the GIL.
//
//   void add(const Array& a, const Array& b, const Array& y);
//   PORTHAL_OP(add, "a b y", "y = a + b ...")
//
// is `_native.add(a, b, y)`. A parameter is a const Array& (an ndarray), a const Array* (an ndarray or None), a const
// Packed&, an integer, a double or a bool; arguments are positional; the result is None.
#pragma once

#include <Python.h>

#include <functional>
#include <tuple>
#include <utility>

#include "array.hpp"

namespace porthal {

class Packed;

struct WrongDtype {
  const char* name;
  void* object;
  std::string expected;
};

// Each raises what `failed` says and returns false where the object is not of its kind. Bodies in module.cpp.
bool read(PyObject* object, const char* name, Array& to);
bool read(PyObject* object, const char* name, const Packed*& to);
bool read(PyObject* object, const char* name, std::int64_t& to);
bool read(PyObject* object, const char* name, double& to);
bool read(PyObject* object, const char* name, bool& to);
PyObject* wrong_count(const char* op, Py_ssize_t given, std::size_t expected);
PyObject* failed();  // sets the Python error of the exception being handled

// Calls that were made, but not computed, while this was recording in their thread; with what they read and write.
class Recording {
 public:
  static thread_local Recording* current;

  ~Recording();
  void add(std::function<void()> call, PyObject* const* arguments, std::size_t count);
  void replay() const {
    for (const auto& call : calls_) call();
  }

 private:
  std::vector<std::function<void()>> calls_;
  std::vector<PyObject*> held_;
};

// What a parameter is kept in while the call runs, and how it is passed.
template <class T>
struct Slot {
  T value;
  bool read(PyObject* o, const char* name) { return porthal::read(o, name, value); }
  T get() const { return value; }
};
template <>
struct Slot<const Array&> {
  Array value;
  bool read(PyObject* o, const char* name) { return porthal::read(o, name, value); }
  const Array& get() const { return value; }
};
template <>
struct Slot<const Array*> {
  Array value;
  bool there = false;
  bool read(PyObject* o, const char* name) { return o == Py_None || (there = porthal::read(o, name, value)); }
  const Array* get() const { return there ? &value : nullptr; }
};
template <>
struct Slot<const Packed&> {
  const Packed* value = nullptr;
  bool read(PyObject* o, const char* name) { return porthal::read(o, name, value); }
  const Packed& get() const { return *value; }
};

// A bound operator; all of them form a list that module.cpp walks.
struct Op {
  using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);
  Op(const char* name, const char* parameters, Fast fast, const char* doc);

  const char* name;
  std::vector<std::string> parameters;
  PyMethodDef method;
  Op* next;
};

Op*& first_op();

template <auto F>
struct Entry;
template <class... A, void (*F)(A...)>
struct Entry<F> {
  static inline const Op* op = nullptr;

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    if (count != static_cast<Py_ssize_t>(sizeof...(A))) return wrong_count(op->name, count, sizeof...(A));
    return call(arguments, std::index_sequence_for<A...>());
  }

  template <std::size_t... I>
  static PyObject* call(PyObject* const* arguments, std::index_sequence<I...>) {
    std::tuple<Slot<A>...> slots;
    if (!(std::get<I>(slots).read(arguments[I], op->parameters[I].c_str()) && ...)) return nullptr;
    if (Recording* const recording = Recording::current) {
      recording->add([slots] { F(std::get<I>(slots).get()...); }, arguments, sizeof...(A));
      Py_RETURN_NONE;
    }
    PyThreadState* const state = PyEval_SaveThread();
    try {
      F(std::get<I>(slots).get()...);
    } catch (...) {
      PyEval_RestoreThread(state);
      return failed();
    }
    PyEval_RestoreThread(state);
    Py_RETURN_NONE;
  }
};

#define PORTHAL_OP(function, parameters, doc)                                                     \
  static Op op_##function(#function, parameters, Entry<&function>::call, doc);                    \
  static const bool bound_##function = (Entry<&function>::op = &op_##function, true);

}  // namespace porthal
