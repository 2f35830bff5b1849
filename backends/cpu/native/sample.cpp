// Drawing tokens from a row's distribution, and judging drafts by it.
#include "sample.hpp"

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

constexpr float kInfinity = __builtin_inff();

template <class T>
inline F load_at_most(const T* p, std::int64_t n) {  // -inf behind the n elements
  if (n >= kLanes) return load(p);
  float lane[kLanes];
  store(lane, load_some(p, n));
  for (std::int64_t i = n; i < kLanes; ++i) lane[i] = -kInfinity;
  return load(lane);
}

inline F without_nan(F v) { return v > -kInfinity ? v : F{} - kInfinity; }
inline F weight_of(F v, const Scale& scale) { return exp_down((v - scale.top) * scale.inverse); }
inline I bin_of(F v, const Scale& scale) {
  const F depth = (scale.top - v) * scale.bins_per, last = F{} + static_cast<float>(kBins - 1);
  return __builtin_convertvector(depth < last ? depth : last, I);
}

template <class T>
float highest(const T* x, std::int64_t n) {
  F top[4];
  for (int j = 0; j < 4; ++j) top[j] = F{} - kInfinity;
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) top[j] = at_least(load(x + i + j * kLanes), top[j]);
  for (; i < n; i += kLanes) top[0] = at_least(load_at_most(x + i, n - i), top[0]);
  float found = -kInfinity;
  for (int j = 0; j < 4; ++j)
    for (int lane = 0; lane < kLanes; ++lane) found = top[j][lane] > found ? top[j][lane] : found;
  return found;
}

template <class T>
void sample(const T* x, std::int64_t n, float* some, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) some[i] = load_some(x + i * n / count, 1)[0];
}

template <class T>
void fill(const T* x, std::int64_t n, const Scale& scale, bool ones, double* masses) {
  constexpr std::int64_t kBlock = 512;
  alignas(64) float weights[kBlock];
  alignas(64) std::int32_t bins[kBlock];
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t size = n - begin < kBlock ? n - begin : kBlock;
    for (std::int64_t i = 0; i < size; i += kLanes) {
      const F v = without_nan(load_at_most(x + begin + i, size - i));
      const I bin = bin_of(v, scale);
      store(weights + i, ones ? (v > -kInfinity ? F{} + 1.0f : F{}) : weight_of(v, scale));
      std::memcpy(bins + i, &bin, sizeof bin);
    }
    std::int64_t i = 0;
    for (; i + kCopies <= size; i += kCopies)
      for (std::int64_t j = 0; j < kCopies; ++j) masses[j * kBins + bins[i + j]] += static_cast<double>(weights[i + j]);
    for (; i < size; ++i) masses[bins[i]] += static_cast<double>(weights[i]);
  }
}

template <class T>
std::int64_t collect(const T* x, std::int64_t n, const Scale& scale, std::int64_t first, std::int64_t last, float least,
                     float* values, float* weights, std::uint32_t* indices) {
  std::int64_t found = 0;
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const F v = without_nan(load_at_most(x + i, n - i));
    const I high = (v >= least) & (v > -kInfinity);
    if (!any(high)) continue;
    const I bin = bin_of(v, scale);
    const I keep = (bin >= static_cast<std::int32_t>(first)) & (bin <= static_cast<std::int32_t>(last)) & high;
    if (!any(keep)) continue;
    const F weight = weight_of(v, scale);
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_movepi32_mask((__m512i)keep);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(i)));
    store(values + found, (F)_mm512_maskz_compress_ps(mask, (__m512)v));
    store(weights + found, (F)_mm512_maskz_compress_ps(mask, (__m512)weight));
    _mm512_storeu_si512(indices + found, _mm512_maskz_compress_epi32(mask, index));
    found += __builtin_popcount(mask);
#else
    for (int lane = 0; lane < kLanes; ++lane) {
      values[found] = v[lane];
      weights[found] = weight[lane];
      indices[found] = static_cast<std::uint32_t>(i + lane);
      found += keep[lane] & 1;
    }
