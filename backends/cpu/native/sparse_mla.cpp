// Sparse multi-head latent attention in blocks of selected keys: scores, softmax and values of a block while its keys are in
// cache. Keys are read where they lie; a row's blocks are merged in the order of the selection, by whichever thread.
#include "sparse_mla.hpp"

#if defined(PORTHAL_ISA)
#include "attention.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

constexpr int kRows = kLanes > 4 ? kLanes / 2 : kLanes;  // heads, and
constexpr int kAcross = 3;                              // vectors of columns, of one tile of values
constexpr float kLowest = -3.402823466e38f;

template <class M>
constexpr std::int64_t kBlock = M::kPer == 2 ? 144 : 96;  // keys: two blocks and their sums are in L2
template <class M>
constexpr std::int64_t kPairs = (kBlock<M> + kTiled) / 2 * kAcross * kLanes;  // words of a panel of values, as pairs of keys

// Where a row's sums lie: o[head][column], and of each head the highest score and the sum of its weights.
struct State {
  std::int64_t width;
  float *o, *top, *sum;
  State(const MlaDims& d, float* memory)
      : width(up(d.c, kLanes)), o(memory), top(o + Heads(d.heads).padded() * width), sum(top + Heads(d.heads).padded()) {}
  static std::int64_t floats(const MlaDims& d) { return Heads(d.heads).padded() * (up(d.c, kLanes) + 2); }
};

// What a thread needs beside it: of a block, the highest score of each head and the sum of its weights, what older sums and
// its own are multiplied by, scores, weights, and values as pairs or rows in float32; and the packed queries.
template <class M>
struct Space {
  float *old, *now, *top, *sum, *scores, *wide;
  Word *weights, *queries, *pairs;
  std::int64_t wide_row;
  Space(const MlaDims& d, float* memory) {
    const std::int64_t heads = Heads(d.heads).padded();
    old = memory;
    now = old + heads;
    top = now + heads;
    sum = top + heads;
    scores = sum + heads;
    weights = reinterpret_cast<Word*>(scores + kBlock<M> * heads);
    queries = weights + kBlock<M> * heads;
    wide = reinterpret_cast<float*>(queries + heads * (up(d.c, kLanes) + up(d.r, kLanes)));
    pairs = reinterpret_cast<Word*>(wide);  // no kernel needs both
    wide_row = row(d);
  }
  // Rows are an odd number of cache lines apart, so that a column of them is in all sets of L1.
  static std::int64_t row(const MlaDims& d) { return up(up(d.c, kLanes) + up(d.r, kLanes), 2 * kLine) + kLine; }
  static std::int64_t floats(const MlaDims& d) {
    const std::int64_t heads = Heads(d.heads).padded(), rows = heads > kBlock<M> ? heads : kBlock<M>;
    const std::int64_t panels = (d.c + kAcross * kLanes - 1) / (kAcross * kLanes);
    return heads * (4 + 2 * kBlock<M> + (up(d.c, kLanes) + up(d.r, kLanes))) +
           (M::kPer == 1 ? rows * row(d) : panels * kPairs<M>);
  }
};

template <class M, class T>
void queries(const MlaDims& d, const T* latent, std::ptrdiff_t latent_stride, const T* rope, std::ptrdiff_t rope_stride,
             float* memory) {
  const Space<M> space(d, memory);
  const char *a = reinterpret_cast<const char*>(latent), *b = reinterpret_cast<const char*>(rope);
  if (sizeof(T) == 2 && M::kPer == 1) {
    for (std::int64_t n = 0; n < d.heads; ++n) {
      float* const row = space.wide + n * space.wide_row;
      widen_row(reinterpret_cast<const T*>(a + n * latent_stride), d.c, row);
      widen_row(reinterpret_cast<const T*>(b + n * rope_stride), d.r, row + up(d.c, kLanes));
    }
    a = reinterpret_cast<const char*>(space.wide);
    b = reinterpret_cast<const char*>(space.wide + up(d.c, kLanes));
    latent_stride = rope_stride = space.wide_row * sizeof(float);
  }
  const std::int64_t c = d.c / M::kPer, all = (d.c + d.r) / M::kPer;
  if (d.heads <= kFew) {
    const std::int64_t first = up(c, kLanes), both = first + up(all - c, kLanes);
    pack_few(a, latent_stride, d.heads, c, 0, both, space.queries);
    return pack_few(b, rope_stride, d.heads, all - c, first, both, space.queries);
  }
  pack_queries(a, latent_stride, d.heads, c, 0, all, space.queries);
  pack_queries(b, rope_stride, d.heads, all - c, c, all, space.queries);
}

