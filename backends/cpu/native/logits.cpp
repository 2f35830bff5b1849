// One pass over rows of logits: their highest, whether they are finite, and the norm of their softmax.
#include "logits.hpp"

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr std::int64_t kBlock = 2048;  // elements that stay in L1 while two passes go over them

inline F greater(F a, F b) { return a > b ? a : b; }  // b where a is NaN

inline float greatest_lane(F v) {
  float lane[kLanes], top = -kInfinity;
  store(lane, v);
  for (int i = 0; i < kLanes; ++i) top = lane[i] > top ? lane[i] : top;
  return top;
}

// The highest of a row, NaN left aside; -inf where there is none.
template <class T>
inline float highest(const T* x, std::int64_t n) {
  F top[4];
  for (int j = 0; j < 4; ++j) top[j] = F{} - kInfinity;
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) top[j] = greater(load(x + i + j * kLanes), top[j]);
  for (; i + kLanes <= n; i += kLanes) top[0] = greater(load(x + i), top[0]);
  float best = greatest_lane(greater(greater(top[0], top[1]), greater(top[2], top[3])));
  for (; i < n; ++i) {
    const float v = load_some(x + i, 1)[0];
    best = v > best ? v : best;
  }
  return best;
}

template <class T>
std::int64_t argmax(const T* x, std::int64_t n) {
  float best = -kInfinity;
  std::int64_t block = 0;
  for (std::int64_t i = 0; i < n; i += kBlock)
    if (const float top = highest(x + i, n - i < kBlock ? n - i : kBlock); top > best) {
      best = top;
      block = i;
    }
  if (best == -kInfinity) return 0;  // all are equal
  for (std::int64_t i = block;; i += kLanes) {
    const std::int64_t some = n - i < kLanes ? n - i : kLanes;
    const I same = (some == kLanes ? load(x + i) : load_some(x + i, some)) == best;
    if (!any(same)) continue;
    for (std::int64_t lane = 0; lane < some; ++lane)
      if (same[lane]) return i + lane;
  }
}

template <class T>
bool finite(const T* x, std::int64_t n) {
  F top = F{} - kInfinity;
  I bad = {};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F v = load(x + i);
    bad |= ~(v < kInfinity);  // NaN and +inf
    top = greater(v, top);
  }
  if (i < n) {
    const F v = load_some(x + i, n - i);  // zeros behind the row would hide that all are -inf
    for (std::int64_t lane = 0; lane < n - i; ++lane) {
      bad[0] |= ~-(v[lane] < kInfinity);
      top[0] = v[lane] > top[0] ? v[lane] : top[0];
    }
  }
  return !any(bad) && greatest_lane(top) > -kInfinity;
}

template <class T>
Norm norm(const T* x, std::int64_t n) {
  Norm found = {-kInfinity, 0.0};
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
    const T* const block = x + begin;
    if (const float top = highest(block, size); top > found.top) {
      found.norm *= exp_down(F{} + (found.top - top))[0];
      found.top = top;
    }
    const float top = found.top == -kInfinity ? 0.0f : found.top;  // -inf - -inf would be NaN
    F sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes)
      for (int j = 0; j < 4; ++j) sums[j] += exp_down(load(block + i + j * kLanes) - top);
    for (; i + kLanes <= size; i += kLanes) sums[0] += exp_down(load(block + i) - top);
    if (i < size) {
      float lane[kLanes];
      store(lane, exp_down(load_some(block + i, size - i) - top));
      sums[1] += load_some(lane, size - i);
    }
    found.norm += total((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return found;
}

template <class T>
void minus(const T* x, std::int64_t n, float top, float log_norm, float* y) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, (load(x + i) - top) - log_norm);
  if (i < n) store_some(y + i, (load_some(x + i, n - i) - top) - log_norm, n - i);
}

