// scores[t, s] = scale * sum_h w[t, h] * max(0, iq[t, h] . k_s): a block of keys in L1 against all rows of a group.
#include "indexer.hpp"

#if defined(PORTHAL_ISA)
#include <type_traits>

#include "attention.hpp"
#include "codes.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

constexpr std::int64_t kBlock = 48;  // keys that are multiplied without tiles

template <class Key>
constexpr bool kCodes = std::is_same_v<Key, Int8> || std::is_same_v<Key, E4m3>;

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
  if constexpr (kCodes<Key>) {
    for (std::int64_t i = 0; i < n; i += kLanes) {
      B codes{};
      std::memcpy(&codes, key + i, n - i < kLanes ? n - i : kLanes);
      store(to + i, Key::number_of(wide(codes)));
    }
  } else {
    widen_row(reinterpret_cast<const Key*>(key), n, to);
  }
}

// Keys of a type that M does not multiply are widened.
template <class M, class Key>
void scores(const IndexerDims& d, const KeyBlock& keys, const KeyBlock& following, float* wide, const float* packed,
            std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  const char* copies[kBlock];
  const char* const* key = keys.key;
  constexpr std::int64_t kItem = kCodes<Key> ? 1 : sizeof(Key);
  if (kItem < 4 && M::kPer == 1) {
    for (std::int64_t k = 0; k < kBlock; ++k) {
      float* const row = wide + k * up(d.width, kLanes);
      widen_key<Key>(keys.key[k], d.width, row);
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
    const std::int64_t count = visible[t] < kBlock ? up(visible[t], kTiled) : kBlock;
    const PackedRow<M> row(d, const_cast<float*>(packed), t);
    const char* const* const next = t ? key : following.key;
    const std::int64_t bytes = t ? sizeof(Word) : kItem * M::kPer;
    F of_key[kBlock];
    alignas(64) float sums[kBlock];
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
    for (std::int64_t k = 0; k < count; k += kLanes) {
      const F scaled = load(sums + k) * d.scale;
      store(sums + k, kCodes<Key> ? scaled * load(keys.scales + k) : scaled);
    }
    std::memcpy(out + t * stride, sums, (visible[t] < kBlock ? visible[t] : kBlock) * sizeof(float));
  }
}

// A row's queries as codes: their numbers, or bytes, `stride` bytes apart. The scale of a query is part of its weight, those of
// one that has several are part of its numbers.
template <class Code, class T>
void pack_codes(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                float* of_heads, char* codes, std::ptrdiff_t codes_stride, bool bytes) {
  if (weights)
    widen_row(weights, d.heads, of_heads);
  else
    widen_row(weights32, d.heads, of_heads);
  const bool one = !Code::kGroup || d.width <= Code::kGroup;
  const std::int64_t group = one ? d.width : Code::kGroup;
  for (std::int64_t h = 0; h < d.heads; ++h, codes += codes_stride) {
    const char* const head = reinterpret_cast<const char*>(iq) + h * stride;
    for (std::int64_t begin = 0, end; begin < d.width; begin = end) {
      end = begin + group < d.width ? begin + group : d.width;
      const float scale = scale_of<T, Code>(head, sizeof(T), begin, end);
      if (one) of_heads[h] *= scale;
      for (std::int64_t k = begin; k < end; k += kLanes) {
        const F v = coded<Code>(some<T>(head, sizeof(T), k, end), F{} + scale);
        const B code = narrow(Code::code_of(v));
        if (bytes)
          std::memcpy(codes + k, &code, sizeof code);
        else
          store(reinterpret_cast<float*>(codes) + k, one ? v : v * scale);
      }
    }
  }
}

template <class Code, class T>
void pack_code_numbers(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                       std::int64_t i, float* wide, float* packed) {
  const PackedRow<Singles> row(d, packed, i);
  const std::int64_t width = up(d.width, kLanes);
  char* const codes = reinterpret_cast<char*>(wide);
  pack_codes<Code>(d, iq, stride, weights, weights32, row.weights, codes, width * sizeof(float), false);
  if (d.heads <= kFew)
    pack_few(codes, width * sizeof(float), d.heads, d.width, 0, width, row.queries);
  else
    pack_queries(codes, width * sizeof(float), d.heads, d.width, 0, d.width, row.queries);
}

template <class M>
std::int64_t wide_floats(const IndexerDims& d) {
  return up(d.width, kLanes) * (d.heads > kBlock ? d.heads : kBlock);
}

#if defined(__AMX_BF16__)
struct Fours {
  static constexpr int kPer = 4;
};

constexpr std::int64_t kStrip = 2 * kTile;  // keys, and heads, whose products stay in registers

// Strips of heads one behind the other.
void pack_strips(const char* rows, std::ptrdiff_t stride, std::int64_t heads, std::int64_t words, Word* queries) {
  for (std::int64_t h = 0; h < heads; h += kStrip)
    pack_queries(rows + h * stride, stride, heads - h < kStrip ? heads - h : kStrip, words, 0, words, queries + h * words);
}

void pack_lines(const IndexerDims& d, const bf16* iq, std::ptrdiff_t stride, const bf16* weights, const float* weights32,
                std::int64_t i, float*, float* packed) {
  const PackedRow<Pairs> row(d, packed, i);
  pack_strips(reinterpret_cast<const char*>(iq), stride, d.heads, d.width / 2, row.queries);
  if (weights)
    widen_row(weights, d.heads, row.weights);
  else
    widen_row(weights32, d.heads, row.weights);
}

// How codes are multiplied: those of int8 as they are, those of e4m3 as the pairs of bf16 that they say, each of whose vectors
// has the even ones of 64 codes, then the odd ones, in keys as in queries.
inline void pairs_of_line(const char* codes, char* pairs) {
  U said[2];
  E4m3::pairs_of(load_raw<U>(codes), said);
  std::memcpy(pairs, said, sizeof said);
}

template <class Code, class M, class T>
void pack_code_lines(const IndexerDims& d, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32,
                     std::int64_t i, float* wide, float* packed) {
  const PackedRow<M> row(d, packed, i);
  char *codes = reinterpret_cast<char*>(wide), *const pairs = codes + d.heads * d.width;
  pack_codes<Code>(d, iq, stride, weights, weights32, row.weights, codes, d.width, true);
  if constexpr (std::is_same_v<Code, E4m3>) {
    for (std::int64_t k = 0; k < d.heads * d.width; k += 64) pairs_of_line(codes + k, pairs + 2 * k);
    codes = pairs;
  }
  const std::int64_t words = d.width / M::kPer;
  pack_strips(codes, words * sizeof(Word), d.heads, words, row.queries);
}

// A row's products with a strip of keys, [strip of heads][key][head], of which the sums are not made yet.
struct Strip {
  const float *products, *weights, *scales;
  float* to;
  std::int64_t seen, done;

  bool waits() const { return done < seen; }

  // The scores of the next 16 keys.
  template <Words W>
  void sum(std::int64_t vectors, float scale) {
    F of_key[kLanes];
#pragma GCC unroll 16
    for (F& sum : of_key) sum = F{};
    for (std::int64_t v = 0; v < vectors; ++v) {
      const float* const of_heads = products + (v / 2 * kStrip + done) * kStrip + v % 2 * kLanes;
      const F weight = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const float* const at = of_heads + i * kStrip;
        of_key[i] += at_least(F{}, W == Words::pairs ? load(at) : number(load_raw<I>(at))) * weight;
      }
    }
    alignas(64) float sums[kLanes];
    totals(of_key, sums);
    F scores = load(sums) * scale;
    if (scales) scores *= load(scales + done);
    if (seen - done >= kLanes)
      store(to + done, scores);
    else
      store_some(to + done, scores, seen - done);
    done += kLanes;
  }
};