// Beside the scores of a tile's keys: their values as pairs of keys, pairs[panel of columns][pair][column], while they are in
// L1. Columns that pad the last vector are zeros.
template <class M, int Keys>
struct Beside {
  Fetch<Keys> fetch;
  void operator()(std::int64_t word) const { fetch(word); }
  Beside(const char* const*, const Fetch<Keys>& fetch, std::int64_t, std::int64_t, Word*) : fetch(fetch) {}
};
#if defined(__AVX512BF16__)
template <int Keys>
struct Beside<Pairs, Keys> {
  Fetch<Keys> fetch;
  const char* const* keys;
  std::int64_t columns, panel;  // words of a panel
  Word* pairs;                  // null where they are made already
  Beside(const char* const* keys, const Fetch<Keys>& fetch, std::int64_t columns, std::int64_t panel, Word* pairs)
      : fetch(fetch), keys(keys), columns(columns), panel(panel), pairs(pairs) {}

  void operator()(std::int64_t word) const {
    fetch(word);
    if (!pairs) return;
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const std::int64_t vector = word / kLanes * 2, left = columns - 2 * word;
    Word* const first = pairs + vector / kAcross * panel + vector % kAcross * kLanes;
    Word* const second = pairs + (vector + 1) / kAcross * panel + (vector + 1) % kAcross * kLanes;
    const __mmask32 there = left < 2 * kLanes ? (1u << left) - 1 : 0xffffffffu;  // no call: it would spill all sums
#pragma GCC unroll 6
    for (int m = 0; m < Keys; m += 2) {
      const __m512i a = _mm512_maskz_loadu_epi16(there, keys[m] + word * sizeof(Word));
      const __m512i b = _mm512_maskz_loadu_epi16(there, keys[m + 1] + word * sizeof(Word));
      _mm512_storeu_si512(first + m / 2 * kAcross * kLanes, _mm512_permutex2var_epi16(a, low, b));
      if (left > kLanes) _mm512_storeu_si512(second + m / 2 * kAcross * kLanes, _mm512_permutex2var_epi16(a, high, b));
    }
  }
};
#endif

// scores[key][head] = scale * (c . latent + kp . rope); pairs is null unless these are the first heads.
template <class M, int V>
void score(const MlaDims& d, const char* const* c, const char* const* kp, const char* const* next_c, const char* const* next_kp,
           std::int64_t bytes, std::int64_t count, const Word* panel, std::int64_t heads, float* scores, Word* pairs,
           std::int64_t pairs_panel) {
  constexpr int Keys = kKeys<V>;
  const std::int64_t words = d.c / M::kPer;
  for (std::int64_t k = 0; k < count; k += Keys) {
    F sums[Keys][V];
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[m][j] = F{};
    const Beside<M, Keys> beside(c + k, {next_c + k, bytes}, d.c, pairs_panel, pairs ? pairs + k / 2 * kAcross * kLanes : nullptr);
    dots<M, Keys, V>(c + k, panel, words, sums, beside);
    dots<M, Keys, V>(kp + k, panel + words * V * kLanes, d.r / M::kPer, sums, Fetch<Keys>{next_kp + k, bytes});
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store(scores + (k + m) * heads + j * kLanes, sums[m][j] * d.scale);
  }
}

// The same for few heads; those that pad a vector score 0.
template <class M>
void score_few(const MlaDims& d, const char* const* c, const char* const* kp, const char* const* next_c,
               const char* const* next_kp, std::int64_t bytes, std::int64_t count, const Word* queries, float* scores,
               Word* pairs, std::int64_t pairs_panel) {
  const std::int64_t words = d.c / M::kPer, rest = d.r / M::kPer, first = up(words, kLanes), all = first + up(rest, kLanes);
  for (std::int64_t k = 0; k < count; k += kFewKeys) {
    F sums[kLanes];
#pragma GCC unroll 16
    for (F& sum : sums) sum = F{};
    const Beside<M, kFewKeys> beside(c + k, {next_c + k, bytes}, d.c, pairs_panel, pairs ? pairs + k / 2 * kAcross * kLanes : nullptr);
    dots_of_few<M>(c + k, queries, all, words, sums, beside);
    dots_of_few<M>(kp + k, queries + first, all, rest, sums, Fetch<kFewKeys>{next_kp + k, bytes});
    alignas(64) float products[kLanes];
    totals(sums, products);
    for (int m = 0; m < kFewKeys; ++m) store(scores + (k + m) * kLanes, load_some(products + m * kFew, kFew) * d.scale);
  }
}

