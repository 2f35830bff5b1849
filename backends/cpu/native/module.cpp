// Bindings: check arguments, look at arrays as they lie, release the GIL, compute into the caller's output.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <limits>
#include <string>

#include "native.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace porthal {

void bind_limits(py::module_& m);

namespace {

enum class Kind { f32, b16, i32, other };

int bfloat16_num = -1;  // NumPy's number for ml_dtypes.bfloat16, given out at import

Kind kind_of(const py::dtype& dtype) {
  const int num = dtype.num();
  const char order = dtype.byteorder();
  if (order != '=' && order != '|') return Kind::other;
  if (num == bfloat16_num) return Kind::b16;
  if (num == py::detail::npy_api::NPY_FLOAT_) return Kind::f32;
  return num == py::detail::npy_api::NPY_INT_ ? Kind::i32 : Kind::other;
}

std::string shape_text(const py::array& a) {
  std::string text = "[";
  for (py::ssize_t i = 0; i < a.ndim(); ++i) text += (i ? ", " : "") + std::to_string(a.shape(i));
  return text + "]";
}

[[noreturn]] void refuse(const char* name, const std::string& got, const std::string& expected) {
  throw py::value_error(std::string(name) + " " + got + ", expected " + expected + ".");
}

Kind check_kind(const py::array& a, const char* name, std::initializer_list<Kind> allowed, const char* expected) {
  const py::dtype dtype = a.dtype();
  const Kind kind = kind_of(dtype);
  for (const Kind k : allowed)
    if (k == kind) return kind;
  refuse(name, "has dtype " + py::str(dtype).cast<std::string>(), expected);
}

Kind float_kind(const py::array& a, const char* name) {
  return check_kind(a, name, {Kind::f32, Kind::b16}, "native float32 or bfloat16");
}

void same_kind(const py::array& a, const char* name, Kind kind) {
  check_kind(a, name, {kind},
             kind == Kind::f32   ? "native float32"
             : kind == Kind::b16 ? "native bfloat16"
                                 : "native int32");
}

constexpr std::int64_t kAny = -1;

// A view of a one- or two-dimensional array; a vector is a matrix of one row.
Matrix view(const py::array& a, const char* name, std::int64_t rows, std::int64_t columns) {
  if (a.ndim() != 2 || (rows != kAny && a.shape(0) != rows) || (columns != kAny && a.shape(1) != columns))
    refuse(name, "has shape " + shape_text(a),
           "[" + (rows == kAny ? "any" : std::to_string(rows)) + ", " +
               (columns == kAny ? "any" : std::to_string(columns)) + "]");
  return {static_cast<const char*>(a.data()), a.shape(0), a.shape(1), a.strides(0), a.strides(1)};
}

Matrix view_vector(const py::array& a, const char* name, std::int64_t size) {
  if (a.ndim() != 1 || a.shape(0) != size)
    refuse(name, "has shape " + shape_text(a), "[" + std::to_string(size) + "]");
  return {static_cast<const char*>(a.data()), 1, size, 0, a.strides(0)};
}

void* output(py::array& a, const char* name, std::int64_t rows, std::int64_t columns) {
  view(a, name, rows, columns);
  if (!(a.flags() & py::array::c_style)) refuse(name, "is strided", "a contiguous output");
  if (!a.writeable()) refuse(name, "is read-only", "a writeable output");
  return a.mutable_data();
}

void bind_rms_norm(const py::array& x, const py::array& weight, py::array& y, double eps) {
  const Kind kind = float_kind(x, "x"), weight_kind = float_kind(weight, "weight");
  if (weight_kind != kind && weight_kind != Kind::f32) refuse("weight", "is bfloat16 and x float32", "float32");
  same_kind(y, "y", kind);
  const Matrix rows = view(x, "x", kAny, kAny), w = view_vector(weight, "weight", rows.columns);
  void* const out = output(y, "y", rows.rows, rows.columns);
  const float e = static_cast<float>(eps);
  py::gil_scoped_release release;
  if (kind == Kind::f32)
    rms_norm<float, float>(rows, w, static_cast<float*>(out), e);
  else if (weight_kind == Kind::f32)
    rms_norm<bf16, float>(rows, w, static_cast<bf16*>(out), e);
  else
    rms_norm<bf16, bf16>(rows, w, static_cast<bf16*>(out), e);
}

void bind_topk(const py::array& scores, const py::array& length, std::int64_t k, py::array& indices) {
  const Kind kind = float_kind(scores, "scores");
  same_kind(length, "length", Kind::i32);
  same_kind(indices, "indices", Kind::i32);
  if (k < 0) refuse("k", "is " + std::to_string(k), "at least 0");
  const Matrix rows = view(scores, "scores", kAny, kAny), valid = view_vector(length, "length", rows.rows);
  if (rows.columns > std::numeric_limits<std::int32_t>::max())
    refuse("scores", "has " + std::to_string(rows.columns) + " columns", "positions that fit int32");
  for (std::int64_t t = 0; t < rows.rows; ++t)
    if (const std::int32_t n = valid.at<std::int32_t>(0, t); n < 0 || n > rows.columns)
      refuse("length", "has " + std::to_string(n) + " at " + std::to_string(t),
             "0 to " + std::to_string(rows.columns));
  auto* const out = static_cast<std::int32_t*>(output(indices, "indices", rows.rows, k));
  py::gil_scoped_release release;
  kind == Kind::f32 ? topk<float>(rows, valid, k, out) : topk<bf16>(rows, valid, k, out);
}

std::unique_ptr<PackedExperts> make_packed(std::int64_t experts, std::int64_t rows, std::int64_t columns,
                                           const py::object& dtype, bool gated) {
  const py::dtype wanted = py::dtype::from_args(dtype);
  const Kind kind = kind_of(wanted);
  if (kind != Kind::f32 && kind != Kind::b16)
    refuse("dtype", "is " + py::str(wanted).cast<std::string>(), "native float32 or bfloat16");
  if (experts < 1 || rows < 1 || columns < 1 || (gated && rows % 2))
    throw py::value_error("shape is [" + std::to_string(experts) + ", " + std::to_string(rows) + ", " +
                          std::to_string(columns) + "], expected every size at least 1" +
                          (gated ? " and as many gate as up rows." : "."));
  return std::make_unique<PackedExperts>(experts, rows, columns, kind == Kind::b16, gated);
}

void check_expert(const PackedExperts& packed, std::int64_t expert) {
  if (expert < 0 || expert >= packed.experts)
    throw py::index_error("expert is " + std::to_string(expert) + ", expected 0 to " +
                          std::to_string(packed.experts - 1) + ".");
}

void set_expert(PackedExperts& packed, std::int64_t expert, const py::array& logical) {
  check_expert(packed, expert);
  same_kind(logical, "logical", packed.is_bf16 ? Kind::b16 : Kind::f32);
  const Matrix matrix = view(logical, "logical", packed.rows, packed.columns);
  py::gil_scoped_release release;
  packed.set(expert, matrix);
}

void get_expert(const PackedExperts& packed, std::int64_t expert, py::array& logical) {
  check_expert(packed, expert);
  same_kind(logical, "logical", packed.is_bf16 ? Kind::b16 : Kind::f32);
  void* const out = output(logical, "logical", packed.rows, packed.columns);
  py::gil_scoped_release release;
  packed.get(expert, out);
}

void bind_moe_experts(const py::array& x, const py::array& ids, const py::array& weights, const PackedExperts& w13,
                      const PackedExperts& w2, std::int64_t first_expert, py::array& y) {
  const Kind kind = float_kind(x, "x"), stored = w13.is_bf16 ? Kind::b16 : Kind::f32;
  if (kind != stored || w13.is_bf16 != w2.is_bf16) throw py::value_error("x, w13 and w2 differ in dtype.");
  if (!w13.gated || w2.gated) throw py::value_error("w13 must be packed with gated=True and w2 without.");
  if (w13.experts != w2.experts || w13.rows != 2 * w2.columns || w13.columns != w2.rows)
    throw py::value_error("w13 and w2 do not fit together: w13 is [E, 2I, H] and w2 is [E, H, I].");
  if (&w13.kernels != &w2.kernels) throw py::value_error("w13 and w2 were packed for different instruction sets.");
  same_kind(ids, "ids", Kind::i32);
  same_kind(weights, "weights", Kind::f32);
  same_kind(y, "y", kind);
  const Matrix rows = view(x, "x", kAny, w13.columns), chosen = view(ids, "ids", rows.rows, kAny);
  const Matrix mix = view(weights, "weights", rows.rows, chosen.columns);
  void* const out = output(y, "y", rows.rows, rows.columns);
  py::gil_scoped_release release;
  if (kind == Kind::f32)
    moe_experts(rows, chosen, mix, w13, w2, first_expert, static_cast<float*>(out));
  else
    moe_experts(rows, chosen, mix, w13, w2, first_expert, static_cast<bf16*>(out));
}

void set_isa(const std::string& name) {
  std::string known;
  for (const Kernels* k : available_kernels()) {
    if (name == k->isa) return use_kernels(*k);
    known += (known.empty() ? "" : ", ") + std::string(k->isa);
  }
  refuse("isa", "is '" + name + "'", "one of " + known);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels; arrays are NumPy's, outputs are given by the caller, the GIL is released while computing.";
  bfloat16_num = py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16")).num();

  bind_limits(m);
  m.def("num_threads", &num_threads, "Threads that a kernel may use, the caller included.");
  m.def("set_num_threads", &set_num_threads, "count"_a, "Results do not depend on it.");
  m.def("isa", [] { return kernels().isa; }, "Instruction set in use: by default the best this CPU runs.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const Kernels* k : available_kernels()) names.append(k->isa);
        return py::tuple(names);
      },
      "Instruction sets built in that this CPU runs, best last.");
  m.def("set_isa", &set_isa, "name"_a,
        "Last bits of results may change with it; experts packed before keep the one they were packed for.");

