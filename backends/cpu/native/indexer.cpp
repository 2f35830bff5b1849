// scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s): a block of keys in L1 against all rows of a group.
#include "indexer.hpp"

#if defined(PORTHAL_ISA)
#include <type_traits>

#include "attention.hpp"
#include "codes.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

// Where a row's queries lie, packed, and its weights, padded with zeros.
template <class M>
struct PackedRow {
  Word* queries;
  float* weights;
  PackedRow(const IndexerDims& d, float* packed, std::int64_t i) {
    const std::int64_t heads = Heads(d.heads).padded();
    weights = packed + i * floats(d);
    queries = reinterpret_cast<Word*>(weights + heads);
  }
  static std::int64_t floats(const IndexerDims& d) {
    return Heads(d.heads).padded() * (1 + up((d.width + M::kPer - 1) / M::kPer, 4));
  }
};

template <class M, class T>
void pack(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32, std::int64_t i,
          float* wide, float* packed) {
  const PackedRow<M> row(d, packed, i);
  const char* heads = reinterpret_cast<const char*>(iq);
  if (sizeof(T) == 2 && M::kPer == 1) {
    const std::int64_t width = up(d.width, kLanes);
    for (std::int64_t h = 0; h < d.heads; ++h)
      widen_row(reinterpret_cast<const T*>(heads + h * stride), d.width, wide + h * width);
    heads = reinterpret_cast<const char*>(wide);
    stride = width * sizeof(float);
  }
  const std::int64_t words = d.width / M::kPer;
  if (d.heads <= kFew)
    pack_few(heads, stride, d.heads, words, 0, up(words, kLanes), row.queries);
  else
    pack_queries(heads, stride, d.heads, words, 0, words, row.queries);
  if (weights)
    widen_row(weights, d.heads, row.weights);
  else
    widen_row(weights32, d.heads, row.weights);
}

// of_key[k] (+)= weights * max(0, key . queries), lanes are heads.
template <class M, int V>
void products(const char* const* keys, const char* const* next, std::int64_t bytes, std::int64_t words, const Word* queries,
              const float* weights, U last, bool first, std::int64_t count, F* of_key) {
  constexpr int Keys = kKeys<V>;
  for (std::int64_t k = 0; k < count; k += Keys) {
    F sums[Keys][V];
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[m][j] = F{};
    dots<M, Keys, V>(keys + k, queries, words, sums, Fetch<Keys>{next + k, bytes});
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m) {
      F total = first ? F{} : of_key[k + m];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        const F product = at_least(F{}, sums[m][j]) * load(weights + j * kLanes);
        total += j < V - 1 ? product : (F)((U)product & last);  // heads that are not there may be NaN
      }
      of_key[k + m] = total;
    }
  }
}

// sums[k] = the sum over few heads of weights * max(0, key . queries)
template <class M>
void scores_of_few(const char* const* keys, const char* const* next, std::int64_t bytes, std::int64_t words, const Word* queries,
                   const float* weights, std::int64_t heads, std::int64_t count, float* sums) {
  for (std::int64_t k = 0; k < count; k += kFewKeys) {
    F each[kLanes];
#pragma GCC unroll 16
    for (F& sum : each) sum = F{};
    dots_of_few<M>(keys + k, queries, up(words, kLanes), words, each, Fetch<kFewKeys>{next + k, bytes});
    alignas(64) float products[kLanes];
    totals(each, products);
    store(products, at_least(F{}, load(products)));
    for (int m = 0; m < kFewKeys; ++m) {
      float sum = 0.0f;
      for (std::int64_t h = 0; h < heads; ++h) sum += products[m * kFew + h] * weights[h];
      sums[k + m] = sum;
    }
  }
}

// A key in float32, padded with zeros.
template <class Key>
inline void widen_key(const char* key, std::int64_t n, float* to) {
  if constexpr (std::is_same_v<Key, Int8>) {
    for (std::int64_t i = 0; i < n; i += kLanes) {
      B codes{};
      std::memcpy(&codes, key + i, n - i < kLanes ? n - i : kLanes);
      store(to + i, Int8::number_of(wide(codes)));
    }
  } else {
    widen_row(reinterpret_cast<const Key*>(key), n, to);
  }
}

