// y = x / sqrt(mean(x^2) + eps) * weight, of x or of x + residual; statistics and products in fp32, one rounding.
#include "isa.hpp"

namespace porthal {

template <class T>
struct NormLoops {  // one row of n; with a residual, which may be null, r = x + residual is written and normalised
  void (*same)(const T* x, const T* residual, const T* weight, T* r, T* y, std::int64_t n, float eps);
  void (*f32_weight)(const T* x, const T* residual, const float* weight, T* r, T* y, std::int64_t n, float eps);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

template <class T, class W>
void norm(const T* x, const T* residual, const W* weight, T* r, T* y, std::int64_t n, float eps) {
  F squares[4] = {};
  std::int64_t i = 0;
  if (residual) {
    for (; i + kLanes <= n; i += kLanes) {
      const F v = load(x + i) + load(residual + i);
      store(r + i, v);
      squares[i / kLanes % 4] += v * v;
    }
    if (i < n) {
      const F v = load_some(x + i, n - i) + load_some(residual + i, n - i);
      store_some(r + i, v, n - i);
      squares[0] += v * v;
    }
    x = r;
  } else {
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) {
        const F v = load(x + i + j * kLanes);
        squares[j] += v * v;
      }
    for (; i + kLanes <= n; i += kLanes) squares[0] += load(x + i) * load(x + i);
    if (i < n) {
      const F v = load_some(x + i, n - i);
      squares[0] += v * v;
    }
  }
  const float mean = total((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_some(y + i, load_some(x + i, n - i) * scale * load_some(weight + i, n - i), n - i);
}

template <class T>
constexpr NormLoops<T> loops() {
  return {norm<T, T>, norm<T, float>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<NormLoops>, rms_norm_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include <algorithm>

#include "bind.hpp"
#include "rms_norm.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<NormLoops>, rms_norm_loops)

namespace {

template <class X, class W>
void run(const Matrix& x, const Matrix* residual, const Matrix& weight, X* r, X* y, float eps) {
  thread_local std::vector<W> space;
  const W* const w = weight.dense_row<W>(0, space);
  const NormLoops<X>& loops = rms_norm_loops(isa()).of(y);
  parallel_for(x.rows, rows_per_chunk(x.columns * sizeof(X)), [&](std::int64_t begin, std::int64_t end) {
    thread_local std::vector<X> copy, other;
    for (std::int64_t t = begin; t < end; ++t) {
      const X* const row = x.dense_row<X>(t, copy);
      const X* const added = residual ? residual->dense_row<X>(t, other) : nullptr;
      X *const sum = r + t * x.columns, *const out = y + t * x.columns;
      if constexpr (std::is_same_v<X, W>)
        loops.same(row, added, w, sum, out, x.columns, eps);
      else
        loops.f32_weight(row, added, w, sum, out, x.columns, eps);
    }
  });
}

void norm(const Array& x, const Array* residual, const Array& weight, const Array* r, const Array& y, double eps) {
  x.is_float();
  y.has(x.kind);
  if (weight.kind != x.kind) weight.has(Kind::f32);
  const Matrix rows = x.matrix(), w = weight.vector(rows.columns);
  void *const out = y.output({rows.rows, rows.columns}), *sum = out;
  Matrix added{};
  if (residual) {
    residual->has(x.kind);
    r->has(x.kind);
    added = residual->matrix(rows.rows, rows.columns);
    sum = r->output({rows.rows, rows.columns});
  }
  const Matrix* const other = residual ? &added : nullptr;
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    if (weight.kind == x.kind)
      run<T, T>(rows, other, w, static_cast<T*>(sum), static_cast<T*>(out), static_cast<float>(eps));
    else
      run<T, float>(rows, other, w, static_cast<T*>(sum), static_cast<T*>(out), static_cast<float>(eps));
  });
}

}  // namespace

void rms_norm(const Array& x, const Array& weight, const Array& y, double eps) { norm(x, nullptr, weight, nullptr, y, eps); }

namespace {

void add_rms_norm(const Array& x, const Array& residual, const Array& weight, const Array& y, const Array& r, double eps) {
  norm(x, &residual, weight, &r, y, eps);
}

}  // namespace

PORTHAL_OP(rms_norm, "x weight y eps",
           "y[T, H] = x / sqrt(mean(x^2) + eps) * weight. x [T, H] float32, bfloat16 or float16 of any strides; weight [H] of\n"
           "x's dtype or float32; y contiguous, of x's dtype. Computed in float32, rounded once.")

PORTHAL_OP(add_rms_norm, "x residual weight y r eps",
           "r[T, H] = x + residual, rounded; y = rms_norm(r, weight, eps). Dtypes as of rms_norm, residual and r x's.")

}  // namespace porthal
#endif