// The same in tiles of 16 keys and 16 heads. A run of keys is multiplied where it lies, others are copied beside each other.
// While tiles multiply a strip, the sums of the one before are made.
template <class Key, class M, Words W>
void scores_of_lines(const IndexerDims& d, const KeyBlock& keys, const KeyBlock& following, float* wide, const float* packed,
                     std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride) {
  constexpr bool kDecode = std::is_same_v<Key, E4m3>;
  const std::int64_t words = d.width / M::kPer, bytes = words * sizeof(Word), held = kDecode ? d.width : bytes;
  const std::int64_t vectors = Heads(d.heads).vectors, steps = words / kTile;
  char* const copies = reinterpret_cast<char*>(wide);
  float *products = wide + kIndexerKeys * words, *others = products + (vectors + 1) / 2 * kStrip * kStrip;
  const bool copied = kDecode || !keys.apart;
  const char* const block = copied ? copies : keys.key[0];
  const std::ptrdiff_t apart = copied ? bytes : keys.apart;
  for (std::int64_t k = 0; copied && k < kIndexerKeys; ++k)
    for (std::int64_t i = 0; i < held; i += 64)
      if (kDecode)
        pairs_of_line(keys.at(k) + i, copies + k * bytes + 2 * i);
      else
        store(reinterpret_cast<float*>(copies + k * bytes + i), load_raw<F>(keys.at(k) + i));
  const std::int64_t passes = kIndexerKeys / kStrip * ((vectors + 1) / 2) * steps, share = (kIndexerKeys + passes - 1) / passes;
  std::int64_t fetched = 0;
  Strip before{};
  const auto beside = [&] {
    for (const std::int64_t end = fetched + share < kIndexerKeys ? fetched + share : kIndexerKeys; fetched < end; ++fetched)
      for (std::int64_t i = 0; i < held; i += 64) __builtin_prefetch(following.at(fetched) + i, 0, 2);
    if (before.waits()) before.sum<W>(vectors, d.scale);
  };
  TilesOf<W> tiles;
  for (std::int64_t t = 0; t < rows; ++t) {
    const PackedRow<M> row(d, const_cast<float*>(packed), t);
    for (std::int64_t k = 0; k < kIndexerKeys && k < visible[t]; k += kStrip) {
      for (std::int64_t v = 0; v < vectors; v += 2) {
        const std::int64_t width = v + 1 < vectors ? kStrip : kTile, none = v * kLanes + width - d.heads;
        float* const to = products + v * kLanes * kStrip;
        tiles.shape(kStrip, width, kTile);
        tiles.zero();
        tiles.add(block + k * apart, apart, row.queries + v * kLanes * words, width * sizeof(Word), steps, beside);
        tiles.store(to, kStrip * sizeof(float));
        for (std::int64_t i = 0; none > 0 && i < kStrip; ++i) std::memset(to + i * kStrip + width - none, 0, none * sizeof(float));
      }
      while (before.waits()) before.sum<W>(vectors, d.scale);
      const std::int64_t seen = visible[t] - k;
      before.products = products, before.weights = row.weights, before.scales = keys.scales ? keys.scales + k : nullptr;
      before.to = out + t * stride + k, before.seen = seen < kStrip ? seen : kStrip, before.done = 0;
      products = others, others = const_cast<float*>(before.products);
    }
  }
  while (before.waits()) before.sum<W>(vectors, d.scale);
}