#endif
  }
  return found;
}

template <class T>
double rest(const T* x, std::int64_t begin, std::int64_t end, const Scale& scale, const Bound& bound, float factor,
            const float* q, float* p) {
  I lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  F sum = {};
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const std::int64_t some = end - i < kLanes ? end - i : kLanes;
    const F v = without_nan(load_at_most(x + i, some));
    const I ahead = lane + static_cast<std::int32_t>(i) <= static_cast<std::int32_t>(bound.index);
    const I kept = (v > bound.value) | ((v == bound.value) & ahead);
    F left = (F)((I)(weight_of(v, scale) * factor) & kept);
    if (q) {
      left -= some == kLanes ? load(q + i) : load_some(q + i, some);
      left = left > 0.0f ? left : F{};
    }
    if (some == kLanes)
      store(p + (i - begin), left);
    else
      store_some(p + (i - begin), left, some);
    sum += left;
  }
  return total(sum);
}

template <class T>
constexpr SampleLoops<T> loops() {
  return {highest<T>, sample<T>, fill<T>, collect<T>, rest<T>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<SampleLoops>, sample_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include "bind.hpp"
#include "threads.hpp"

namespace porthal {
namespace {

struct Settings {
  Matrix u, temperature, top_k, top_p;

  void check(std::int64_t rows, std::int64_t per_row, std::int64_t vocabulary) const {
    const auto bad = [](const char* name, std::int64_t t, const std::string& value, const std::string& expected) {
      refuse(std::string(name) + "[" + std::to_string(t) + "]", "is " + value, expected);
    };
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t i = 0; i < per_row; ++i)
        if (const float v = u.at<float>(t, i); !(v >= 0 && v < 1)) bad("u", t, std::to_string(v), "0 to less than 1");
      if (const float v = temperature.at<float>(0, t); !(v >= 0 && v < kInfinity)) bad("temperature", t, std::to_string(v), "at least 0");
      if (const float v = top_p.at<float>(0, t); !(v >= 0 && v <= 1)) bad("top_p", t, std::to_string(v), "0 to 1");
      if (const std::int32_t v = top_k.at<std::int32_t>(0, t); v < 0 || v > vocabulary)
        bad("top_k", t, std::to_string(v), "0 to " + std::to_string(vocabulary));
    }
  }

  template <class T>
  void make(Drawn<T>& drawn, const T* row, std::int64_t n, std::int64_t t) const {
    drawn.make(row, n, temperature.at<float>(0, t), top_k.at<std::int32_t>(0, t), top_p.at<float>(0, t));
  }
};

void sample(const Array& logits, const Array& u, const Array& temperature, const Array& top_k, const Array& top_p,
            const Array& ids) {
  logits.is_float();
  u.has(Kind::f32);
  temperature.has(Kind::f32);
  top_k.has(Kind::i32);
  top_p.has(Kind::f32);
  ids.has(Kind::i32);
  const Matrix rows = logits.matrix(), draws = u.vector(rows.rows);
  if (rows.columns < 1) refuse("logits", "has 0 columns", "at least 1");
  const Settings settings{{draws.data, rows.rows, 1, draws.column_stride, 0},
                          temperature.vector(rows.rows),
                          top_k.vector(rows.rows),
                          top_p.vector(rows.rows)};
  auto* const out = static_cast<std::int32_t*>(ids.output({rows.rows}));
  settings.check(rows.rows, 1, rows.columns);
  with_float(logits.kind, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(rows.rows, rows_per_chunk(rows.columns * 16), [&](std::int64_t begin, std::int64_t end) {
      thread_local Drawn<T> drawn;
      thread_local std::vector<T> copy;
      for (std::int64_t t = begin; t < end; ++t) {
        settings.make(drawn, rows.dense_row<T>(t, copy), rows.columns, t);
        out[t] = static_cast<std::int32_t>(drawn.draw(draws.at<float>(0, t)));
      }
    });
  });
}

void speculative_verify(const Array& logits, const Array& draft, const Array& u, const Array& temperature, const Array& top_k,
                        const Array& top_p, const Array* draft_probs, const Array& tokens) {
  logits.has(Kind::f32);
  draft.has(Kind::i32);
  u.has(Kind::f32);
  temperature.has(Kind::f32);
  top_k.has(Kind::i32);
  top_p.has(Kind::f32);
  tokens.has(Kind::i32);
  const Matrix drafts = draft.matrix();
  const std::int64_t R = drafts.rows, n = drafts.columns;
  logits.is_shape({R, n + 1, kAny});
  const std::int64_t V = logits.shape[2];
  if (V < 1) refuse("logits", "has 0 columns", "at least 1");
  if (draft_probs) {
    draft_probs->has(Kind::f32);
    draft_probs->is_shape({R, n, V});
  }
  const Settings settings{u.matrix(R, n + 1), temperature.vector(R), top_k.vector(R), top_p.vector(R)};
  auto* const out = static_cast<std::int32_t*>(tokens.output({R, n + 1}));
  settings.check(R, n + 1, V);
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t i = 0; i < n; ++i)
      if (const std::int32_t v = drafts.at<std::int32_t>(r, i); v < 0 || v >= V)
        refuse("draft[" + std::to_string(r) + ", " + std::to_string(i) + "]", "is " + std::to_string(v),
               "0 to " + std::to_string(V - 1));
  const auto rows_of = [](const Array& a, std::int64_t r) {
    return Matrix{a.data + r * a.strides[0], a.shape[1], a.shape[2], a.strides[1], a.strides[2]};
  };
  parallel_for(R, 1, [&](std::int64_t begin, std::int64_t end) {
    thread_local Drawn<float> drawn;
    thread_local std::vector<float> copy, other;
    for (std::int64_t r = begin; r < end; ++r) {
      const Matrix rows = rows_of(logits, r);
      std::int32_t* const emitted = out + r * (n + 1);
      std::fill(emitted, emitted + n + 1, -1);
      for (std::int64_t i = 0; i <= n; ++i) {
        settings.make(drawn, rows.dense_row<float>(i, copy), V, r);
        const float* q = nullptr;  // behind the last draft there is nothing
        std::int64_t whole = -1;
        if (i < n) {
          const std::int32_t d = drafts.at<std::int32_t>(r, i);
          const float p = drawn.certain ? static_cast<float>(drawn.only == d) : static_cast<float>(drawn.weight(d) / drawn.mass);
          if (draft_probs)
            q = rows_of(*draft_probs, r).dense_row<float>(i, other);
          else
            whole = d;
          if (settings.u.at<float>(r, i) * (q ? q[d] : 1.0f) < p) {
            emitted[i] = d;
            continue;
          }
        }
        emitted[i] = static_cast<std::int32_t>(drawn.draw_rest(settings.u.at<float>(r, n), q, whole));
        break;
      }
    }
  });
}

}  // namespace

PORTHAL_OP(sample, "logits u temperature top_k top_p ids",
           "ids[T] int32 drawn from softmax(logits / temperature): of the candidates by falling logit, ties by id, the first\n"
           "top_k (0: all), of those the shortest prefix that reaches top_p; the first at which the cumulated probability\n"
           "exceeds u. Temperature 0, or a highest logit that is not finite, is argmax. NaN counts as -inf.")
PORTHAL_OP(speculative_verify, "logits draft u temperature top_k top_p draft_probs tokens",
           "tokens[R, n+1] int32 = the accepted prefix of the drafts, one token more, then -1. Draft i is accepted when\n"
           "u[i] * q(draft) < p(draft), p as sample draws from; the token is drawn at u[n] from max(p - q, 0), or from p behind\n"
           "the last draft, in the order of ids. draft_probs None: q is all on the draft.")

}  // namespace porthal
#endif
