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
// Keys of a tile with V vectors of heads: each has a pointer, and those need registers too. All divide kTiled.
template <int V>
constexpr int kKeys = V == 1 ? 8 : V == 2 && kSums == 24 ? 12 : 6;
constexpr std::int64_t kTiled = 24;
constexpr std::int64_t kLine = 16;                      // words of a cache line

// How words are multiplied.
struct Singles {
  static constexpr int kPer = 1;  // values in a word
  static F add(F sum, Word x, U y) { return sum + (F)(U{} + x) * (F)y; }
  static F add(F sum, U x, U y) { return sum + (F)x * (F)y; }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPer = 2;
  static F add(F sum, Word x, U y) {
    return add(sum, U{} + x, y);
  }
  static F add(F sum, U x, U y) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y); }
};
using BestPairs = Pairs;
#else
using BestPairs = Singles;
#endif

inline std::int64_t up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

template <class T>
inline void widen_row(const T* from, std::int64_t n, float* to) {  // and pads it with zeros
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  if (i < n) store(to + i, load_some(from + i, n - i));
}

// Vectors of heads, in panels of nearly equal width.
struct Heads {
  std::int64_t vectors, panels;
  explicit Heads(std::int64_t heads)
      : vectors((heads + kLanes - 1) / kLanes), panels((vectors + kMostVectors - 1) / kMostVectors) {}
  std::int64_t padded() const { return vectors * kLanes; }
  std::int64_t first(std::int64_t panel) const { return vectors * panel / panels; }
};

#if defined(__AVX512F__)
// Column i of a square becomes row i.
inline void transpose(U (&rows)[16]) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512i x = (__m512i)rows[2 * i], y = (__m512i)rows[2 * i + 1];
    a[2 * i] = _mm512_maskz_unpacklo_epi32(0xffff, x, y);
    a[2 * i + 1] = _mm512_maskz_unpackhi_epi32(0xffff, x, y);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      b[i + 2 * j] = _mm512_maskz_unpacklo_epi64(0xff, a[i + j], a[i + 2 + j]);
      b[i + 2 * j + 1] = _mm512_maskz_unpackhi_epi64(0xff, a[i + j], a[i + 2 + j]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i x = _mm512_maskz_shuffle_i32x4(0xffff, b[i], b[i + 4], 0x88), y = _mm512_maskz_shuffle_i32x4(0xffff, b[i], b[i + 4], 0xdd);
    const __m512i z = _mm512_maskz_shuffle_i32x4(0xffff, b[i + 8], b[i + 12], 0x88), w = _mm512_maskz_shuffle_i32x4(0xffff, b[i + 8], b[i + 12], 0xdd);
    rows[i] = (U)_mm512_maskz_shuffle_i32x4(0xffff, x, z, 0x88);
    rows[i + 8] = (U)_mm512_maskz_shuffle_i32x4(0xffff, x, z, 0xdd);
    rows[i + 4] = (U)_mm512_maskz_shuffle_i32x4(0xffff, y, w, 0x88);
    rows[i + 12] = (U)_mm512_maskz_shuffle_i32x4(0xffff, y, w, 0xdd);
  }
}
#endif

// queries[panel][word][head of the panel] from rows of `words` words that are `stride` bytes apart: words `from` and up of `all`.
// Heads that pad the last vector are zeros.
inline void pack_queries(const char* rows, std::ptrdiff_t stride, std::int64_t count, std::int64_t words, std::int64_t from,
                         std::int64_t all, Word* queries) {
  const Heads heads(count);
  for (std::int64_t p = 0; p < heads.panels; ++p) {
    const std::int64_t first = heads.first(p) * kLanes, width = heads.first(p + 1) * kLanes - first;
    Word* const panel = queries + first * all + from * width;
    for (std::int64_t h = 0; h < width; h += kLanes)
      for (std::int64_t w = 0; w < words; w += kLine) {
        const std::int64_t some = words - w < kLine ? words - w : kLine;
#if defined(__AVX512F__)
        const char* const row = rows + (first + h) * stride + w * sizeof(Word);
        U square[kLanes];
        if (some == kLine && first + h + kLanes <= count) {
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) square[i] = load_raw<U>(row + i * stride);
        } else {
          for (int i = 0; i < kLanes; ++i) {
            square[i] = U{};
            if (first + h + i < count) std::memcpy(&square[i], row + i * stride, some * sizeof(Word));
          }
        }
        transpose(square);
        for (std::int64_t i = 0; i < some; ++i) std::memcpy(panel + (w + i) * width + h, &square[i], sizeof(U));
#else
        for (std::int64_t i = 0; i < kLanes; ++i)
          for (std::int64_t k = w; k < w + some; ++k) {
            Word x = 0;
            if (first + h + i < count) std::memcpy(&x, rows + (first + h + i) * stride + k * sizeof x, sizeof x);
            panel[k * width + h + i] = x;
          }
#endif
      }
  }
}

