// Which experts each row goes to, and its way there and back.
#include "isa.hpp"

namespace porthal {

struct RouteLoops {
  // s = sigmoid(logits) and keys that order like s + bias, of n experts; both have room for 16 more, whose keys are 0.
  void (*score)(const float* logits, const float* bias, std::int64_t n, float* s, float* biased);
  // Unsigned keys that order like the n scores: NaN as -inf, -0 as +0. Room for 16 more, which are 0.
  void (*keys)(const float* scores, std::int64_t n, std::uint32_t* keys);
  // The position of the greatest of n keys, the first of equals; n is a multiple of 16.
  std::int64_t (*greatest)(const std::uint32_t* keys, std::int64_t n);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

void score(const float* logits, const float* bias, std::int64_t n, float* s, float* biased) {
  for (std::int64_t i = 0; i < n; i += kLanes) {
    const std::int64_t some = n - i < kLanes ? n - i : kLanes;
    const F v = sigmoid(load_some(logits + i, some));
    store(s + i, v);
    store(biased + i, v + load_some(bias + i, some));
  }
}

void keys(const float* scores, std::int64_t n, std::uint32_t* keys) {
  std::int64_t i = 0;
  for (; i < n; i += kLanes) {
    const F v = load(scores + i);
    const U nan = (U)(v != v), zero = (U)(v == 0.0f);
    const U u = (((U)v & ~nan) | (0xff800000u & nan)) & ~zero, key = u ^ ((U)((I)u >> 31) | 0x80000000u);
    std::memcpy(keys + i, &key, sizeof key);
  }
  for (std::int64_t j = n; j < (n + 15) / 16 * 16; ++j) keys[j] = 0;
}

std::int64_t greatest(const std::uint32_t* keys, std::int64_t n) {
  U best[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const U v = load_raw<U>(keys + i + j * kLanes);
      best[j] = v > best[j] ? v : best[j];
    }
  for (; i < n; i += kLanes) {
    const U v = load_raw<U>(keys + i);
    best[0] = v > best[0] ? v : best[0];
  }
  for (int j = 1; j < 4; ++j) best[0] = best[j] > best[0] ? best[j] : best[0];
  std::uint32_t top = 0;
  for (int lane = 0; lane < kLanes; ++lane) top = best[0][lane] > top ? best[0][lane] : top;
  for (i = 0;; i += kLanes) {
    const I same = (I)(load_raw<U>(keys + i) == top);
    if (!any(same)) continue;
    for (int lane = 0; lane < kLanes; ++lane)
      if (same[lane]) return i + lane;
  }
}

}  // namespace

PORTHAL_LOOPS(RouteLoops, route_loops) = {score, keys, greatest};

}  // namespace porthal
#else
#include <algorithm>
#include <cstring>

#include "bind.hpp"
#include "mix.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(RouteLoops, route_loops)

namespace {

// Memory of one thread for the choice of one row.
struct Choice {
  std::vector<float> s, biased, group_scores;
  std::vector<std::uint32_t> keys, group_keys;
  std::vector<std::int64_t> groups;
  std::vector<std::uint64_t> sorted;

