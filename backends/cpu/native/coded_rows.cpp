// Rows to codes and back: quantize, dequantize, and writes to a cache that holds codes.
#include "coded_rows.hpp"

#if defined(PORTHAL_ISA)
#include "codes.hpp"

namespace porthal {
namespace {

template <class T, class Code>
void encode(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t group, void* codes, float* scales) {
  for (std::int64_t begin = 0, end; begin < n; begin = end, ++scales) {
    end = n - begin < group ? n : begin + group;
    *scales = scale_of<T, Code>(x, step, begin, end);
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const B bytes = narrow(Code::code_of(coded<Code>(some<T>(x, step, i, end), F{} + *scales)));
      std::memcpy(static_cast<char*>(codes) + i, &bytes, end - i < kLanes ? end - i : kLanes);
    }
  }
}

template <class T, class Code>
void decode(const void* codes, const float* scales, std::int64_t n, std::int64_t group, T* y) {
  for (std::int64_t begin = 0, end; begin < n; begin = end, ++scales) {
    end = n - begin < group ? n : begin + group;
    for (std::int64_t i = begin; i < end; i += kLanes) {
      const std::int64_t some = end - i < kLanes ? end - i : kLanes;
      B bytes{};
      std::memcpy(&bytes, static_cast<const char*>(codes) + i, some);
      const F v = Code::number_of(wide(bytes)) * *scales;
      if (some == kLanes)
        store(y + i, v);
      else
        store_some(y + i, v, some);
    }
  }
}

template <class T>
constexpr RowLoops<T> loops() {
  return {{encode<T, Int8>, decode<T, Int8>}, {encode<T, E4m3>, decode<T, E4m3>}};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<RowLoops>, row_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include "bind.hpp"

namespace porthal {
namespace {

void kv_write_codes(const Array& codes, const Array& scale, const Array& slots, const Array& rows, std::int64_t group) {
  const std::int64_t size = group_of(codes, scale, group);
  rows.is_float();
  slots.has(Kind::i64);
  const Matrix to = codes.matrix(), scales = scale.matrix(), from = rows.matrix(kAny, to.columns), at = slots.vector(from.rows);
  if (!codes.writable || !scale.writable) refuse(codes.name, "is read-only", "a writeable cache");
  if (!to.packed<char>() || !scales.packed<float>()) refuse(codes.name, "has gaps inside a row", "rows of unit stride");
  for (std::int64_t t = 0; t < from.rows; ++t)
    if (const std::int64_t slot = at.at<std::int64_t>(0, t); slot < -1 || slot >= to.rows)
      refuse("slots[" + std::to_string(t) + "]", "is " + std::to_string(slot), "-1 to " + std::to_string(to.rows - 1));
  with_float(rows.kind, [&](auto tag) {
    const auto encode = row_codes<decltype(tag)>(codes.kind).encode;
    parallel_for(from.rows, rows_per_chunk(4 * from.columns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        if (const std::int64_t slot = at.at<std::int64_t>(0, t); slot >= 0)
          encode(from.row<char>(t), from.column_stride, from.columns, size, const_cast<char*>(to.row<char>(slot)),
                 const_cast<float*>(scales.row<float>(slot)));
    });
  });
}

void quantize(const Array& x, const Array& codes, const Array& scale, std::int64_t group) {
  const std::int64_t size = group_of(codes, scale, group);
  x.is_float();
  const Matrix from = x.matrix();
  auto* const to = static_cast<char*>(codes.output({from.rows, from.columns}));
  auto* const scales = static_cast<float*>(scale.output({from.rows, kAny}));
  with_float(x.kind, [&](auto tag) {
    const auto encode = row_codes<decltype(tag)>(codes.kind).encode;
    parallel_for(from.rows, rows_per_chunk(4 * from.columns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        encode(from.row<char>(t), from.column_stride, from.columns, size, to + t * from.columns, scales + t * scale.shape[1]);
    });
  });
}

void dequantize(const Array& codes, const Array& scale, std::int64_t group, const Array& y) {
  const std::int64_t size = group_of(codes, scale, group);
  y.is_float();
  const Matrix from = codes.matrix(), scales = scale.matrix();
  void* const out = y.output({from.rows, from.columns});
  with_float(y.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto decode = row_codes<T>(codes.kind).decode;
    parallel_for(from.rows, rows_per_chunk(4 * from.columns), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<std::uint8_t> copy;
      thread_local std::vector<float> copied;
      for (std::int64_t t = begin; t < end; ++t)
        decode(from.dense_row<std::uint8_t>(t, copy), scales.dense_row<float>(t, copied), from.columns, size,
               static_cast<T*>(out) + t * from.columns);
    });
  });
}

}  // namespace

PORTHAL_OP(kv_write_codes, "codes scale slots rows group",
           "codes[slots[t]], scale[slots[t]] = what quantize gives of rows[t], in place, for slots >= 0; codes and scales\n"
           "with unit stride inside a row.")
PORTHAL_OP(quantize, "x codes scale group",
           "Each `group` elements of a row, 0: all, share a scale: their largest magnitude / 127 in int8, / 448 in e4m3\n"
           "(uint8), 1 where it is 0, NaN where one is not finite. codes = x / scale, half to even, saturating. x float, of\n"
           "any strides.")
PORTHAL_OP(dequantize, "codes scale group y", "y = codes * scale of its group, rounded once to the dtype of y.")

}  // namespace porthal
#endif