// Fetches the same part of other rows into L2; a word is so many bytes of theirs.
template <int Keys>
struct Fetch {
  const char* const* rows;
  std::int64_t bytes;
  void operator()(std::int64_t word) const {
    const std::int64_t at = word * bytes;
#pragma GCC unroll 12
    for (int m = 0; m < Keys; ++m) __builtin_prefetch(rows[m] + at, 0, 2);
  }
};

// sums[m][j] += key row m . vector j of a panel of queries; beside(w) is done before each line of words w and up.
template <class M, int Keys, int V, class Beside>
inline void dots(const char* const* keys, const Word* queries, std::int64_t words, F (&sums)[Keys][V], const Beside& beside) {
  for (std::int64_t w = 0; w < words;) {
    const std::int64_t end = w + kLine < words ? w + kLine : words;
    beside(w);
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

// to[i] = the sum of vector i, for kLanes of them.
inline void totals(const F* v, float* to) {
#if defined(__AVX512F__)
  const auto half = [](__m512 a, __m512 b) { return (__m512)((F)a + (F)b); };
  // Where vector i begins, so that it ends at lane i: the two lower bits of i swapped, and the two upper.
  const auto at = [&](int i) { return (__m512)v[(i & 1) << 1 | (i & 2) >> 1 | (i & 4) << 1 | (i & 8) >> 1]; };
  __m512 t[8], u[4], x[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    t[i] = half(_mm512_maskz_shuffle_f32x4(0xffff, at(i), at(i + 8), 0x44), _mm512_maskz_shuffle_f32x4(0xffff, at(i), at(i + 8), 0xee));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    u[i] = half(_mm512_maskz_shuffle_f32x4(0xffff, t[i], t[i + 4], 0x88), _mm512_maskz_shuffle_f32x4(0xffff, t[i], t[i + 4], 0xdd));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    x[i] = half(_mm512_maskz_shuffle_ps(0xffff, u[i], u[i + 2], 0x44), _mm512_maskz_shuffle_ps(0xffff, u[i], u[i + 2], 0xee));
  store(to, (F)half(_mm512_maskz_shuffle_ps(0xffff, x[0], x[1], 0x88), _mm512_maskz_shuffle_ps(0xffff, x[0], x[1], 0xdd)));
#elif defined(__AVX2__)
  const auto four = [&](int i) {
    return _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[i], (__m256)v[i + 1]), _mm256_hadd_ps((__m256)v[i + 2], (__m256)v[i + 3]));
  };
  const __m256 a = four(0), b = four(4);
  store(to, (F)_mm256_permute2f128_ps(a, b, 0x20) + (F)_mm256_permute2f128_ps(a, b, 0x31));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = total(v[i]);
#endif
}

// For few heads, lanes are words, of some keys at a time: as lanes for heads, most would be padding.
constexpr int kFew = 4, kFewKeys = kLanes / kFew;

// Words `from` and up of the rows queries[head], which are `all` words, from rows of `words` words that are `stride` bytes
// apart. What pads them is zeros: of a whole vector the last words, and heads.
inline void pack_few(const char* rows, std::ptrdiff_t stride, std::int64_t count, std::int64_t words, std::int64_t from,
                     std::int64_t all, Word* queries) {
  for (std::int64_t h = 0; h < kFew; ++h) {
    Word* const to = queries + h * all + from;
    for (std::int64_t w = h < count ? words : 0; w < up(words, kLanes); ++w) to[w] = 0;
    if (h < count) std::memcpy(to, rows + h * stride, words * sizeof(Word));
  }
}

// sums[m * kFew + h] += key row m . query row h, lane by lane; beside(w) is done before each line of words w and up.
template <class M, class Beside>
inline void dots_of_few(const char* const* keys, const Word* queries, std::int64_t all, std::int64_t words, F (&sums)[kLanes],
                        const Beside& beside) {
  for (std::int64_t w = 0; w < words; w += kLanes) {
    if (w % kLine == 0) beside(w);
    U q[kFew];
#pragma GCC unroll 4
    for (int h = 0; h < kFew; ++h) q[h] = load_raw<U>(queries + h * all + w);
#pragma GCC unroll 4
    for (int m = 0; m < kFewKeys; ++m) {
      const char* const at = keys[m] + w * sizeof(Word);
      U x{};
      if (words - w >= kLanes)
        x = load_raw<U>(at);
      else
        std::memcpy(&x, at, (words - w) * sizeof(Word));
#pragma GCC unroll 4
      for (int h = 0; h < kFew; ++h) sums[m * kFew + h] = M::add(sums[m * kFew + h], x, q[h]);
    }
  }
}

}  // namespace
}  // namespace porthal
