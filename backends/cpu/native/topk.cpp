// Top-k of each row by radix selection on order-preserving 32-bit keys, exact for any input.
#include "isa.hpp"

namespace porthal {

template <class T>
struct KeyLoops {
  // Appends (key, index) of every score whose key is >= threshold, in index order, and returns how many.
  // keys and indices need kSlack elements of room beyond that.
  std::size_t (*collect)(const T* scores, std::size_t n, std::uint32_t threshold, std::uint32_t* keys,
                         std::uint32_t* indices);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

// Unsigned keys that order like the scores: NaN as -inf, -0 as +0.
inline U order_keys(F v) {
  const U nan = (U)(v != v), zero = (U)(v == 0.0f);
  const U u = (((U)v & ~nan) | (0xff800000u & nan)) & ~zero;
  return u ^ ((U)((I)u >> 31) | 0x80000000u);
}

template <class T>
std::size_t collect(const T* scores, std::size_t n, std::uint32_t threshold, std::uint32_t* keys,
                    std::uint32_t* indices) {
  std::size_t found = 0;
  for (std::size_t i = 0; i < n; i += kLanes) {
    const std::size_t some = n - i < kLanes ? n - i : kLanes;
    const U key = order_keys(some == kLanes ? load(scores + i) : load_some(scores + i, some));
#if defined(__AVX512F__)
    const __mmask16 valid = some == kLanes ? 0xffff : (1u << some) - 1;
    const __mmask16 keep = _mm512_mask_cmpge_epu32_mask(valid, (__m512i)key, _mm512_set1_epi32(threshold));
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(i)));
    // Compress in a register, then store it whole: a compressing store is microcoded on Zen 4.
    _mm512_storeu_si512(keys + found, _mm512_maskz_compress_epi32(keep, (__m512i)key));
    _mm512_storeu_si512(indices + found, _mm512_maskz_compress_epi32(keep, index));
    found += __builtin_popcount(keep);
#else
    for (std::size_t lane = 0; lane < some; ++lane) {
      keys[found] = key[lane];
      indices[found] = static_cast<std::uint32_t>(i + lane);
      found += key[lane] >= threshold;
    }
#endif
  }
  return found;
}

}  // namespace

PORTHAL_LOOPS(PerFloat<KeyLoops>, topk_loops) = {{collect<float>}, {collect<bf16>}, {collect<fp16>}};

}  // namespace porthal
#else
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "bind.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<KeyLoops>, topk_loops)