// Of two parts of a row's keys, what the sums of each are multiplied by to be added.
inline void join(const float* top, const float* sum, float* old, float* now, float* joint_top, float* joint_sum) {
  const F a = load(joint_top), b = load(top), high = a > b ? a : b;
  const F x = exp(a - high), y = exp(b - high);
  store(joint_sum, load(joint_sum) * x + load(sum) * y);
  store(joint_top, high);
  store(old, x);
  store(now, y);
}

inline F joined(F old, F before, F now, F added) { return old * before + now * added; }

inline U word_of(Singles, const float* p, F& sum, F top, std::int64_t) {
  const F e = exp(load(p) - top);
  sum += e;
  return (U)e;
}
#if defined(__AVX512BF16__)
inline U word_of(Pairs, const float* p, F& sum, F top, std::int64_t second) {
  const F a = exp(load(p) - top), b = second ? exp(load(p + second) - top) : F{};
  sum += a + b;
  return widen((S)_mm512_cvtneps_pbh((__m512)a)) | widen((S)_mm512_cvtneps_pbh((__m512)b)) << 16;
}
#endif

inline void store_groups(Word* first, Word* second, U word) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)word, 0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(second), _mm512_maskz_extracti64x4_epi64(0xf, (__m512i)word, 1));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128((__m256i)word));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256((__m256i)word, 1));
#else
  (void)second;
  std::memcpy(first, &word, sizeof word);
#endif
}

// weights[group of kRows heads][step][head] = exp(score - highest), and their sums; a step is as many keys as a word holds.
template <class M>
void soften(const float* scores, std::int64_t count, std::int64_t heads, Word* weights, float* tops, float* sums) {
  const std::int64_t steps = (count + M::kPer - 1) / M::kPer;
  for (std::int64_t h = 0; h < heads; h += kLanes) {
    F top = F{} + kLowest, sum = {};
    for (std::int64_t k = 0; k < count; ++k) {
      const F s = load(scores + k * heads + h);
      top = s > top ? s : top;
    }
    Word* const to = weights + h * steps;
    for (std::int64_t i = 0; i < steps; ++i) {
      const std::int64_t k = i * M::kPer;
      const U word = word_of(M{}, scores + k * heads + h, sum, top, k + 1 < count ? heads : 0);
      store_groups(to + i * kRows, to + (steps + i) * kRows, word);
    }
    store(tops + h, top);
    store(sums + h, sum);
  }
}

// o[head][column] (+)= sum over steps of weight . value
template <class M, int Rows, int V>
void values(const Word* weights, std::int64_t steps, const char* const* rows, std::int64_t offset, bool first, const float* old,
            const float* now, std::int64_t width, float* o) {
  F sums[Rows][V];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) sums[m][j] = F{};
  for (std::int64_t i = 0; i < steps; ++i) {
    const char* const row = rows[i] + offset;
    U v[V];
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) v[j] = load_raw<U>(row + j * sizeof(U));
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 3
      for (int j = 0; j < V; ++j) sums[m][j] = M::add(sums[m][j], weights[i * kRows + m], v[j]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < V; ++j) {
      float* const to = o + m * width + j * kLanes;
      store(to, first ? sums[m][j] : joined(F{} + old[m], load(to), F{} + now[m], sums[m][j]));
    }
}

template <class M>
void all_values(const Word* weights, std::int64_t steps, std::int64_t heads, int across, const char* const* rows,
                std::int64_t offset, bool first, const float* old, const float* now, std::int64_t width, float* o) {
  using Tile = decltype(&values<M, 1, 1>);
  static constexpr Tile kTiles[4][kAcross] = {
    {values<M, 1, 1>, values<M, 1, 2>, values<M, 1, 3>},
    {values<M, 2, 1>, values<M, 2, 2>, values<M, 2, 3>},
    {values<M, 4, 1>, values<M, 4, 2>, values<M, 4, 3>},
#if defined(__AVX512F__)
    {values<M, 8, 1>, values<M, 8, 2>, values<M, 8, 3>},
#endif
  };
  for (std::int64_t h = 0; h < heads; h += kRows) {
    const std::int64_t left = heads - h < kRows ? heads - h : kRows;
    int power = 0;
    while ((1 << power) < left) ++power;  // rows above are padding
    kTiles[power][across - 1](weights + h * steps, steps, rows, offset, first, old + h, now + h, width, o + h * width);
  }
}