template <class T>
constexpr LogitLoops<T> loops() {
  return {argmax<T>, finite<T>, norm<T>, minus<T>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<LogitLoops>, logit_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include <cmath>

#include "bind.hpp"
#include "threads.hpp"

namespace porthal {

namespace {

// work(loops, row, t) for each row, on all threads.
template <class Work>
void each_row(const Array& logits, Work work) {
  logits.is_float();
  const Matrix rows = logits.matrix();
  if (rows.columns < 1) refuse("logits", "has 0 columns", "at least 1");
  with_float(logits.kind, [&](auto tag) {
    using T = decltype(tag);
    const auto& loops = logit_loops(isa()).of(&tag);
    parallel_for(rows.rows, rows_per_chunk(rows.columns * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy;
      for (std::int64_t t = begin; t < end; ++t) work(loops, rows.dense_row<T>(t, copy), rows.columns, t);
    });
  });
}

void argmax(const Array& logits, const Array& ids) {
  ids.has(Kind::i32);
  auto* const out = static_cast<std::int32_t*>(ids.output({logits.matrix().rows}));
  each_row(logits, [&](const auto& loops, const auto* row, std::int64_t n, std::int64_t t) {
    out[t] = static_cast<std::int32_t>(loops.argmax(row, n));
  });
}

void check_finite(const Array& logits, const Array& ids, const Array& checked) {
  constexpr std::int32_t kNotFinite = -2;
  ids.has(Kind::i32);
  checked.has(Kind::i32);
  const std::int64_t rows = logits.matrix().rows;
  const Matrix chosen = ids.vector(rows);
  auto* const out = static_cast<std::int32_t*>(checked.output({rows}));
  each_row(logits, [&](const auto& loops, const auto* row, std::int64_t n, std::int64_t t) {
    const std::int32_t id = chosen.at<std::int32_t>(0, t);
    out[t] = id >= 0 && !loops.finite(row, n) ? kNotFinite : id;
  });
}

void log_softmax(const Array& logits, const Array& logp) {
  logp.has(Kind::f32);
  const Matrix rows = logits.matrix();
  auto* const out = static_cast<float*>(logp.output({rows.rows, rows.columns}));
  each_row(logits, [&](const auto& loops, const auto* row, std::int64_t n, std::int64_t t) {
    const Norm found = loops.norm(row, n);
    loops.minus(row, n, found.top, static_cast<float>(std::log(found.norm)), out + t * n);
  });
}

void gather_logprob(const Array& logits, const Array& ids, const Array& logp) {
  ids.has(Kind::i32);
  logp.has(Kind::f32);
  const Matrix rows = logits.matrix(), chosen = ids.vector(rows.rows);
  auto* const out = static_cast<float*>(logp.output({rows.rows}));
  for (std::int64_t t = 0; t < rows.rows; ++t)
    if (const std::int32_t id = chosen.at<std::int32_t>(0, t); id < 0 || id >= rows.columns)
      refuse("ids[" + std::to_string(t) + "]", "is " + std::to_string(id), "0 to " + std::to_string(rows.columns - 1));
  each_row(logits, [&](const auto& loops, const auto* row, std::int64_t n, std::int64_t t) {
    const Norm found = loops.norm(row, n);
    loops.minus(row + chosen.at<std::int32_t>(0, t), 1, found.top, static_cast<float>(std::log(found.norm)), out + t);
  });
}

}  // namespace

PORTHAL_OP(argmax, "logits ids", "ids[T] int32 = position of the highest of each row, the first of equals; NaN counts as -inf.")
PORTHAL_OP(check_finite, "logits ids checked",
           "checked[T] = ids, or -2 where an id is not negative and the highest of its row, NaN above all, is not finite.")
PORTHAL_OP(log_softmax, "logits logp", "logp[T, V] float32 = logits - log(sum exp(logits)).")
PORTHAL_OP(gather_logprob, "logits ids logp", "logp[T] float32 = log_softmax(logits)[t, ids[t]]; ids int32 from 0 to V - 1.")

}  // namespace porthal
#endif
