// y = x / sqrt(mean(x^2) + eps) * weight; statistics and products in fp32, one rounding.
#include "isa.hpp"

namespace porthal {

template <class T>
struct NormLoops {  // one row of n
  void (*same)(const T* x, const T* weight, T* y, std::int64_t n, float eps);
  void (*f32_weight)(const T* x, const float* weight, T* y, std::int64_t n, float eps);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

template <class T, class W>
void rms_norm(const T* x, const W* weight, T* y, std::int64_t n, float eps) {
  F squares[4] = {};
  std::int64_t i = 0;
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
  const float mean = total((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_some(y + i, load_some(x + i, n - i) * scale * load_some(weight + i, n - i), n - i);
}

template <class T>
constexpr NormLoops<T> loops() {
  return {rms_norm<T, T>, rms_norm<T, float>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<NormLoops>, rms_norm_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include <algorithm>

#include "bind.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<NormLoops>, rms_norm_loops)

namespace {

template <class X, class W>
void run(const Matrix& x, const Matrix& weight, X* y, float eps) {
  std::vector<W> space;
  const W* const w = weight.dense_row<W>(0, space);
  const NormLoops<X>& loops = rms_norm_loops(isa()).of(y);
  // Below about 64 KB a chunk is done before another thread has woken up.
  const std::int64_t chunk = std::max<std::int64_t>(1, 65536 / (x.columns * sizeof(X) + 1));
  parallel_for(x.rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    std::vector<X> copy;
    for (std::int64_t t = begin; t < end; ++t) {
      const X* const row = x.dense_row<X>(t, copy);
      if constexpr (std::is_same_v<X, W>)
        loops.same(row, w, y + t * x.columns, x.columns, eps);
      else
        loops.f32_weight(row, w, y + t * x.columns, x.columns, eps);
    }
  });
}

void rms_norm(const Array& x, const Array& weight, const Array& y, double eps) {
  x.is_float();
  y.has(x.kind);
  if (weight.kind != x.kind) weight.has(Kind::f32);
  const Matrix rows = x.matrix(), w = weight.vector(rows.columns);
  void* const out = y.output({rows.rows, rows.columns});
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    if (weight.kind == x.kind)
      run<T, T>(rows, w, static_cast<T*>(out), static_cast<float>(eps));
    else
      run<T, float>(rows, w, static_cast<T*>(out), static_cast<float>(eps));
  });
}

}  // namespace

PORTHAL_OP(rms_norm, "x weight y eps",
           "y[T, H] = x / sqrt(mean(x^2) + eps) * weight. x [T, H] float32, bfloat16 or float16 of any strides; weight [H] of\n"
           "x's dtype or float32; y contiguous, of x's dtype. Computed in float32, rounded once.")

}  // namespace porthal
#endif
