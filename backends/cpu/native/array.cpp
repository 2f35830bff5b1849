#include "array.hpp"

#include "bind.hpp"

namespace porthal {
namespace {

const char* const kNames[] = {"float32", "bfloat16", "float16", "int32", "int64", "bool", "another dtype", "int8", "uint8"};

std::string shape_text(const std::int64_t* shape, std::size_t dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims; ++i) text += (i ? ", " : "") + (shape[i] == kAny ? "any" : std::to_string(shape[i]));
  return text + "]";
}

}  // namespace

void refuse(const std::string& name, const std::string& got, const std::string& expected) {
  throw std::invalid_argument(name + " " + got + ", expected " + expected + ".");
}

void Array::is_one_of(std::initializer_list<Kind> kinds, const char* words) const {
  for (const Kind k : kinds)
    if (k == kind) return;
  throw WrongDtype{this->name, this->object, words};
}

void Array::has(Kind wanted) const {
  if (kind != wanted) throw WrongDtype{name, object, std::string("native ") + kNames[static_cast<int>(wanted)]};
}

void Array::is_float() const { is_one_of({Kind::f32, Kind::b16, Kind::f16}, "native float32, bfloat16 or float16"); }

void Array::is_shape(std::initializer_list<std::int64_t> wanted) const {
  bool same = static_cast<std::size_t>(dims) == wanted.size();
  for (int i = 0; same && i < dims; ++i) same = wanted.begin()[i] == kAny || wanted.begin()[i] == shape[i];
  if (!same) refuse(name, "has shape " + shape_text(shape, dims), shape_text(wanted.begin(), wanted.size()));
}

Matrix Array::matrix(std::int64_t rows, std::int64_t columns) const {
  is_shape({rows, columns});
  return {data, shape[0], shape[1], strides[0], strides[1]};
}

Matrix Array::vector(std::int64_t size) const {
  is_shape({size});
  return {data, 1, shape[0], 0, strides[0]};
}

void* Array::output(std::initializer_list<std::int64_t> wanted) const {
  is_shape(wanted);
  if (!contiguous) refuse(name, "is strided", "a contiguous output");
  if (!writable) refuse(name, "is read-only", "a writeable output");
  return data;
}

}  // namespace porthal
