// Panels: some output columns of a packed weight matrix, in the order in which a product reads them.
#pragma once

#include "isa.hpp"

namespace porthal {

// Depth elements that lie together in a panel: bf16 in pairs, as vdpbf16ps wants them.
template <class T>
constexpr std::int64_t kGroup = 1;
template <>
inline constexpr std::int64_t kGroup<bf16> = 2;

// A float32 that is a bfloat16: its upper half, of which the lower is zero.
struct Upper {
  bf16 half;
};

constexpr std::int64_t kMostRows = 512;  // of a row block, in any instruction set

// A panel is two halves, one behind the other, each [depth / group][columns / 2][group].
template <class T>
struct PanelLoops {
  // sums[panels][count][panel] = rows[count][depth] . panel, of the last's second half only where `used` columns reach into
  // it. Rows are equally far apart. Each sum runs over depth in one fixed order, whatever count is. `following` is the panel
  // that this thread reads next, or null.
  using Multiply = void(const void* const* rows, std::int64_t count, const void* panel, std::int64_t panels,
                        std::int64_t depth, std::int64_t used, const void* following, float* sums);

  std::int64_t columns;
  std::int64_t item;  // bytes of an element of a ready row: T where the CPU multiplies T, else float
  std::int64_t row_block;  // rows that pass over a panel together, at most kMostRows
  std::int64_t together;   // panels that they pass over in one call, at most
  // A row as multiply reads it: n elements of x, `step` bytes apart, and zeros up to depth.
  void (*ready)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row);
  Multiply* multiply;
  // y[count][used] = sums, rounded; rows of y are `stride` elements apart.
  void (*store)(const float* sums, std::int64_t count, std::int64_t used, T* y, std::int64_t stride);
  // n depth elements of every row of a half, from its beginning or a multiple of the group on; whether the half holds them.
  using Pack = bool(const T* const* rows, std::int64_t n, void* half);
  Pack* pack;
  // The same with panels of Upper, for float; sums have the same bits.
  Multiply* multiply_upper;
  Pack* pack_upper;
};

#if defined(PORTHAL_ISA)
// What ready rows are made of.
template <class T>
struct RowOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct RowOf<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Row = typename RowOf<T>::type;
#else
PORTHAL_TABLES_WITH_TILES(PerFloat<PanelLoops>, panel_loops)
#endif

}  // namespace porthal
