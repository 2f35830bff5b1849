// An array as NumPy has it: where it lies, its shape and strides; nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.hpp"

namespace porthal {

enum class Kind : std::uint8_t { f32, b16, f16, i32, i64, boolean, other, i8, u8 };

constexpr std::int64_t kAny = -1;
constexpr int kDims = 5;

// A strided matrix: strides in bytes, any sign, possibly zero.
struct Matrix {
  const char* data;
  std::int64_t rows, columns;
  std::ptrdiff_t row_stride, column_stride;

  template <class T>
  const T* row(std::int64_t i) const {
    return reinterpret_cast<const T*>(data + i * row_stride);
  }
  template <class T>
  const T& at(std::int64_t i, std::int64_t j) const {
    return *reinterpret_cast<const T*>(data + i * row_stride + j * column_stride);
  }
  template <class T>
  bool packed() const {
    return column_stride == static_cast<std::ptrdiff_t>(sizeof(T)) || columns <= 1;
  }
  // Row i with unit stride: in place if it has one, else copied into `space`.
  template <class T>
  const T* dense_row(std::int64_t i, std::vector<T>& space) const {
    if (packed<T>()) return row<T>(i);
    space.resize(columns);
    for (std::int64_t j = 0; j < columns; ++j) space[j] = at<T>(i, j);
    return space.data();
  }
};

// "name got, expected expected." as a ValueError.
[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& expected);

struct Array {
  char* data;
  const char* name;
  void* object;  // NumPy's, for words about its dtype
  std::int64_t shape[kDims];
  std::ptrdiff_t strides[kDims];  // in bytes
  int dims;
  Kind kind;
  bool contiguous, writable;

  // Refuse what is not so; the first three say it of the dtype.
  void has(Kind wanted) const;
  void is_float() const;
  void is_one_of(std::initializer_list<Kind> kinds, const char* words) const;
  void is_shape(std::initializer_list<std::int64_t> wanted) const;

  Matrix matrix(std::int64_t rows = kAny, std::int64_t columns = kAny) const;
  Matrix vector(std::int64_t size = kAny) const;  // a matrix of one row
  // Where a contiguous result of this shape is written.
  void* output(std::initializer_list<std::int64_t> wanted) const;

  // Matrix i of an array of three dims, its rows `stride` bytes apart: in place if they have unit stride, else copied.
  template <class T>
  const T* dense_matrix(std::int64_t i, std::vector<T>& space, std::ptrdiff_t& stride) const {
    const Matrix matrix{data + i * strides[0], shape[1], shape[2], strides[1], strides[2]};
    stride = matrix.row_stride;
    if (matrix.packed<T>()) return matrix.row<T>(0);
    space.resize(matrix.rows * matrix.columns);
    for (std::int64_t r = 0; r < matrix.rows; ++r)
      for (std::int64_t c = 0; c < matrix.columns; ++c) space[r * matrix.columns + c] = matrix.at<T>(r, c);
    stride = matrix.columns * sizeof(T);
    return space.data();
  }

  template <class T>
  const T& at(std::int64_t i) const {
    return *reinterpret_cast<const T*>(data + i * strides[0]);
  }
};

// f(T{}) for the C++ type of a kind that is_float.
template <class F>
void with_float(Kind kind, F&& f) {
  if (kind == Kind::f32)
    f(float{});
  else if (kind == Kind::b16)
    f(bf16{});
  else
    f(fp16{});
}

}  // namespace porthal