template <class M>
std::int64_t floats_of_lines(const IndexerDims& d) {
  const std::int64_t words = d.width / M::kPer, keys = kIndexerKeys * words + (Heads(d.heads).vectors + 1) * kStrip * kStrip;
  const std::int64_t queries = d.heads * d.width;  // codes and their pairs take 3 bytes of 4
  return keys > queries ? keys : queries;
}
#endif

template <class M, class T>
constexpr IndexerLoops<T> loops() {
  return {kBlock, false, wide_floats<M>, PackedRow<M>::floats, pack<M, T>, scores<M, T>};
}

template <class Code, class T>
constexpr CodedIndexer<T> coded_loops() {
  constexpr IndexerLoops<T> each{kBlock, false, wide_floats<Singles>, PackedRow<Singles>::floats, pack_code_numbers<Code, T>,
                                 scores<Singles, Code>};
#if defined(__AMX_BF16__)
  using M = std::conditional_t<std::is_same_v<Code, Int8>, Fours, Pairs>;
  constexpr Words kWords = std::is_same_v<Code, Int8> ? Words::codes : Words::pairs;
  return {each, {kIndexerKeys, true, floats_of_lines<M>, PackedRow<M>::floats, pack_code_lines<Code, M, T>,
                 scores_of_lines<Code, M, kWords>}};
#else
  return {each, each};
#endif
}

template <class T>
constexpr CodedIndexers<T> coded_loops() {
  return {coded_loops<Int8, T>(), coded_loops<E4m3, T>()};
}

}  // namespace

#if defined(__AMX_BF16__)
constexpr IndexerLoops<bf16> kLines{kIndexerKeys, true, floats_of_lines<Pairs>, PackedRow<Pairs>::floats, pack_lines,
                                    scores_of_lines<bf16, Pairs, Words::pairs>};
#else
constexpr IndexerLoops<bf16> kLines = loops<BestPairs, bf16>();
#endif
PORTHAL_LOOPS(FloatsAndPairs<IndexerLoops>, indexer_loops) = {
  {loops<Singles, float>(), loops<Singles, bf16>(), loops<Singles, fp16>()}, loops<BestPairs, bf16>(), kLines};
PORTHAL_LOOPS(PerFloat<CodedIndexers>, coded_indexer_loops) = {coded_loops<float>(), coded_loops<bf16>(), coded_loops<fp16>()};

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
           "key_scale float32 [slots, 1] keys are codes of int8, or of e4m3 (uint8), and each head of iq becomes such; e4m3's have\n"
           "a scale for 128 elements.")

}  // namespace porthal
#endif
