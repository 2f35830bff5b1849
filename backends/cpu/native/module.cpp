// The Python module: what it takes arguments from and turns exceptions into. The operators bind themselves, see bind.hpp.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <sstream>

#include "bind.hpp"
#include "dispatch.hpp"
#include "packed.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace porthal {

void bind_limits(py::module_& m);
void bind_meeting(py::module_& m);

namespace {

int bfloat16_num = -1;  // NumPy's number for ml_dtypes.bfloat16, given out when that is imported
PyTypeObject* array_type = nullptr;

// NumPy is imported by the first array, so that what is built in can be asked for without it.
void know_arrays() {
  if (array_type) return;
  bfloat16_num = py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")).num();
  array_type = py::detail::npy_api::get().PyArray_Type_;
}

Kind kind_of(PyObject* descr) {
  know_arrays();
  const auto* const d = py::detail::array_descriptor_proxy(descr);
  if (d->byteorder != '=' && d->byteorder != '|') return Kind::other;
  const int num = py::reinterpret_borrow<py::dtype>(descr).num();
  using api = py::detail::npy_api;
  if (num == bfloat16_num) return Kind::b16;
  switch (num) {
    case api::NPY_FLOAT_: return Kind::f32;
    case 23: return Kind::f16;  // NPY_HALF
    case api::NPY_INT_: return Kind::i32;
    case api::NPY_LONG_: case api::NPY_LONGLONG_: return Kind::i64;
    case api::NPY_BOOL_: return Kind::boolean;
    case api::NPY_BYTE_: return Kind::i8;
    case api::NPY_UBYTE_: return Kind::u8;
    default: return Kind::other;
  }
}

bool wrong_type(const char* name, PyObject* object, const char* expected) {
  PyErr_Format(PyExc_TypeError, "%s is a %s, expected %s.", name, Py_TYPE(object)->tp_name, expected);
  return false;
}

Array array(const py::array& a, const char* name) {
  Array made;
  if (!read(a.ptr(), name, made)) throw py::error_already_set();
  return made;
}

std::unique_ptr<Packed> make_packed(std::int64_t experts, std::int64_t rows, std::int64_t columns,
                                    const py::object& dtype, bool gated, const std::string& scheme) {
  const py::dtype wanted = py::dtype::from_args(dtype);
  const Kind kind = kind_of(wanted.ptr());
  if (kind != Kind::f32 && kind != Kind::b16 && kind != Kind::f16)
    refuse("dtype", "is " + py::str(wanted).cast<std::string>(), "native float32, bfloat16 or float16");
  if (experts < 1 || rows < 1 || columns < 1 || (gated && rows % 2))
    throw py::value_error("shape is [" + std::to_string(experts) + ", " + std::to_string(rows) + ", " +
                          std::to_string(columns) + "], expected every size at least 1" +
                          (gated ? " and as many gate as up rows." : "."));
  int coding = 0;
  while (coding <= kCodings && scheme != kForms[coding].scheme) ++coding;
  if (coding > kCodings) refuse("scheme", "is '" + scheme + "'", "one that this module packs");
  if (static_cast<Coding>(coding) == Coding::int8_channel && columns > kDeepest)
    refuse("columns", "is " + std::to_string(columns), "at most " + std::to_string(kDeepest) + " under int8_channel");
  return std::make_unique<Packed>(experts, rows, columns, kind, gated, static_cast<Coding>(coding));
}

void check_expert(const Packed& packed, std::int64_t expert) {
  if (expert < 0 || expert >= packed.experts)
    throw py::index_error("expert is " + std::to_string(expert) + ", expected 0 to " +
                          std::to_string(packed.experts - 1) + ".");
}

void set_expert(Packed& packed, std::int64_t expert, const py::array& logical) {
  check_expert(packed, expert);
  const Array a = array(logical, "logical");
  a.has(packed.kind);
  const Matrix matrix = a.matrix(packed.rows, packed.columns);
  py::gil_scoped_release release;
  packed.set(expert, matrix);
}

void get_expert(const Packed& packed, std::int64_t expert, const py::array& logical) {
  check_expert(packed, expert);
  const Array a = array(logical, "logical");
  a.has(packed.kind);
  void* const out = a.output({packed.rows, packed.columns});
  py::gil_scoped_release release;
  packed.get(expert, out);
}

using Whole = std::optional<py::array>;

void set_codes(Packed& packed, std::int64_t expert, const py::array& codes, const py::array& scale, const Whole& whole) {
  check_expert(packed, expert);
  const Array of_codes = array(codes, "codes"), of_scale = array(scale, "scale");
  const Array of_rows = whole ? array(*whole, "whole") : Array{};
  py::gil_scoped_release release;
  packed.set(expert, of_codes, of_scale, whole ? &of_rows : nullptr);
}

void get_codes(const Packed& packed, std::int64_t expert, const py::array& codes, const py::array& scale, const Whole& whole) {
  check_expert(packed, expert);
  const Array of_codes = array(codes, "codes"), of_scale = array(scale, "scale");
  const Array of_rows = whole ? array(*whole, "whole") : Array{};
  py::gil_scoped_release release;
  packed.get(expert, of_codes, of_scale, whole ? &of_rows : nullptr);
}

py::object record(Recording& recording, const py::function& run) {
  struct Turn {
    Recording* const before = Recording::current;
    ~Turn() { Recording::current = before; }
  } turn;
  Recording::current = &recording;
  return run();
}

void replay(const Recording& recording) {
  py::gil_scoped_release release;
  recording.replay();
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Isa i : available()) {
    if (name == isa_name(i)) return use(i);
    known += (known.empty() ? "" : ", ") + std::string(isa_name(i));
  }
  refuse("isa", "is '" + name + "'", "one of " + known);
}

}  // namespace