// Keys of a type that M does not multiply are widened.
template <class M, class Key>
void scores(const IndexerDims& d, const char* const* keys, const char* const* following, float* wide, const float* packed,
            std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  const char* copies[kIndexerKeys];
  const char* const* key = keys;
  constexpr std::int64_t kItem = std::is_same_v<Key, Int8> ? 1 : sizeof(Key);
  if (kItem < 4 && M::kPer == 1) {
    for (std::int64_t k = 0; k < kIndexerKeys; ++k) {
      float* const row = wide + k * up(d.width, kLanes);
      widen_key<Key>(keys[k], d.width, row);
      copies[k] = reinterpret_cast<const char*>(row);
    }
    key = copies;
  }
  using Products = decltype(&products<M, 1>);
  static constexpr Products kProducts[] = {
    products<M, 1>, products<M, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
    products<M, 3>, products<M, 4>,
#endif
  };
  const Heads heads(d.heads);
  alignas(64) std::uint32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = heads.padded() - kLanes + i < d.heads ? ~0u : 0u;
  const U last = load_raw<U>(lane), all = ~U{};
  const std::int64_t words = d.width / M::kPer;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (visible[t] <= 0) continue;
    const std::int64_t count = visible[t] < kIndexerKeys ? up(visible[t], kTiled) : kIndexerKeys;
    const PackedRow<M> row(d, const_cast<float*>(packed), t);
    const char* const* const next = t ? key : following;
    const std::int64_t bytes = t ? sizeof(Word) : kItem * M::kPer;
    F of_key[kIndexerKeys];
    alignas(64) float sums[kIndexerKeys];
    if (d.heads <= kFew) {
      scores_of_few<M>(key, next, bytes, words, row.queries, row.weights, d.heads, count, sums);
    } else {
      for (std::int64_t p = 0; p < heads.panels; ++p) {
        const std::int64_t begin = heads.first(p), width = heads.first(p + 1) - begin;
        kProducts[width - 1](key, next, bytes, words, row.queries + begin * kLanes * words, row.weights + begin * kLanes,
                             p + 1 < heads.panels ? all : last, p == 0, count, of_key);
      }
      for (std::int64_t k = 0; k < count; k += kLanes) totals(of_key + k, sums + k);
    }
    for (std::int64_t k = 0; k < count; k += kLanes) store(sums + k, load(sums + k) * d.scale);
    std::memcpy(out + t * stride, sums, (visible[t] < kIndexerKeys ? visible[t] : kIndexerKeys) * sizeof(float));
  }
}

// A row's queries as codes: their numbers, or bytes, `stride` bytes apart; their scales are part of the weights.
template <class T>
void pack_codes(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                float* of_heads, char* codes, std::ptrdiff_t codes_stride, bool bytes) {
  if (weights)
    widen_row(weights, d.heads, of_heads);
  else
    widen_row(weights32, d.heads, of_heads);
  for (std::int64_t h = 0; h < d.heads; ++h, codes += codes_stride) {
    const char* const head = reinterpret_cast<const char*>(iq) + h * stride;
    const float scale = scale_of<T, Int8>(head, sizeof(T), 0, d.width);
    of_heads[h] *= scale;
    for (std::int64_t k = 0; k < d.width; k += kLanes) {
      const F v = coded<Int8>(some<T>(head, sizeof(T), k, d.width), F{} + scale);
      const B code = narrow(Int8::code_of(v));
      if (bytes)
        std::memcpy(codes + k, &code, sizeof code);
      else
        store(reinterpret_cast<float*>(codes) + k, v);
    }
  }
}