namespace {

constexpr std::size_t kSlack = 16;
constexpr int kBits = 11, kBins = 1 << kBits;

struct Space {
  std::vector<std::uint32_t> keys, indices, sample;
  std::vector<std::uint64_t> chosen, sorted;
};

int bit_width(std::uint32_t v) { return v ? 32 - __builtin_clz(v) : 0; }

// Writes the k greatest of n (key, index) pairs, of equal keys the first, as (~key, index), so that ascending order is
// the wanted one. Equal keys stay in the order in which they came. chosen needs room for one more.
void select(std::uint32_t* keys, std::uint32_t* indices, std::size_t n, std::size_t k, std::uint64_t* chosen) {
  const auto choose = [&](std::size_t i) { *chosen = static_cast<std::uint64_t>(~keys[i]) << 32 | indices[i]; };
  while (k < n) {  // each round keeps the pairs of one bin of the range that the keys span
    std::uint32_t low = ~0u, high = 0;
    for (std::size_t i = 0; i < n; ++i) {
      low = std::min(low, keys[i]);
      high = std::max(high, keys[i]);
    }
    if (low == high) break;
    const int shift = std::max(0, bit_width(high - low) - kBits);
    std::uint32_t counts[4][kBins] = {};  // four, because neighbours often fall into the same bin
    for (std::size_t i = 0; i < n; ++i) ++counts[i % 4][(keys[i] - low) >> shift];
    std::size_t above = 0;
    std::uint32_t edge = kBins - 1;
    for (;; --edge) {
      const std::size_t here = counts[0][edge] + counts[1][edge] + counts[2][edge] + counts[3][edge];
      if (above + here >= k) break;
      above += here;
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < n; ++i) {  // no branch: half of them would be mispredicted
      const std::uint32_t bin = (keys[i] - low) >> shift;
      choose(i);
      chosen += bin > edge;
      keys[kept] = keys[i];
      indices[kept] = indices[i];
      kept += bin == edge;
    }
    k -= above;
    n = kept;
  }
  for (std::size_t i = 0; i < k; ++i, ++chosen) choose(i);  // all that is left, or the first of equal keys
}

// Ascending by the upper 32 bits, stable: equal keys come in index order and stay so.
void sort_by_key(std::vector<std::uint64_t>& values, std::vector<std::uint64_t>& space) {
  if (values.size() <= 128) return std::sort(values.begin(), values.end());
  std::uint32_t low = ~0u, high = 0;
  for (const std::uint64_t v : values) {
    low = std::min(low, static_cast<std::uint32_t>(v >> 32));
    high = std::max(high, static_cast<std::uint32_t>(v >> 32));
  }
  space.resize(values.size());
  for (int shift = 0; shift < bit_width(high - low); shift += kBits) {
    const auto digit = [=](std::uint64_t v) {
      return ((static_cast<std::uint32_t>(v >> 32) - low) >> shift) & (kBins - 1);
    };
    std::uint32_t start[kBins] = {}, sum = 0;
    for (const std::uint64_t v : values) ++start[digit(v)];
    for (std::uint32_t& bin : start) {
      const std::uint32_t count = bin;
      bin = sum;
      sum += count;
    }
    for (const std::uint64_t v : values) space[start[digit(v)]++] = v;
    values.swap(space);
  }
}

// A key that about k of n scores reach, a little low, guessed from every stride-th score. Only speed depends on it.
template <class T>
std::uint32_t guess_threshold(const KeyLoops<T>& loops, const T* scores, std::size_t n, std::size_t k, Space& space) {
  constexpr std::size_t kSample = 1024;
  T picked[kSample];
  for (std::size_t i = 0; i < kSample; ++i) picked[i] = scores[i * n / kSample];
  space.sample.resize(2 * (kSample + kSlack));
  std::uint32_t *const keys = space.sample.data(), *const indices = keys + kSample + kSlack;
  loops.collect(picked, kSample, 0, keys, indices);
  const double expected = static_cast<double>(k) * kSample / n;
  const std::size_t rank = static_cast<std::size_t>(expected + 4 * std::sqrt(expected) + 4);
  std::uint64_t chosen[kSample + 1];
  select(keys, indices, kSample, rank, chosen);
  return ~static_cast<std::uint32_t>(*std::max_element(chosen, chosen + rank) >> 32);
}

template <class T>
void topk_row(const KeyLoops<T>& loops, const T* scores, std::size_t n, std::size_t k, std::int32_t* out, Space& space) {
  const std::size_t count = std::min(n, k);
  if (space.keys.size() < n + kSlack) {
    space.keys.resize(n + kSlack);
    space.indices.resize(n + kSlack);
  }
  std::uint32_t *keys = space.keys.data(), *indices = space.indices.data();
  std::size_t found = 0;
  if (n >= 8192 && k <= n / 4) {
    const std::uint32_t threshold = guess_threshold(loops, scores, n, k, space);
    found = loops.collect(scores, n, threshold, keys, indices);
  }
  if (found < count) found = loops.collect(scores, n, 0, keys, indices);
  space.chosen.resize(count + 1);
  select(keys, indices, found, count, space.chosen.data());
  space.chosen.resize(count);
  sort_by_key(space.chosen, space.sorted);
  for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<std::int32_t>(space.chosen[i] & 0xffffffffu);
  std::fill(out + count, out + k, -1);
}

template <class T>
void run(const Matrix& scores, const Matrix& length, std::int64_t k, std::int32_t* indices) {
  const KeyLoops<T>& loops = topk_loops(isa()).of(static_cast<const T*>(nullptr));
  const std::int64_t chunk = std::max<std::int64_t>(1, 16384 / (scores.columns + 1));
  parallel_for(scores.rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    thread_local Space space;
    thread_local std::vector<T> copy;
    for (std::int64_t t = begin; t < end; ++t)
      topk_row(loops, scores.dense_row<T>(t, copy), length.at<std::int32_t>(0, t), k, indices + t * k, space);
  });
}

void topk(const Array& scores, const Array& length, std::int64_t k, const Array& indices) {
  scores.is_float();
  length.has(Kind::i32);
  indices.has(Kind::i32);
  if (k < 0) refuse("k", "is " + std::to_string(k), "at least 0");
  const Matrix rows = scores.matrix(), valid = length.vector(rows.rows);
  if (rows.columns > std::numeric_limits<std::int32_t>::max())
    refuse("scores", "has " + std::to_string(rows.columns) + " columns", "positions that fit int32");
  for (std::int64_t t = 0; t < rows.rows; ++t)
    if (const std::int32_t n = valid.at<std::int32_t>(0, t); n < 0 || n > rows.columns)
      refuse("length", "has " + std::to_string(n) + " at " + std::to_string(t), "0 to " + std::to_string(rows.columns));
  auto* const out = static_cast<std::int32_t*>(indices.output({rows.rows, k}));
  with_float(scores.kind, [&](auto tag) { run<decltype(tag)>(rows, valid, k, out); });
}

}  // namespace

PORTHAL_OP(topk, "scores length k indices",
           "indices[T, k] int32 = positions of the min(k, length) greatest of scores[t, :length[t]], descending scores,\n"
           "ties by ascending position; the rest is -1. NaN counts as -inf, -0 as 0.")

}  // namespace porthal
#endif