bool read(PyObject* object, const char* name, Array& to) {
  if (!array_type) {
    try {
      know_arrays();
    } catch (py::error_already_set& error) {
      error.restore();
      return false;
    }
  }
  if (Py_TYPE(object) != array_type && !PyObject_TypeCheck(object, array_type))
    return wrong_type(name, object, "a NumPy array");
  const auto* const a = py::detail::array_proxy(object);
  if (a->nd > kDims) {
    PyErr_Format(PyExc_ValueError, "%s has %d dims, expected at most %d.", name, a->nd, kDims);
    return false;
  }
  to.data = a->data;
  to.name = name;
  to.object = object;
  to.dims = a->nd;
  for (int i = 0; i < a->nd; ++i) {
    to.shape[i] = a->dimensions[i];
    to.strides[i] = a->strides[i];
  }
  to.kind = kind_of(a->descr);
  to.contiguous = (a->flags & py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_) != 0;
  to.writable = (a->flags & py::detail::npy_api::NPY_ARRAY_WRITEABLE_) != 0;
  if (!(a->flags & py::detail::npy_api::NPY_ARRAY_ALIGNED_)) {
    PyErr_Format(PyExc_ValueError, "%s lies at an address that is no multiple of its item size, expected an aligned array.", name);
    return false;
  }
  return true;
}

bool read(PyObject* object, const char* name, const Packed*& to) {
  const py::handle h(object);
  if (!py::isinstance<Packed>(h)) return wrong_type(name, object, "weights packed by this module");
  to = h.cast<const Packed*>();
  return true;
}

bool read(PyObject* object, const char* name, std::int64_t& to) {
  PyObject* const number = PyNumber_Index(object);
  if (!number) return wrong_type(name, object, "an integer");
  to = PyLong_AsLongLong(number);
  Py_DECREF(number);
  return to != -1 || !PyErr_Occurred();
}

bool read(PyObject* object, const char* name, double& to) {
  to = PyFloat_AsDouble(object);
  return to != -1.0 || !PyErr_Occurred() || wrong_type(name, object, "a number");
}

bool read(PyObject* object, const char*, bool& to) {
  const int truth = PyObject_IsTrue(object);
  to = truth == 1;
  return truth >= 0;
}

PyObject* wrong_count(const char* op, Py_ssize_t given, std::size_t expected) {
  return PyErr_Format(PyExc_TypeError, "%s was given %zd arguments, expected %zu.", op, given, expected);
}