template <class M, class T>
void add_block(const MlaDims& d, const MlaKeys<T>& keys, const MlaKeys<T>& following, bool first, float* memory, float* sums) {
  const Space<M> space(d, memory);
  const State state(d, sums);
  const Heads panels(d.heads);
  const std::int64_t heads = panels.padded(), count = keys.count;
  const char *c[kBlock<M>], *kp[kBlock<M>], *next_c[kBlock<M>], *next_kp[kBlock<M>];
  const bool copied = M::kPer == 1 && (sizeof(T) == 2 || d.c % kLanes != 0);
  const MlaKeys<T>& next = following.count ? following : keys;
  for (std::int64_t k = 0; k < up(count, kTiled); ++k) {  // tiles are whole: the last key fills them
    const std::int64_t here = k < count ? k : count - 1, then = k < next.count ? k : next.count - 1;
    c[k] = reinterpret_cast<const char*>(keys.c[here]);
    kp[k] = reinterpret_cast<const char*>(keys.kp[here]);
    if (copied) {
      float* const row = space.wide + here * space.wide_row;
      if (k < count) {
        widen_row(keys.c[k], d.c, row);
        widen_row(keys.kp[k], d.r, row + up(d.c, kLanes));
      }
      c[k] = reinterpret_cast<const char*>(row);
      kp[k] = reinterpret_cast<const char*>(row + up(d.c, kLanes));
    }
    next_c[k] = reinterpret_cast<const char*>(next.c[then]);
    next_kp[k] = reinterpret_cast<const char*>(next.kp[then]);
  }

  using Score = decltype(&score<M, 1>);
  static constexpr Score kScores[] = {
    score<M, 1>, score<M, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
    score<M, 3>, score<M, 4>,
#endif
  };
  if (d.heads <= kFew) {
    score_few<M>(d, c, kp, next_c, next_kp, sizeof(T) * M::kPer, count, space.queries, space.scores, space.pairs, kPairs<M>);
  } else {
    for (std::int64_t p = 0; p < panels.panels; ++p) {
      const std::int64_t begin = panels.first(p), width = panels.first(p + 1) - begin;
      kScores[width - 1](d, c, kp, next_c, next_kp, sizeof(T) * M::kPer, count,
                         space.queries + begin * kLanes * ((d.c + d.r) / M::kPer), heads, space.scores + begin * kLanes,
                         p ? nullptr : space.pairs, kPairs<M>);
    }
  }

  soften<M>(space.scores, count, heads, space.weights, space.top, space.sum);
  for (std::int64_t h = 0; h < heads; h += kLanes)
    if (first) {
      store(state.top + h, load(space.top + h));
      store(state.sum + h, load(space.sum + h));
    } else {
      join(space.top + h, space.sum + h, space.old + h, space.now + h, state.top + h, state.sum + h);
    }

  const std::int64_t steps = (count + M::kPer - 1) / M::kPer;
  const char* rows[kBlock<M>];
  for (std::int64_t i = 0; i < steps; ++i)
    rows[i] = M::kPer == 1 ? c[i] : reinterpret_cast<const char*>(space.pairs + i * kAcross * kLanes);
  for (std::int64_t column = 0, panel = 0; column < d.c; column += kAcross * kLanes, ++panel) {
    const std::int64_t left = (d.c - column + kLanes - 1) / kLanes;
    all_values<M>(space.weights, steps, d.heads, left < kAcross ? static_cast<int>(left) : kAcross, rows,
                  (M::kPer == 1 ? column : panel * kPairs<M>)*sizeof(Word), first, space.old, space.now, state.width,
                  state.o + column);
  }
}

void merge(const MlaDims& d, const float* later, float* memory, float* sums) {
  const State state(d, sums), part(d, const_cast<float*>(later));
  const Space<Singles> space(d, memory);
  for (std::int64_t h = 0; h < Heads(d.heads).padded(); h += kLanes)
    join(part.top + h, part.sum + h, space.old + h, space.now + h, state.top + h, state.sum + h);
  for (std::int64_t n = 0; n < d.heads; ++n)
    for (std::int64_t i = n * state.width; i < (n + 1) * state.width; i += kLanes)
      store(state.o + i, joined(F{} + space.old[n], load(state.o + i), F{} + space.now[n], load(part.o + i)));
}

template <class T>
void finish(const MlaDims& d, const float* sums, T* o) {
  const State state(d, const_cast<float*>(sums));
  for (std::int64_t n = 0; n < d.heads; ++n, o += d.c) {
    // Scores that are all -inf have no softmax.
    const float scale = state.top[n] == kLowest ? __builtin_nanf("") : 1.0f / state.sum[n];
    const float* const from = state.o + n * state.width;
    std::int64_t i = 0;
    for (; i + kLanes <= d.c; i += kLanes) store(o + i, load(from + i) * scale);
    if (i < d.c) store_some(o + i, load(from + i) * scale, d.c - i);
  }
}

