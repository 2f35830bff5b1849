// Products with packed weights: one matrix for all rows, one per head, or one per expert of sorted rows.
#include <vector>

#include "bind.hpp"
#include "linear.hpp"
#include "packed.hpp"

namespace porthal {
namespace {

// Rows of the input that one matrix is multiplied with, a row block at most, and where in y the first result begins.
struct Work {
  std::int64_t expert, first, rows, out;
};

// Appends the blocks of `rows` rows from `first` on; results are `stride` elements apart in y.
void append(std::vector<Work>& works, const Packed& w, std::int64_t expert, std::int64_t first, std::int64_t rows,
            std::int64_t out, std::int64_t stride) {
  const std::int64_t parts = ceil_div(rows, w.row_block);
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
    works.push_back({expert, first + begin, end - begin, out + begin * stride});
  }
}

template <class T, class Y>
void multiply(const Packed& w, const ReadyRows& rows, const std::vector<Work>& works, Y* y, std::int64_t stride) {
  const Product<T> product = w.product<T>();
  const auto store = panel_loops(w.isa).of(y).store;
  const std::int64_t items = works.size() * w.panels;
  std::int64_t most = 0;
  for (const Work& work : works) most = std::max(most, work.rows);
  parallel_for(items, panels_at_a_time(items, w.panel_bytes(), most), [&](std::int64_t from, std::int64_t to) {
    thread_local Scratch<float> sums_of_thread;
    float* const sums = sums_of_thread.at_least(most * w.panel * product.together);
    const void* a[kMostRows];
    for (std::int64_t i = from, then; i < to; i = then) {
      const Work& work = works[i / w.panels];
      const std::int64_t p = i % w.panels, count = std::min({to - i, w.panels - p, product.together});
      then = i + count;
      for (std::int64_t m = 0; m < work.rows; ++m) a[m] = rows[work.first + m];
      const auto used = [&](std::int64_t at) { return std::min(w.panel, w.rows - at * w.panel); };
      const void* const following = then < to ? w.at(works[then / w.panels].expert, then % w.panels) : nullptr;
      product.multiply(a, work.rows, w.at(work.expert, p), count, w.depth, used(p + count - 1), following, sums);
      for (std::int64_t j = 0; j < count; ++j)
        store(sums + j * work.rows * w.panel, work.rows, used(p + j), y + work.out + (p + j) * w.panel, stride);
    }
  });
}

// `count` rows of x, the i-th at from(i), their elements `step` bytes apart, to y in its dtype.
template <class From>
void run(const Packed& w, std::int64_t count, std::ptrdiff_t step, From from, const std::vector<Work>& works, Kind kind,
         void* y, std::int64_t stride) {
  thread_local ReadyRows rows_of_caller;
  ReadyRows& rows = rows_of_caller;
  with_float(w.kind, [&](auto tag) {
    using T = decltype(tag);
    rows.make(w.product<T>(), w, count, step, from);
    with_float(kind, [&](auto result) {
      multiply<T>(w, rows, works, static_cast<decltype(result)*>(y), stride);
    });
  });
}

std::vector<Work>& no_works() {
  thread_local std::vector<Work> works;
  works.clear();
  return works;
}

}  // namespace

void linear(const Array& x, const Packed& w, const Array& y) {
  x.has(w.kind);
  y.is_float();
  if (w.experts != 1 || w.gated) throw std::invalid_argument("w must be packed as one matrix, without gated=True.");
  const Matrix rows = x.matrix(kAny, w.columns);
  void* const out = y.output({rows.rows, w.rows});
  std::vector<Work>& works = no_works();
  append(works, w, 0, 0, rows.rows, 0, w.rows);
  run(w, rows.rows, rows.column_stride, [&](std::int64_t i) { return rows.data + i * rows.row_stride; }, works, y.kind, out,
      w.rows);
}

namespace {

}  // namespace

void head_linear(const Array& x, const Packed& w, const Array& y) {
  x.has(w.kind);
  y.has(x.kind);
  if (w.gated) throw std::invalid_argument("w must be packed without gated=True.");
  x.is_shape({kAny, w.experts, w.columns});
  const std::int64_t tokens = x.shape[0], heads = w.experts;
  void* const out = y.output({tokens, heads, w.rows});
  std::vector<Work>& works = no_works();
  for (std::int64_t n = 0; n < heads; ++n) append(works, w, n, n * tokens, tokens, n * w.rows, heads * w.rows);
  const auto from = [&](std::int64_t i) { return x.data + i % tokens * x.strides[0] + i / tokens * x.strides[1]; };
  run(w, tokens * heads, x.strides[2], from, works, y.kind, out, heads * w.rows);
}

namespace {

void grouped_gemm(const Array& x, const Packed& w, const Array& counts, const Array& y) {
  x.has(w.kind);
  y.has(x.kind);
  counts.has(Kind::i32);
  if (w.gated) throw std::invalid_argument("w must be packed without gated=True.");
  counts.is_shape({w.experts});
  const Matrix rows = x.matrix(kAny, w.columns);
  void* const out = y.output({rows.rows, w.rows});
  std::vector<Work>& works = no_works();
  std::int64_t first = 0;
  for (std::int64_t e = 0; e < w.experts; ++e) {
    const std::int64_t count = counts.at<std::int32_t>(e);
    if (count < 0 || count > rows.rows - first)
      refuse("counts", "has " + std::to_string(count) + " at " + std::to_string(e),
             "0 to " + std::to_string(rows.rows - first) + ", the rows that are left");
    append(works, w, e, first, count, first * w.rows, w.rows);
    first += count;
  }
  run(w, first, rows.column_stride, [&](std::int64_t i) { return rows.data + i * rows.row_stride; }, works, y.kind, out,
      w.rows);
}

}  // namespace

PORTHAL_OP(linear, "x w y",
           "y[T, N] = x[T, K] w^T, w packed [1, N, K]; y contiguous, of any float dtype. Summed in float32, in an order that\n"
           "only K decides, and rounded once: a row of y depends on its own x only, bit by bit. In bfloat16 subnormal\n"
           "products may count as 0.")
PORTHAL_OP(head_linear, "x w y", "y[T, N, M] = w[n] x[t, n], w packed [N, M, K]; summed and rounded as in linear.")
PORTHAL_OP(grouped_gemm, "x w counts y",
           "y[M, N]: the next counts[e] rows of x[M, K] times w[e], w packed [E, N, K]; summed and rounded as in linear. Rows\n"
           "behind them are not written.")

}  // namespace porthal