PyObject* failed() {
  try {
    throw;
  } catch (const WrongDtype& e) {
    const py::object dtype = py::reinterpret_borrow<py::array>(static_cast<PyObject*>(e.object)).dtype();
    PyErr_Format(PyExc_ValueError, "%s has dtype %S, expected %s.", e.name, dtype.ptr(), e.expected.c_str());
  } catch (const std::invalid_argument& e) {
    PyErr_SetString(PyExc_ValueError, e.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
  }
  return nullptr;
}

thread_local Recording* Recording::current = nullptr;

Recording::~Recording() {
  for (PyObject* object : held_) Py_DECREF(object);
}

void Recording::add(std::function<void()> call, PyObject* const* arguments, std::size_t count) {
  calls_.push_back(std::move(call));
  for (std::size_t i = 0; i < count; ++i) held_.push_back(Py_NewRef(arguments[i]));
}

Op*& first_op() {
  static Op* first = nullptr;
  return first;
}

Op::Op(const char* name, const char* parameters, Fast fast, const char* doc)
    : name(name),
      method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(fast)), METH_FASTCALL, doc},
      next(first_op()) {
  std::istringstream words(parameters);
  for (std::string word; words >> word;) this->parameters.push_back(word);
  first_op() = this;
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels; arrays are NumPy's, outputs are given by the caller, the GIL is released while computing.";
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      std::rethrow_exception(p);
    } catch (const WrongDtype&) {
      failed();
    }
  });

  bind_limits(m);
  bind_meeting(m);
  m.def("num_threads", &num_threads, "Threads that a kernel may use, the caller included.");
  m.def("set_num_threads", &set_num_threads, "count"_a, "Results do not depend on it.");
  m.def("isa", [] { return isa_name(isa()); }, "Instruction set in use: by default the best this CPU runs.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const Isa i : available()) names.append(isa_name(i));
        return py::tuple(names);
      },
      "Instruction sets built in that this CPU runs, best last.");
  m.def("set_isa", &set_isa, "name"_a,
        "Last bits of results may change with it; weights packed before keep the one they were packed for.");

  for (Op* op = first_op(); op; op = op->next)
    m.attr(op->name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&op->method, nullptr, nullptr));

  py::class_<Recording>(m, "Recording", py::module_local(), "Calls of these kernels, to be made again on the same memory.")
      .def(py::init<>())
      .def("record", &record, "run", "Calls run() and returns its result; calls of kernels in it are kept, not computed.")
      .def("replay", &replay, "Makes the calls.");

  // Local to the module: a second build of it, as the suite's self-test makes, has a type of its own.
  py::class_<Packed>(m, "Packed", py::module_local(), py::buffer_protocol(),
                     "Matrices [experts, rows, columns] in the order in which kernels read them;\n"
                     "gated=True for w13 (gate rows, then up rows). Zero until set. memoryview(packed) shows the bytes.\n"
                     "Under a scheme dtype is that of the rows to multiply them with.")
      .def(py::init(&make_packed), "experts"_a, "rows"_a, "columns"_a, "dtype"_a, "gated"_a = false,
           "scheme"_a = "none")
      .def("set", &set_expert, "expert"_a, "logical"_a, "Packs logical[rows, columns], of any strides.")
      .def("get", &get_expert, "expert"_a, "logical"_a, "Unpacks into logical[rows, columns], bit for bit.")
      .def("set_codes", &set_codes, "expert"_a, "codes"_a, "scale"_a, "whole"_a = py::none(),
           "Packs the parts of a matrix under the scheme.")
      .def("get_codes", &get_codes, "expert"_a, "codes"_a, "scale"_a, "whole"_a = py::none(), "Unpacks them, bit for bit.")
      .def_property_readonly("shape", [](const Packed& p) { return py::make_tuple(p.experts, p.rows, p.columns); })
      .def_readonly("gated", &Packed::gated)
      .def_property_readonly("nbytes", &Packed::bytes, "Bytes in memory, padding included.")
      .def_buffer([](const Packed& p) { return py::buffer_info(reinterpret_cast<const std::uint8_t*>(p.at(0, 0)), p.bytes()); });
}

}  // namespace porthal
