// Elements of rows, each by itself: a sum, silu(gate) * up, another dtype. In float32, rounded once.
#include "isa.hpp"

namespace porthal {

template <class T>
struct ElementLoops {  // n elements
  void (*add)(const T* a, const T* b, T* y, std::int64_t n);
  void (*silu_mul)(const T* gate, const T* up, T* y, std::int64_t n);
  void (*to_f32)(const T* x, float* y, std::int64_t n);
  void (*to_b16)(const T* x, bf16* y, std::int64_t n);
  void (*to_f16)(const T* x, fp16* y, std::int64_t n);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

// y[i] = f(a[i], b[i]).
template <class T, class Out, class Function>
inline void each(const T* a, const T* b, Out* y, std::int64_t n, Function f) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i), load(b + i)));
  if (i < n) store_some(y + i, f(load_some(a + i, n - i), load_some(b + i, n - i)), n - i);
}

template <class T>
void add(const T* a, const T* b, T* y, std::int64_t n) {
  each(a, b, y, n, [](F u, F v) { return u + v; });
}

template <class T>
void silu_mul(const T* gate, const T* up, T* y, std::int64_t n) {
  each(gate, up, y, n, [](F g, F u) { return g * sigmoid(g) * u; });
}

template <class T, class Out>
void to(const T* x, Out* y, std::int64_t n) {
  each(x, x, y, n, [](F u, F) { return u; });
}

template <class T>
constexpr ElementLoops<T> loops() {
  return {add<T>, silu_mul<T>, to<T, float>, to<T, bf16>, to<T, fp16>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<ElementLoops>, element_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include "bind.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<ElementLoops>, element_loops)

namespace {

void add(const Array& a, const Array& b, const Array& y) {
  a.is_float();
  b.has(a.kind);
  y.has(a.kind);
  const Matrix left = a.matrix(), right = b.matrix(left.rows, left.columns);
  void* const out = y.output({left.rows, left.columns});
  with_float(a.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = element_loops(isa()).of(&tag);
    parallel_for(left.rows, rows_per_chunk(left.columns * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy, other;
      for (std::int64_t t = begin; t < end; ++t)
        loops.add(left.dense_row<T>(t, copy), right.dense_row<T>(t, other), static_cast<T*>(out) + t * left.columns,
                  left.columns);
    });
  });
}

void silu_mul(const Array& x, const Array& y) {
  x.is_float();
  y.has(x.kind);
  const Matrix rows = x.matrix();
  const std::int64_t half = rows.columns / 2;
  if (rows.columns % 2) refuse("x", "has " + std::to_string(rows.columns) + " columns", "as many gates as ups");
  void* const out = y.output({rows.rows, half});
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = element_loops(isa()).of(&tag);
    parallel_for(rows.rows, rows_per_chunk(rows.columns * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy;
      for (std::int64_t t = begin; t < end; ++t) {
        const T* const row = rows.dense_row<T>(t, copy);
        loops.silu_mul(row, row + half, static_cast<T*>(out) + t * half, half);
      }
    });
  });
}

void cast(const Array& x, const Array& y) {
  x.is_float();
  y.is_float();
  const Matrix rows = x.matrix();
  void* const out = y.output({rows.rows, rows.columns});
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = element_loops(isa()).of(&tag);
    parallel_for(rows.rows, rows_per_chunk(rows.columns * 4), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy;
      for (std::int64_t t = begin; t < end; ++t) {
        const T* const row = rows.dense_row<T>(t, copy);
        const std::int64_t n = rows.columns;
        if (y.kind == Kind::f32)
          loops.to_f32(row, static_cast<float*>(out) + t * n, n);
        else if (y.kind == Kind::b16)
          loops.to_b16(row, static_cast<bf16*>(out) + t * n, n);
        else
          loops.to_f16(row, static_cast<fp16*>(out) + t * n, n);
      }
    });
  });
}

}  // namespace

PORTHAL_OP(add, "a b y", "y[T, H] = a + b. a and b float32, bfloat16 or float16 of any strides; y contiguous, of their dtype.")
PORTHAL_OP(silu_mul, "x y",
           "y[T, I] = silu(x[:, :I]) * x[:, I:], silu(g) = g / (1 + exp(-g)). x [T, 2I] float32, bfloat16 or float16 of any\n"
           "strides; y contiguous, of x's dtype.")
PORTHAL_OP(cast, "x y",
           "y[T, H] = x in y's dtype, rounded to nearest even; x and y float32, bfloat16 or float16, x of any strides.")

}  // namespace porthal
#endif
