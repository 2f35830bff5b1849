// scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s): a block of keys in L1 against all rows of a group.
#include "indexer.hpp"

#if defined(PORTHAL_ISA)
#include "attention.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

// Where a row's queries lie, packed, and its weights, padded with zeros.
template <class M>
struct Row {
  Word* queries;
  float* weights;
  Row(const IndexerDims& d, float* packed, std::int64_t i) {
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
  const Row<M> row(d, packed, i);
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

template <class M, class T>
void scores(const IndexerDims& d, const char* const* keys, const char* const* following, float* wide, const float* packed,
            std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  const char* copies[kIndexerKeys];
  const char* const* key = keys;
  if (sizeof(T) == 2 && M::kPer == 1) {
    for (std::int64_t k = 0; k < kIndexerKeys; ++k) {
      float* const row = wide + k * up(d.width, kLanes);
      widen_row(reinterpret_cast<const T*>(keys[k]), d.width, row);
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
    const Row<M> row(d, const_cast<float*>(packed), t);
    const char* const* const next = t ? key : following;
    const std::int64_t bytes = t ? sizeof(Word) : sizeof(T) * M::kPer;
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

template <class M>
std::int64_t wide_floats(const IndexerDims& d) {
  return up(d.width, kLanes) * (d.heads > kIndexerKeys ? d.heads : kIndexerKeys);
}

#if defined(__AMX_BF16__)
void pack_lines(const IndexerDims& d, const bf16* iq, std::ptrdiff_t stride, const bf16* weights, const float* weights32,
                std::int64_t i, float*, float* packed) {
  const Row<Pairs> row(d, packed, i);
  pack_queries(reinterpret_cast<const char*>(iq), stride, d.heads, d.width / 2, 0, d.width / 2, row.queries);
  if (weights)
    widen_row(weights, d.heads, row.weights);
  else
    widen_row(weights32, d.heads, row.weights);
}

// The same in tiles of 16 keys and 16 heads. Keys are copied beside each other, their products with a row's heads behind them.
void scores_of_lines(const IndexerDims& d, const char* const* keys, const char* const* following, float* wide,
                     const float* packed, std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  const Heads heads(d.heads);
  const std::int64_t bytes = d.width * sizeof(bf16), words = d.width / 2, all = heads.padded();
  char* const copies = reinterpret_cast<char*>(wide);
  float* const products = wide + kIndexerKeys * words;
  for (std::int64_t k = 0; k < kIndexerKeys; ++k)
    for (std::int64_t i = 0; i < bytes; i += 64) {
      store(reinterpret_cast<float*>(copies + k * bytes + i), load_raw<F>(keys[k] + i));
      __builtin_prefetch(following[k] + i, 0, 2);
    }
  const std::int64_t there = d.heads - (all - kLanes);  // of the last vector
  const U last = (U)_mm512_maskz_set1_epi32(static_cast<__mmask16>((1u << there) - 1), -1);
  Tiles tiles;
  for (std::int64_t t = 0; t < rows; ++t) {
    if (visible[t] <= 0) continue;
    const std::int64_t seen = visible[t] < kIndexerKeys ? visible[t] : kIndexerKeys;
    const Row<Pairs> row(d, const_cast<float*>(packed), t);
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
        const float* const product = products + (k + i) * all;
        F sum = {};
        for (std::int64_t h = 0; h + kLanes < all; h += kLanes) sum += at_least(F{}, load(product + h)) * load(row.weights + h);
        const F end = at_least(F{}, load(product + all - kLanes)) * load(row.weights + all - kLanes);
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

std::int64_t floats_of_lines(const IndexerDims& d) {
  return kIndexerKeys * (d.width / 2 + Heads(d.heads).padded());
}
#endif

template <class M, class T>
constexpr IndexerLoops<T> loops() {
  return {wide_floats<M>, Row<M>::floats, pack<M, T>, scores<M, T>};
}

}  // namespace

#if defined(__AMX_BF16__)
constexpr IndexerLoops<bf16> kLines{floats_of_lines, Row<Pairs>::floats, pack_lines, scores_of_lines};
#else
constexpr IndexerLoops<bf16> kLines = loops<BestPairs, bf16>();
#endif
PORTHAL_LOOPS(FloatsAndPairs<IndexerLoops>, indexer_loops) = {
  {loops<Singles, float>(), loops<Singles, bf16>(), loops<Singles, fp16>()}, loops<BestPairs, bf16>(), kLines};

}  // namespace porthal
#else
#include "bind.hpp"

namespace porthal {
namespace {

void indexer_scores(const Array& iq, const Array& w, const Array& keys, const Array& visible, const Array& cu_q,
                    const Array& block_table, std::int64_t block_size, double scale, const Array& scores) {
  scores.has(Kind::f32);
  scores.is_shape({iq.dims ? iq.shape[0] : 0, kAny});
  const std::int64_t width = scores.shape[1];
  float* const out = static_cast<float*>(scores.output({scores.shape[0], width}));
  with_scorer(iq, w, keys, visible, cu_q, block_table, block_size, scale, [&](const auto& scorer) {
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

PORTHAL_OP(indexer_scores, "iq w keys visible cu_q block_table block_size scale scores",
           "scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s) for the first visible[t] positions of row t's\n"
           "request, else -inf. iq [T, G, D] of any strides, w [T, G] of its dtype or float32, keys [slots, D] with unit\n"
           "stride inside a row, scores float32 [T, S]. Sums in float32; in bfloat16 subnormal products may count as 0.")

}  // namespace porthal
#endif