  // The k greatest keys of n, greatest first, the first of equals first. Keys become 0, which none has that can be chosen.
  template <class Take>
  void choose(const RouteLoops& loops, std::vector<std::uint32_t>& from, std::int64_t n, std::int64_t k, Take take) {
    if (k <= 32) {
      for (std::int64_t j = 0; j < k; ++j) {
        const std::int64_t at = loops.greatest(from.data(), (n + 15) / 16 * 16);
        take(j, at);
        from[at] = 0;
      }
      return;
    }
    sorted.resize(n);
    for (std::int64_t i = 0; i < n; ++i) sorted[i] = static_cast<std::uint64_t>(~from[i]) << 32 | i;
    std::partial_sort(sorted.begin(), sorted.begin() + k, sorted.end());
    for (std::int64_t j = 0; j < k; ++j) take(j, static_cast<std::int64_t>(sorted[j] & 0xffffffffu));
  }
};

struct Rule {
  std::int64_t k, groups, kept_groups;
  float scale;
};

void route_row(const RouteLoops& loops, const float* logits, const float* bias, std::int64_t experts, const Rule& rule,
               std::int32_t* ids, float* weights, Choice& space) {
  constexpr std::uint32_t kLowest = 0x007fffffu;  // the key of -inf
  space.s.resize(experts + 16);
  space.biased.resize(experts + 16);
  space.keys.resize(experts + 16);
  loops.score(logits, bias, experts, space.s.data(), space.biased.data());
  loops.keys(space.biased.data(), experts, space.keys.data());
  if (rule.groups > 1) {
    const std::int64_t size = experts / rule.groups;
    space.group_scores.assign(rule.groups + 16, 0.0f);
    space.group_keys.resize(rule.groups + 16);
    for (std::int64_t g = 0; g < rule.groups; ++g) {
      float first = -__builtin_inff(), second = first;
      for (std::int64_t i = g * size; i < (g + 1) * size; ++i) {
        const float v = space.biased[i];
        if (v > first) {
          second = first;
          first = v;
        } else if (v > second) {  // also where it equals the first
          second = v;
        }
      }
      space.group_scores[g] = size > 1 ? first + second : first;
    }
    loops.keys(space.group_scores.data(), rule.groups, space.group_keys.data());
    space.groups.assign(rule.groups, 0);
    space.choose(loops, space.group_keys, rule.groups, rule.kept_groups,
                 [&](std::int64_t, std::int64_t g) { space.groups[g] = 1; });
    for (std::int64_t g = 0; g < rule.groups; ++g)
      if (!space.groups[g]) std::fill(space.keys.begin() + g * size, space.keys.begin() + (g + 1) * size, kLowest);
  }
  space.choose(loops, space.keys, experts, rule.k,
               [&](std::int64_t j, std::int64_t e) { ids[j] = static_cast<std::int32_t>(e); });
  float sum = 0;
  for (std::int64_t j = 0; j < rule.k; ++j) sum += space.s[ids[j]];
  for (std::int64_t j = 0; j < rule.k; ++j) weights[j] = rule.scale * (space.s[ids[j]] / (sum + 1e-20f));
}

void moe_route(const Array& logits, const Array& bias, std::int64_t k, double scale, std::int64_t groups,
               std::int64_t kept_groups, const Array& ids, const Array& weights) {
  logits.has(Kind::f32);
  bias.has(Kind::f32);
  ids.has(Kind::i32);
  weights.has(Kind::f32);
  const Matrix rows = logits.matrix(), biases = bias.vector(rows.columns);
  const std::int64_t experts = rows.columns;
  if (groups < 1 || experts % groups || kept_groups < 1 || kept_groups > groups)
    refuse("n_group and topk_group", "are " + std::to_string(groups) + " and " + std::to_string(kept_groups),
           "groups of equal size of " + std::to_string(experts) + " experts, and no more than there are");
  if (k < 1 || k > kept_groups * (experts / groups))
    refuse("k", "is " + std::to_string(k), "1 to " + std::to_string(kept_groups * (experts / groups)));
  auto* const chosen = static_cast<std::int32_t*>(ids.output({rows.rows, k}));
  auto* const mixed = static_cast<float*>(weights.output({rows.rows, k}));
  const RouteLoops& loops = route_loops(isa());
  const Rule rule{k, groups, kept_groups, static_cast<float>(scale)};
  thread_local std::vector<float> bias_space;
  const float* const dense_bias = biases.dense_row<float>(0, bias_space);
  parallel_for(rows.rows, rows_per_chunk(16 * experts), [&](std::int64_t begin, std::int64_t end) {
    thread_local Choice space;
    thread_local std::vector<float> copy;
    for (std::int64_t t = begin; t < end; ++t)
      route_row(loops, rows.dense_row<float>(t, copy), dense_bias, experts, rule, chosen + t * k, mixed + t * k, space);
  });
}

void moe_permute(const Array& x, const Array& ids, std::int64_t first_expert, const Array& sorted, const Array& counts,
                 const Array& source) {
  x.is_float();
  sorted.has(x.kind);
  ids.has(Kind::i32);
  counts.has(Kind::i32);
  source.has(Kind::i32);
  const Matrix rows = x.matrix(), chosen = ids.matrix(rows.rows);
  counts.is_shape({kAny});
  const std::int64_t experts = counts.shape[0], places = chosen.rows * chosen.columns;
  auto* const count = static_cast<std::int32_t*>(counts.output({experts}));
  auto* const from = static_cast<std::int32_t*>(source.output({places}));
  void* const out = sorted.output({places, rows.columns});
  const auto local = [&](std::int64_t place) {
    const std::int64_t e = chosen.at<std::int32_t>(place / chosen.columns, place % chosen.columns) - first_expert;
    return e >= 0 && e < experts ? e : -1;
  };
  thread_local std::vector<std::int64_t> next;
  next.assign(experts + 1, 0);
  for (std::int64_t p = 0; p < places; ++p)
    if (const std::int64_t e = local(p); e >= 0) ++next[e + 1];
  for (std::int64_t e = 0; e < experts; ++e) {
    count[e] = static_cast<std::int32_t>(next[e + 1]);
    next[e + 1] += next[e];
  }
  std::fill(from + next[experts], from + places, -1);
  for (std::int64_t p = 0; p < places; ++p)
    if (const std::int64_t e = local(p); e >= 0) from[next[e]++] = static_cast<std::int32_t>(p);
  with_float(x.kind, [&](auto tag) {
    using T = decltype(tag);
    const std::int64_t n = rows.columns;
    parallel_for(places, rows_per_chunk(n * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<T> copy;
      for (std::int64_t m = begin; m < end; ++m) {
        T* const to = static_cast<T*>(out) + m * n;
        if (from[m] < 0)
          std::memset(static_cast<void*>(to), 0, n * sizeof(T));
        else
          std::memcpy(to, rows.dense_row<T>(from[m] / chosen.columns, copy), n * sizeof(T));
      }
    });
  });
}

void moe_unpermute(const Array& sorted, const Array& source, const Array& weights, const Array& y) {
  sorted.is_float();
  y.has(sorted.kind);
  source.has(Kind::i32);
  weights.has(Kind::f32);
  const Matrix mix = weights.matrix();
  const std::int64_t choices = mix.columns, places = mix.rows * choices;
  const Matrix rows = sorted.matrix(places), from = source.vector(places);
  void* const out = y.output({mix.rows, rows.columns});
  thread_local std::vector<std::int64_t> row_of_caller;
  std::vector<std::int64_t>& row_of = row_of_caller;  // the row of each place, -1 where it has none
  row_of.assign(places, -1);
  for (std::int64_t m = 0; m < places; ++m) {
    const std::int32_t place = from.at<std::int32_t>(0, m);
    if (place < -1 || place >= places)
      refuse("source[" + std::to_string(m) + "]", "is " + std::to_string(place), "-1 to " + std::to_string(places - 1));
    if (place >= 0) row_of[place] = m;
  }
  with_float(sorted.kind, [&](auto tag) {
    using T = decltype(tag);
    const std::int64_t n = rows.columns;
    const auto& loops = mix_loops(isa()).of(&tag);
    parallel_for(mix.rows, rows_per_chunk(choices * n * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
      thread_local std::vector<const T*> of_choice;
      thread_local std::vector<float> share;
      thread_local std::vector<std::vector<T>> copies;
      of_choice.resize(choices);
      share.resize(choices);
      if (static_cast<std::int64_t>(copies.size()) < choices) copies.resize(choices);
      for (std::int64_t t = begin; t < end; ++t) {
        for (std::int64_t j = 0; j < choices; ++j) {
          const std::int64_t m = row_of[t * choices + j];
          share[j] = mix.at<float>(t, j);
          of_choice[j] = m < 0 ? nullptr : rows.dense_row<T>(m, copies[j]);
        }
        loops.mix(of_choice.data(), share.data(), choices, static_cast<T*>(out) + t * n, n);
      }
    });
  });
}

}  // namespace

PORTHAL_OP(moe_route, "logits bias k scale n_group topk_group ids weights",
           "s = sigmoid(logits); ids[T, k] = the highest of s + bias, in the topk_group of n_group groups whose two best sum to\n"
           "most; ties to the lowest, NaN as -inf; weights[T, k] = scale * s[ids] / (sum s[ids] + 1e-20). All float32 but ids.")
PORTHAL_OP(moe_permute, "x ids first_expert sorted counts source",
           "sorted[T*k, H] = rows of x by expert, then by place in ids; counts[E] of them per expert; source[T*k] = their\n"
           "places. Ids outside first_expert .. first_expert + E - 1 have no row: behind the others are zeros with source -1.")
PORTHAL_OP(moe_unpermute, "sorted source weights y",
           "y[t] = the sum over j of weights[t, j] * sorted[m] with source[m] = t*k + j, in the order of j in float32; rows with\n"
           "source -1 are not read.")

}  // namespace porthal
#endif
