// y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias; in fp32, the variance that of the centred values.
#include "isa.hpp"

namespace porthal {

template <class T>
struct LayerLoops {  // one row of n, by whether weight is float32 instead of a T, and whether bias is
  void (*row[2][2])(const T* x, const void* weight, const void* bias, T* y, std::int64_t n, float eps);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

// The sum of f(x) over a row; elements behind its end count as nothing.
template <class T, class Function>
inline float sum(const T* x, std::int64_t n, Function f) {
  F sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) sums[j] += f(load(x + i + j * kLanes));
  for (; i + kLanes <= n; i += kLanes) sums[0] += f(load(x + i));
  if (i < n) {
    float lane[kLanes];
    store(lane, f(load_some(x + i, n - i)));
    sums[1] += load_some(lane, n - i);
  }
  return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, class W, class B>
void row(const T* x, const void* weights, const void* biases, T* y, std::int64_t n, float eps) {
  const W* const weight = static_cast<const W*>(weights);
  const B* const bias = static_cast<const B*>(biases);
  const float count = static_cast<float>(n), mean = sum(x, n, [](F v) { return v; }) / count;
  const float variance = sum(x, n, [=](F v) { return (v - mean) * (v - mean); }) / count;
  const float scale = 1.0f / __builtin_sqrtf(variance + eps);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, (load(x + i) - mean) * scale * load(weight + i) + load(bias + i));
  if (i < n) {
    const F normed = (load_some(x + i, n - i) - mean) * scale;
    store_some(y + i, normed * load_some(weight + i, n - i) + load_some(bias + i, n - i), n - i);
  }
}

template <class T>
constexpr LayerLoops<T> loops() {
  return {{{row<T, T, T>, row<T, T, float>}, {row<T, float, T>, row<T, float, float>}}};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<LayerLoops>, layer_norm_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include "bind.hpp"
#include "layer_norm.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<LayerLoops>, layer_norm_loops)

namespace {

}  // namespace

void layer_norm(const Array& x, const Array& weight, const Array& bias, const Array& y, double eps) {
  x.is_float();
  y.has(x.kind);
  if (weight.kind != x.kind) weight.has(Kind::f32);
  if (bias.kind != x.kind) bias.has(Kind::f32);
  const Matrix rows = x.matrix();
  void* const out = y.output({rows.rows, rows.columns});
  const Matrix weights = weight.vector(rows.columns), biases = bias.vector(rows.columns);
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto row = layer_norm_loops(isa()).of(&tag).row[weight.kind == Kind::f32][bias.kind == Kind::f32];
    thread_local std::vector<T> weight_space, bias_space;
    thread_local std::vector<float> weight_f32, bias_f32;
    const auto dense = [](const Array& a, const Matrix& m, std::vector<T>& same, std::vector<float>& wide) -> const void* {
      return a.kind == Kind::f32 ? static_cast<const void*>(m.dense_row<float>(0, wide)) : m.dense_row<T>(0, same);
    };
    const void *const w = dense(weight, weights, weight_space, weight_f32);
    const void *const b = dense(bias, biases, bias_space, bias_f32);
    parallel_for(rows.rows, rows_per_chunk(rows.columns * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy;
      for (std::int64_t t = begin; t < end; ++t)
        row(rows.dense_row<T>(t, copy), w, b, static_cast<T*>(out) + t * rows.columns, rows.columns,
                  static_cast<float>(eps));
    });
  });
}

PORTHAL_OP(layer_norm, "x weight bias y eps",
           "y[T, H] = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. x [T, H] float32, bfloat16 or float16 of any\n"
           "strides; weight and bias [H] of x's dtype or float32; y contiguous, of x's dtype.")

}  // namespace porthal
#endif
