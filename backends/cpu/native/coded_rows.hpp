// Rows of codes as caches and activations have them, a byte for each, with scales beside them.
#pragma once

#include "isa.hpp"

namespace porthal {

template <class T>
struct RowCodes {
  // The codes and scales of n elements, `step` bytes apart, in groups that share a scale.
  void (*encode)(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t group, void* codes, float* scales);
  // What they say, rounded once.
  void (*decode)(const void* codes, const float* scales, std::int64_t n, std::int64_t group, T* y);
};

template <class T>
struct RowLoops {
  RowCodes<T> int8, e4m3;
};

}  // namespace porthal

#if !defined(PORTHAL_ISA)
#include "packed.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<RowLoops>, row_loops)

template <class T>
const RowCodes<T>& row_codes(Kind codes) {
  const RowLoops<T>& loops = row_loops(isa()).of(static_cast<const T*>(nullptr));
  return codes == Kind::i8 ? loops.int8 : loops.e4m3;
}

// Codes and scales of the same rows; the group that shares a scale.
inline std::int64_t group_of(const Array& codes, const Array& scale, std::int64_t group) {
  codes.is_one_of({Kind::i8, Kind::u8}, "native int8, or uint8 of e4m3");
  scale.has(Kind::f32);
  const Matrix rows = codes.matrix();
  const std::int64_t size = group ? group : std::max<std::int64_t>(rows.columns, 1);
  if (group < 0) refuse("group", "is " + std::to_string(group), "at least 0");
  scale.is_shape({rows.rows, group ? ceil_div(rows.columns, size) : 1});
  return size;
}

}  // namespace porthal
#endif