template <class T>
void pack_code_numbers(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                       std::int64_t i, float* wide, float* packed) {
  const PackedRow<Singles> row(d, packed, i);
  const std::int64_t width = up(d.width, kLanes);
  char* const codes = reinterpret_cast<char*>(wide);
  pack_codes(d, iq, stride, weights, weights32, row.weights, codes, width * sizeof(float), false);
  if (d.heads <= kFew)
    pack_few(codes, width * sizeof(float), d.heads, d.width, 0, width, row.queries);
  else
    pack_queries(codes, width * sizeof(float), d.heads, d.width, 0, d.width, row.queries);
}

template <class M>
std::int64_t wide_floats(const IndexerDims& d) {
  return up(d.width, kLanes) * (d.heads > kIndexerKeys ? d.heads : kIndexerKeys);
}

#if defined(__AMX_BF16__)
struct Fours {
  static constexpr int kPer = 4;
};

void pack_lines(const IndexerDims& d, const bf16* iq, std::ptrdiff_t stride, const bf16* weights, const float* weights32,
                std::int64_t i, float*, float* packed) {
  const PackedRow<Pairs> row(d, packed, i);
  pack_queries(reinterpret_cast<const char*>(iq), stride, d.heads, d.width / 2, 0, d.width / 2, row.queries);
  if (weights)
    widen_row(weights, d.heads, row.weights);
  else
    widen_row(weights32, d.heads, row.weights);
}

template <class T>
void pack_code_lines(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                     std::int64_t i, float* wide, float* packed) {
  const PackedRow<Fours> row(d, packed, i);
  char* const codes = reinterpret_cast<char*>(wide);
  pack_codes(d, iq, stride, weights, weights32, row.weights, codes, d.width, true);
  pack_queries(codes, d.width, d.heads, d.width / 4, 0, d.width / 4, row.queries);
}

// The same in tiles of 16 keys and 16 heads. Keys are copied beside each other, their products with a row's heads behind them.
template <class M, Words W>
void scores_of_lines(const IndexerDims& d, const char* const* keys, const char* const* following, float* wide,
                     const float* packed, std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  const Heads heads(d.heads);
  const std::int64_t words = d.width / M::kPer, bytes = words * sizeof(Word), all = heads.padded();
  char* const copies = reinterpret_cast<char*>(wide);
  float* const products = wide + kIndexerKeys * words;
  for (std::int64_t k = 0; k < kIndexerKeys; ++k)
    for (std::int64_t i = 0; i < bytes; i += 64) {
      store(reinterpret_cast<float*>(copies + k * bytes + i), load_raw<F>(keys[k] + i));
      __builtin_prefetch(following[k] + i, 0, 2);
    }
  const std::int64_t there = d.heads - (all - kLanes);  // of the last vector
  const U last = (U)_mm512_maskz_set1_epi32(static_cast<__mmask16>((1u << there) - 1), -1);
  const auto product = [](const float* p) { return W == Words::pairs ? load(p) : number(load_raw<I>(p)); };
  TilesOf<W> tiles;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (visible[t] <= 0) continue;
    const std::int64_t seen = visible[t] < kIndexerKeys ? visible[t] : kIndexerKeys;
    const PackedRow<M> row(d, const_cast<float*>(packed), t);
    for (std::int64_t p = 0; p < heads.panels; ++p)
      for (std::int64_t v = heads.first(p), end = heads.first(p + 1), in_word = end - v; v < end; v += 2) {
        const Word* const queries = row.queries + heads.first(p) * kLanes * words + (v - heads.first(p)) * kLanes;
        for (std::int64_t k = 0; k < seen; k += kTile) {
          tiles.shape(kTile, v + 1 < end ? 2 * kTile : kTile, kTile);
          tiles.zero();
          tiles.add(copies + k * bytes, bytes, queries, in_word * kLanes * sizeof(Word), words / kTile, [] {});
          tiles.store(products + k * all + v * kLanes, all * sizeof(float));
        }
      }
    for (std::int64_t k = 0; k < seen; k += kLanes) {
      F of_key[kLanes];
#pragma GCC unroll 4
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const float* const of_heads = products + (k + i) * all;
        F sum = {};
        for (std::int64_t h = 0; h + kLanes < all; h += kLanes)
          sum += at_least(F{}, product(of_heads + h)) * load(row.weights + h);
        const F end = at_least(F{}, product(of_heads + all - kLanes)) * load(row.weights + all - kLanes);
        of_key[i] = sum + (F)((U)end & last);  // heads that are not there may be NaN
      }
      alignas(64) float sums[kLanes];
      totals(of_key, sums);
      const F scaled = load(sums) * d.scale;
      float* const to = out + t * stride + k;
      if (seen - k >= kLanes)
        store(to, scaled);
      else
        store_some(to, scaled, seen - k);
    }
  }
}

