// Loops of the selection of the greatest scores, and topk.
#include "selection.hpp"

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
constexpr std::uint32_t kLowestKey = 0x007fffff;  // of -inf

// The score of a key, for comparing: what is >= it has a key >= that key, where that is above the lowest.
inline float score_of(std::uint32_t key) {
  const std::uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float score;
  std::memcpy(&score, &bits, sizeof score);
  return score;
}

// Of one vector, writes what the mask has of x and y beside each other, and says how many.
#if defined(__AVX512F__)
typedef __mmask16 Mask;
inline Mask reaches(F v, F least) { return _mm512_cmp_ps_mask((__m512)v, (__m512)least, _CMP_GE_OQ); }
inline Mask mask_of(I m) { return _mm512_movepi32_mask((__m512i)m); }
inline Mask first_lanes(std::size_t n) { return n < kLanes ? (1u << n) - 1 : 0xffff; }
inline std::size_t write(Mask mask, U x, U y, std::uint32_t* to_x, std::uint32_t* to_y) {
  // Compress in a register, then store it whole: a compressing store is microcoded on Zen 4.
  _mm512_storeu_si512(to_x, _mm512_maskz_compress_epi32(mask, (__m512i)x));
  _mm512_storeu_si512(to_y, _mm512_maskz_compress_epi32(mask, (__m512i)y));
  return __builtin_popcount(mask);
}
#else
typedef std::uint32_t Mask;
inline Mask mask_of(I m) {
#if defined(__AVX2__)
  return _mm256_movemask_ps((__m256)m);
#else
  Mask mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= (m[i] & 1u) << i;
  return mask;
#endif
}
inline Mask reaches(F v, F least) { return mask_of(v >= least); }
inline Mask first_lanes(std::size_t n) { return n < kLanes ? (1u << n) - 1 : (1u << kLanes) - 1; }
#if defined(__AVX2__)
// The lanes of each mask, in order.
struct Lanes {
  std::uint8_t of[256][8];
  constexpr Lanes() : of{} {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, n = 0; lane < 8; ++lane)
        if (mask >> lane & 1) of[mask][n++] = static_cast<std::uint8_t>(lane);
  }
};
constexpr Lanes kLanesOf;

inline std::size_t write(Mask mask, U x, U y, std::uint32_t* to_x, std::uint32_t* to_y) {
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOf.of[mask])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_x), _mm256_permutevar8x32_epi32((__m256i)x, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_y), _mm256_permutevar8x32_epi32((__m256i)y, lanes));
  return __builtin_popcount(mask);
}
#else
inline std::size_t write(Mask mask, U x, U y, std::uint32_t* to_x, std::uint32_t* to_y) {
  std::size_t n = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to_x[n] = x[lane];
    to_y[n] = y[lane];
    n += mask >> lane & 1;
  }
  return n;
}
#endif
#endif

inline U lanes_from(std::uint32_t first) {
  U lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = first + i;
  return lane;
}

constexpr std::size_t kAhead = 512;  // scores that are fetched before they are read

template <class T>
std::size_t collect(const T* scores, std::size_t n, std::uint32_t threshold, std::uint32_t first, std::uint32_t* keys,
                    std::uint32_t* positions) {
  const bool all = threshold <= kLowestKey;
  const F least = F{} + score_of(threshold);
  std::size_t found = 0, i = 0;
  U position = lanes_from(first);
  for (; i + kLanes <= n; i += kLanes, position += kLanes) {
    __builtin_prefetch(scores + i + kAhead);
    const F v = load(scores + i);
    found += write(all ? first_lanes(kLanes) : reaches(v, least), (U)v, position, keys + found, positions + found);
  }
  if (i < n) {
    const F v = load_some(scores + i, n - i);
    found += write((all ? first_lanes(kLanes) : reaches(v, least)) & first_lanes(n - i), (U)v, position, keys + found, positions + found);
  }
  for (i = 0; i < found; i += kLanes) {
    const U key = order_keys(load_raw<F>(keys + i));
    std::memcpy(keys + i, &key, sizeof key);
  }
  return found;
}

std::size_t keep(std::uint32_t* keys, std::uint32_t* positions, std::size_t n, std::uint32_t edge, std::size_t ties) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < n; i += kLanes) {
    const U key = load_raw<U>(keys + i), position = load_raw<U>(positions + i);
    const Mask there = first_lanes(n - i);
    Mask equal = mask_of((I)(key == edge)) & there;
    while (static_cast<std::size_t>(__builtin_popcount(equal)) > ties) equal &= ~(1u << (31 - __builtin_clz(equal)));
    ties -= __builtin_popcount(equal);
    kept += write((mask_of((I)(key > edge)) & there) | equal, key, position, keys + kept, positions + kept);
  }
  return kept;
}

std::size_t between(const std::uint32_t* keys, std::size_t n, std::uint32_t low, std::uint32_t high, std::uint32_t* to) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < n; i += kLanes) {
    const U key = load_raw<U>(keys + i);
    const Mask mask = mask_of((I)(key >= low) & (I)(key <= high)) & first_lanes(n - i);
    kept += write(mask, key, key, to + kept, to + kept);
  }
  return kept;
}

void range(const std::uint32_t* keys, std::size_t n, std::uint32_t* low, std::uint32_t* high) {
  U least = U{} + keys[0], most = least;
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const U key = load_raw<U>(keys + i);
    least = key < least ? key : least;
    most = key > most ? key : most;
  }
  *low = *high = keys[0];
  for (int j = 0; j < kLanes; ++j) {
    *low = least[j] < *low ? least[j] : *low;
    *high = most[j] > *high ? most[j] : *high;
  }
  for (; i < n; ++i) {
    *low = keys[i] < *low ? keys[i] : *low;
    *high = keys[i] > *high ? keys[i] : *high;
  }
}

template <class T>
constexpr SelectLoops<T> loops() {
  return {collect<T>, keep, between, range};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<SelectLoops>, select_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include <limits>

#include "bind.hpp"
#include "threads.hpp"

namespace porthal {
namespace {

template <class T>
void run(const Matrix& scores, const Matrix& length, std::int64_t k, std::int32_t* indices) {
  const std::int64_t chunk = std::max<std::int64_t>(1, 16384 / (scores.columns + 1));
  parallel_for(scores.rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    thread_local Candidates<T> candidates;
    thread_local std::vector<T> copy;
    candidates.use(select_loops(isa()).of(static_cast<const T*>(nullptr)));
    for (std::int64_t t = begin; t < end; ++t) {
      const T* const row = scores.dense_row<T>(t, copy);
      const std::int64_t n = length.at<std::int32_t>(0, t), wanted = std::min(n, k);
      const std::uint32_t threshold = candidates.guess(row, n, wanted);
      candidates.begin(wanted, threshold);
      candidates.add(row, n, 0);
      if (static_cast<std::int64_t>(candidates.count()) < wanted) {  // the guess was too high
        candidates.begin(wanted);
        candidates.add(row, n, 0);
      }
      std::int32_t* const to = indices + t * k;
      std::fill(to + candidates.finish(to), to + k, -1);
    }
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
           "indices[T, k] int32 = positions of the min(k, length) greatest of scores[t, :length[t]], ascending, of equal\n"
           "scores the first; the rest is -1. NaN counts as -inf, -0 as 0.")

}  // namespace porthal
#endif
