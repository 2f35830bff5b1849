// Weight matrices in the order in which kernels read them, in huge pages.
#pragma once

#include <memory>

#include "array.hpp"
#include "isa.hpp"

namespace porthal {

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Matrices [experts, rows, columns]. Per expert and panel of output columns (rows of the logical matrix):
// [depth / group][panel][group], padded with zeros. If gated, a panel holds half as many gate rows (the first half of the
// matrix) and then their up rows.
class Packed {
 public:
  Packed(std::int64_t experts, std::int64_t rows, std::int64_t columns, bool is_bf16, bool gated);

  void set(std::int64_t expert, const Matrix& logical);
  void get(std::int64_t expert, void* logical) const;

  const char* at(std::int64_t expert, std::int64_t i) const {
    return memory_.get() + (expert * panels + i) * panel_bytes;
  }
  Kind kind() const { return is_bf16 ? Kind::b16 : Kind::f32; }

  const std::int64_t experts, rows, columns;
  const bool is_bf16, gated;
  const Isa isa;
  const std::int64_t panel, item, panels, panel_bytes;
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

// Memory that grows and stays, without the zeroing of std::vector.
template <class T>
class Scratch {
 public:
  T* at_least(std::int64_t count) {
    if (count > size_) {
      memory_.reset(new T[count]);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  std::int64_t size_ = 0;
};

}  // namespace porthal
