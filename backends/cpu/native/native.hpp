// What module.cpp binds: the operators on raw views, arguments already checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.hpp"

namespace porthal {

// A strided matrix as NumPy has it: strides in bytes, any sign, possibly zero.
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

// The kernels in use (the best this CPU runs unless chosen otherwise), and all that it runs, best last.
const Kernels& kernels();
std::vector<const Kernels*> available_kernels();
void use_kernels(const Kernels& chosen);

// X: float or bf16; W: X or float. weight is one row.
template <class X, class W>
void rms_norm(const Matrix& x, const Matrix& weight, X* y, float eps);

template <class T>
void topk(const Matrix& scores, const Matrix& length, std::int64_t k, std::int32_t* indices);

// Expert matrices [experts, rows, columns] in the order in which the kernels read them. Per expert and panel of output
// columns (rows of the logical matrix): [depth / group][panel][group], group = 2 for bf16, padded with zeros. If gated,
// a panel holds half as many gate rows (the first half of the matrix) and then their up rows.
class PackedExperts {
 public:
  PackedExperts(std::int64_t experts, std::int64_t rows, std::int64_t columns, bool is_bf16, bool gated);

  void set(std::int64_t expert, const Matrix& logical);
  void get(std::int64_t expert, void* logical) const;

  const char* panel(std::int64_t expert, std::int64_t i) const {
    return memory_.get() + (expert * panels + i) * panel_bytes;
  }

  const std::int64_t experts, rows, columns;
  const bool is_bf16, gated;
  const Kernels& kernels;
  const std::int64_t item, panels, panel_bytes;
  std::int64_t bytes() const { return experts * panels * panel_bytes; }

 private:
  template <class Visit>
  void each_run(std::int64_t expert, Visit visit) const;

  struct Unmap {
    std::size_t bytes;
    void operator()(char* memory) const;
  };
  std::unique_ptr<char, Unmap> memory_;
};

template <class T>
void moe_experts(const Matrix& x, const Matrix& ids, const Matrix& weights, const PackedExperts& w13,
                 const PackedExperts& w2, std::int64_t first_expert, T* y);

}  // namespace porthal
