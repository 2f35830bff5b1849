// Weight matrices in the order in which kernels read them, in huge pages, and rows to multiply them with.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "array.hpp"
#include "coded.hpp"
#include "threads.hpp"

namespace porthal {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How rows of T are multiplied with a packed matrix.
template <class T>
struct Product {
  void (*ready)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row);
  void (*ready_float)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row);  // under a scheme
  typename PanelLoops<T>::Multiply* multiply;
  std::int64_t row_bytes;  // of a ready row
  std::int64_t together;   // panels at most in a call of multiply
};

// Matrices [experts, rows, columns]; per expert panels of output columns (rows of the logical matrix), padded with zeros.
// If gated, the first half of a panel holds gate rows (the first half of the matrix) and the second their up rows. Matrices of
// float32 are kept in half of the bytes for as long as all their numbers are bfloat16; under a scheme codes and scales are,
// and kind is that of the rows which the matrices are multiplied with.
class Packed {
 public:
  Packed(std::int64_t experts, std::int64_t rows, std::int64_t columns, Kind kind, bool gated, Coding coding = Coding::none);

  void set(std::int64_t expert, const Matrix& logical);
  void get(std::int64_t expert, void* logical) const;
  // The same of codes and scales in their logical form.
  void set(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole);
  void get(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole) const;

  const char* at(std::int64_t expert, std::int64_t i) const {
    return memory_.get() + (expert * panels + i) * panel_bytes();
  }
  template <class T>
  Product<T> product() const {
    const PanelLoops<T>& loops = panel_loops(isa).of(static_cast<const T*>(nullptr));
    if (coding == Coding::none)
      return {loops.ready, nullptr, upper_ ? loops.multiply_upper : loops.multiply, depth * loops.item, loops.together};
    const CodedLoops<T>& coded = coded_loops(isa).of(static_cast<const T*>(nullptr)).by[static_cast<int>(coding) - 1];
    const std::int64_t scales = groups() + 1;  // one more for what belongs to no group
    return {coded.ready, coded.ready_float, coded.multiply, row_codes(depth, coded.item) + scales * 4, 1};
  }
  std::int64_t panel_bytes() const {
    if (coding == Coding::none) return panel * depth * (upper_ ? 2 : item);
    return panel * (depth / form().unit * 4 + groups() * form().scale + form().of_column * 4);
  }
  std::int64_t bytes() const { return experts * panels * panel_bytes(); }

  const std::int64_t experts, rows, columns;
  const Kind kind;
  const bool gated;
  const Coding coding;
  const Isa isa;
  const std::int64_t panel, row_block, item, depth, panels;

 private:
  const Form& form() const { return form_of(coding); }
  std::int64_t groups() const { return form().group ? ceil_div(columns, form().group) : 1; }
  template <class Visit>
  void each_half(std::int64_t expert, Visit visit) const;
  template <class Visit>
  void each_column(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole, Visit visit) const;
  template <class T>
  bool pack(std::int64_t expert, const Matrix& logical, typename PanelLoops<T>::Pack* pack);
  void widen();

  struct Unmap {
    std::size_t bytes;
    void operator()(char* memory) const;
  };
  bool upper_;  // a panel is one of Upper
  std::unique_ptr<char, Unmap> memory_;  // room for all of float32, of which what is not written takes no memory
};

// Memory for std::free, in whole cache lines, and in huge pages where it fills half of one: rows are read side by side, which
// would need an address of a page for each of them. Throws std::bad_alloc.
void* scratch_memory(std::size_t bytes);

// Memory that grows and stays, without the zeroing of std::vector.
template <class T>
class Scratch {
 public:
  T* at_least(std::int64_t count) {
    if (count > size_) {
      memory_.reset(static_cast<T*>(scratch_memory(count * sizeof(T))));
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
  std::int64_t size_ = 0;
};

// Rows as panels are multiplied with them.
class ReadyRows {
 public:
  // Room for `count` rows of `bytes`, 21 cache lines apart modulo 32: at most other distances the rows of a tile meet in the
  // same cache sets while they advance together (1 line apart costs a third of the speed of 8 rows).
  void make_room(std::int64_t count, std::int64_t bytes) {
    const std::int64_t lines = ceil_div(bytes, 64);
    stride_ = (lines + (21 + 31 * lines) % 32) * 64;
    rows_ = memory_.at_least(count * stride_);
  }
  // `count` rows for weights w: row i begins at from(i), its elements `step` bytes apart.
  template <class T, class From>
  void make(const Product<T>& product, const Packed& w, std::int64_t count, std::ptrdiff_t step, From from) {
    make_room(count, product.row_bytes);
    parallel_for(count, std::max<std::int64_t>(1, 262144 / stride_), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) product.ready(from(i), step, w.columns, w.depth, (*this)[i]);
    });
  }
  char* operator[](std::int64_t i) const { return rows_ + i * stride_; }
  std::int64_t stride() const { return stride_; }

 private:
  Scratch<char> memory_;
  char* rows_ = nullptr;
  std::int64_t stride_ = 0;
};

constexpr std::int64_t kMostColumns = 64;  // of a panel, in any instruction set

// Panels that a thread takes at a time, of `count` of which each is read for `rows` rows: all, where that is done before
// another thread has woken up.
inline std::int64_t panels_at_a_time(std::int64_t count, std::int64_t panel_bytes, std::int64_t rows) {
  if (count * panel_bytes * ceil_div(rows, 8) < (1 << 19)) return count;
  return std::clamp<std::int64_t>(count / (16 * num_threads()), 1, 8);
}

}  // namespace porthal
