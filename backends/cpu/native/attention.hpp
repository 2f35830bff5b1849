// What attention and its indexer share: keys, read where they lie, times packed queries. Lanes are heads.
#pragma once

#include "simd.hpp"

namespace porthal {
namespace {

typedef std::uint32_t Word;  // what one multiplication takes: a float, or two bf16

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSums = 24;         // vectors of sums that stay in registers
constexpr int kMostVectors = 4;   // of heads in one tile
#else
constexpr int kSums = 12;
constexpr int kMostVectors = 2;
#endif
template <int V>
constexpr int kKeys = kSums / V < 12 ? kSums / V : 12;  // keys of a tile: each has a pointer, and those need registers too
constexpr std::int64_t kLine = 16;                      // words of a cache line

// How words are multiplied.
struct Singles {
  static constexpr int kPer = 1;  // values in a word
  static F add(F sum, Word x, U y) { return sum + (F)(U{} + x) * (F)y; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPer = 2;
  static F add(F sum, Word x, U y) {
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)y);
  }
};
#endif

inline std::int64_t up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// Vectors of heads, in panels of nearly equal width.
struct Heads {
  std::int64_t vectors, panels;
  explicit Heads(std::int64_t heads)
      : vectors((heads + kLanes - 1) / kLanes), panels((vectors + kMostVectors - 1) / kMostVectors) {}
  std::int64_t padded() const { return vectors * kLanes; }
  std::int64_t first(std::int64_t panel) const { return vectors * panel / panels; }
};

// queries[panel][word][head of the panel] from rows of `words` words that are `stride` bytes apart: words `from` and up of `all`.
// Heads that pad the last vector are zeros.
inline void pack_queries(const char* rows, std::ptrdiff_t stride, std::int64_t count, std::int64_t words, std::int64_t from,
                         std::int64_t all, Word* queries) {
  const Heads heads(count);
  for (std::int64_t p = 0; p < heads.panels; ++p) {
    const std::int64_t first = heads.first(p) * kLanes, width = heads.first(p + 1) * kLanes - first;
    Word* const panel = queries + first * all + from * width;
    for (std::int64_t h = 0; h < width; ++h)
      for (std::int64_t w = 0; w < words; ++w) {
        Word x = 0;
        if (first + h < count) std::memcpy(&x, rows + (first + h) * stride + w * sizeof x, sizeof x);
        panel[w * width + h] = x;
      }
  }
}

// sums[m][j] += key row m . vector j of a panel of queries. Meanwhile fetches the same part of the rows in `next`.
template <class M, int Keys, int V>
inline void dots(const char* const* keys, const char* const* next, const Word* queries, std::int64_t words,
                 F (&sums)[Keys][V]) {
  for (std::int64_t w = 0; w < words;) {
    const std::int64_t end = w + kLine < words ? w + kLine : words;
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m) __builtin_prefetch(next[m] + w * sizeof(Word), 0, 2);
    for (; w < end; ++w) {
      U q[V];
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) q[j] = load_raw<U>(queries + (w * V + j) * kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < Keys; ++m) {
        Word x;
        std::memcpy(&x, keys[m] + w * sizeof(Word), sizeof x);
#pragma GCC unroll 4
        for (int j = 0; j < V; ++j) sums[m][j] = M::add(sums[m][j], x, q[j]);
      }
    }
  }
}

}  // namespace
}  // namespace porthal