template <class M>
std::int64_t floats_of_lines(const IndexerDims& d) {
  const std::int64_t words = d.width / M::kPer, keys = kIndexerKeys * (words + Heads(d.heads).padded());
  return keys > d.heads * words ? keys : d.heads * words;
}
#endif

template <class M, class T>
constexpr IndexerLoops<T> loops() {
  return {wide_floats<M>, PackedRow<M>::floats, pack<M, T>, scores<M, T>};
}

template <class T>
constexpr CodedIndexer<T> coded_loops() {
  constexpr IndexerLoops<T> each{wide_floats<Singles>, PackedRow<Singles>::floats, pack_code_numbers<T>, scores<Singles, Int8>};
#if defined(__AMX_BF16__)
  return {each, {floats_of_lines<Fours>, PackedRow<Fours>::floats, pack_code_lines<T>, scores_of_lines<Fours, Words::codes>}};
#else
  return {each, each};
#endif
}

}  // namespace

#if defined(__AMX_BF16__)
constexpr IndexerLoops<bf16> kLines{floats_of_lines<Pairs>, PackedRow<Pairs>::floats, pack_lines,
                                    scores_of_lines<Pairs, Words::pairs>};
#else
constexpr IndexerLoops<bf16> kLines = loops<BestPairs, bf16>();
#endif
PORTHAL_LOOPS(FloatsAndPairs<IndexerLoops>, indexer_loops) = {
  {loops<Singles, float>(), loops<Singles, bf16>(), loops<Singles, fp16>()}, loops<BestPairs, bf16>(), kLines};
PORTHAL_LOOPS(PerFloat<CodedIndexer>, coded_indexer_loops) = {coded_loops<float>(), coded_loops<bf16>(), coded_loops<fp16>()};

}  // namespace porthal
#else
#include "bind.hpp"

namespace porthal {
namespace {

void indexer_scores(const Array& iq, const Array& w, const Array& keys, const Array* key_scale, const Array& visible,
                    const Array& cu_q,
                    const Array& block_table, std::int64_t block_size, double scale, const Array& scores) {
  scores.has(Kind::f32);
  scores.is_shape({iq.dims ? iq.shape[0] : 0, kAny});
  const std::int64_t width = scores.shape[1];
  float* const out = static_cast<float*>(scores.output({scores.shape[0], width}));
  with_scorer(iq, w, keys, key_scale, visible, cu_q, block_table, block_size, scale, [&](const auto& scorer) {
    const std::int64_t chunks = ceil_div(width, kIndexerChunk), items = scorer.groups.size() * chunks;
    parallel_for(items, scorer.alone(width) ? items : 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t i = from; i < to; ++i) {
        const RowGroup& group = scorer.groups[i / chunks];
        const std::int64_t begin = i % chunks * kIndexerChunk, end = std::min(begin + kIndexerChunk, width);
        scorer.score(group, i == from || i % chunks == 0, begin, end, out + group.first * width + begin, width);
      }
    });
  });
}

}  // namespace

PORTHAL_OP(indexer_scores, "iq w keys key_scale visible cu_q block_table block_size scale scores",
           "scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s) for the first visible[t] positions of row t's\n"
           "request, else -inf. iq [T, G, D] of any strides, w [T, G] of its dtype or float32, keys [slots, D] with unit\n"
           "stride inside a row, scores float32 [T, S]. Sums in float32; in bfloat16 subnormal products may count as 0. With\n"
           "key_scale float32 [slots, 1] keys are codes of int8, and each head of iq becomes such.")

}  // namespace porthal
#endif
