// Panels of codes under a scheme: what products with them read, and what they take of the other operand.
//
// A panel is one stream: of each group [group / unit][columns] words of 32 bits, each of which holds the next `unit` codes of a
// column's depth, and then [columns] scales, in float32 or the bytes of the scheme; before all groups, where their scales are
// multiplied with one for the whole column, [columns] of these in float32. No number is kept that the codes say.
#pragma once

#include "panel.hpp"

namespace porthal {

enum class Coding : std::uint8_t { none, int8_channel, fp8_block, int4_g128, int4_g32, mxfp4, nvfp4 };
constexpr int kCodings = 6;  // besides none

struct Form {
  const char* scheme;
  std::int64_t unit;   // codes in a word
  std::int64_t group;  // of depth that shares a scale; 0: all
  std::int64_t high;   // rows of the logical matrix that do
  bool whole_numbers;  // the codes are, else bits of floating point
  std::int64_t scale;  // bytes of one
  bool of_column;      // each is multiplied with one for the whole column
};
constexpr Form kForms[] = {
  {"none", 1, 0, 1, false, 0, false},
  {"int8_channel", 4, 0, 1, true, 4, false},
  {"fp8_block", 4, 128, 128, false, 4, false},
  {"int4_g128", 8, 128, 1, true, 4, false},
  {"int4_g32", 8, 32, 1, true, 4, false},
  {"mxfp4", 8, 32, 1, false, 1, false},
  {"nvfp4", 8, 16, 1, false, 1, true}};
constexpr const Form& form_of(Coding coding) { return kForms[static_cast<int>(coding)]; }

// Where in a word the i-th code stands: of bytes that are multiplied as such in order, else even and odd ones in two halves,
// as pairs of bf16 are taken from them.
constexpr int code_shift(Coding coding, int i) {
  return coding == Coding::int8_channel ? 8 * i : i % 2 * 16 + i / 2 * (coding == Coding::fp8_block ? 8 : 4);
}
constexpr std::int64_t kDeepest = (1 << 17) - 1;  // of whole numbers of 8 bits whose sum 32 bits hold

// Products of rows of T with panels of one scheme, as in PanelLoops. A ready row has what the scheme makes of its numbers,
// codes or themselves, and behind them its scales.
template <class T>
struct CodedLoops {
  std::int64_t item;  // bytes of an element of a ready row
  void (*ready)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row);
  void (*ready_float)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row);  // of float32
  typename PanelLoops<T>::Multiply* multiply;  // of one panel
};

template <class T>
struct Coded {
  CodedLoops<T> by[kCodings];
};

// Bytes of a ready row before its scales.
inline std::int64_t row_codes(std::int64_t depth, std::int64_t item) { return (depth * item + 63) / 64 * 64; }

#if !defined(PORTHAL_ISA)
PORTHAL_TABLES_WITH_TILES(PerFloat<Coded>, coded_loops)
#endif

}  // namespace porthal