  m.def("rms_norm", &bind_rms_norm, "x"_a, "weight"_a, "y"_a, "eps"_a,
        "y[T, H] = x / sqrt(mean(x^2) + eps) * weight. x [T, H] float32 or bfloat16 of any strides; weight [H] of x's\n"
        "dtype or float32; y contiguous, of x's dtype. Computed in float32, rounded once.");
  m.def("topk", &bind_topk, "scores"_a, "length"_a, "k"_a, "indices"_a,
        "indices[T, k] int32 = positions of the min(k, length) greatest of scores[t, :length[t]], descending scores,\n"
        "ties by ascending position; the rest is -1. NaN counts as -inf, -0 as 0.");
  m.def("moe_experts", &bind_moe_experts, "x"_a, "ids"_a, "weights"_a, "w13"_a, "w2"_a, "first_expert"_a, "y"_a,
        "y[t] = sum_j weights[t, j] * w2[e] @ (silu(gate) * up), [gate; up] = w13[e] @ x[t], e = ids[t, j] -\n"
        "first_expert; ids negative or not held here add nothing. x, y [T, H]; ids int32 and weights float32\n"
        "[T, K]. Sums in float32 in a fixed order: a row of y depends on its own inputs only, bit by bit. In bf16\n"
        "silu(gate) * up is rounded, and subnormal products may count as 0.");

  // Local to the module: a second build of it, as the suite's self-test makes, has a type of its own.
  py::class_<PackedExperts>(m, "PackedExperts", py::module_local(),
                            "Expert matrices [experts, rows, columns] in the order in which moe_experts reads them;\n"
                            "gated=True for w13 (gate rows, then up rows). Zero until set.")
      .def(py::init(&make_packed), "experts"_a, "rows"_a, "columns"_a, "dtype"_a, "gated"_a = false)
      .def("set", &set_expert, "expert"_a, "logical"_a, "Packs logical[rows, columns], of any strides.")
      .def("get", &get_expert, "expert"_a, "logical"_a, "Unpacks into logical[rows, columns], bit for bit.")
      .def_property_readonly(
          "shape", [](const PackedExperts& p) { return py::make_tuple(p.experts, p.rows, p.columns); })
      .def_readonly("gated", &PackedExperts::gated)
      .def_property_readonly("nbytes", &PackedExperts::bytes, "Bytes in memory, padding included.");
}

}  // namespace porthal