template <class M, class T>
constexpr MlaLoops<T> loops() {
  return {kBlock<M>, kTiled, Space<M>::floats, State::floats, queries<M, T>, add_block<M, T>, merge, finish<T>};
}

}  // namespace
}  // namespace porthal

#include "sparse_mla_tiles.hpp"

namespace porthal {

#if defined(__AMX_BF16__)
constexpr MlaLoops<bf16> kLines{kTileKeys, 2 * kTile, TileSpace::floats, State::floats, queries_of_lines, add_lines, merge,
                                finish<bf16>};
#else
constexpr MlaLoops<bf16> kLines = loops<BestPairs, bf16>();
#endif
PORTHAL_LOOPS(FloatsAndPairs<MlaLoops>, sparse_mla_loops) = {
  {loops<Singles, float>(), loops<Singles, bf16>(), loops<Singles, fp16>()}, loops<BestPairs, bf16>(), kLines};

}  // namespace porthal
#else
#include "bind.hpp"

namespace porthal {
namespace {

void sparse_mla(const Array& q_latent, const Array& q_rope, const Array& c, const Array* c_scale, std::int64_t group,
                const Array& kp, const Array& indices, const Array& length, const Array& cu_q, const Array& block_table,
                std::int64_t block_size, double scale, const Array& o) {
  q_latent.is_float();
  for (const Array* a : {&q_rope, &kp, &o}) a->has(q_latent.kind);
  const std::int64_t size = c_scale ? group_of(c, *c_scale, group) : (c.has(q_latent.kind), 0);
  indices.has(Kind::i32);
  length.has(Kind::i32);
  q_latent.is_shape({kAny, kAny, kAny});
  const std::int64_t rows = q_latent.shape[0], heads = q_latent.shape[1], width = q_latent.shape[2];
  q_rope.is_shape({rows, heads, kAny});
  const Matrix c_rows = c.matrix(kAny, width), kp_rows = kp.matrix(c_rows.rows, q_rope.shape[2]);
  const Matrix chosen = indices.matrix(rows), valid = length.vector(rows);
  const Requests requests(cu_q, block_table, block_size, rows, c_rows.rows);
  void* const out = o.output({rows, heads, width});
  for (std::int64_t t = 0; t < rows; ++t)
    if (const std::int32_t n = valid.at<std::int32_t>(0, t); n < 0 || n > chosen.columns)
      refuse("length", "has " + std::to_string(n) + " at " + std::to_string(t), "0 to " + std::to_string(chosen.columns));
  if (heads == 0 || width == 0) return;
  with_float(q_latent.kind, [&](auto tag) {
    using T = decltype(tag);
    const bool dense = c_scale ? c_rows.packed<char>() && c_scale->matrix().packed<float>() : c_rows.packed<T>();
    if (!dense || !kp_rows.packed<T>()) refuse("kv", "has fields with gaps inside a row", "rows of unit stride");
    const RowCodes<T>* const codes = c_scale ? &row_codes<T>(c.kind) : nullptr;
    const MlaDims dims{heads, width, kp_rows.columns, static_cast<float>(scale)};
    Mla<T>{q_latent, q_rope, c_rows, kp_rows, chosen, valid, c_scale ? c_scale->matrix() : Matrix{}, size, codes, requests,
           dims, static_cast<T*>(out)}.run(rows);
  });
}

}  // namespace

PORTHAL_OP(sparse_mla, "q_latent q_rope c c_scale group kp indices length cu_q block_table block_size scale o",
           "o[t, n] = sum_s softmax_s(scale * (q_latent[t, n] . c[s] + q_rope[t, n] . kp[s])) c[s] over the cache slots s of\n"
           "the positions indices[t, :length[t]] of row t's request; nothing selected gives 0. q_latent [T, N, C] and q_rope\n"
           "[T, N, R] of any strides, c [slots, C] and kp [slots, R] with unit stride inside a row, all of one dtype; o\n"
           "contiguous. With c_scale c is codes, as quantize gives them, and what they say is rounded to that dtype. Sums in float32; in bfloat16 weights are rounded, and subnormal products may count as 0. A row of o\n"
           "depends on its own inputs only, bit by bit, with any number of threads.")

}  // namespace porthal
#endif
