// One source, compiled once per instruction set with PORTHAL_ISA naming it. Everything but the final table is internal
// and no standard template is instantiated here, so that no AVX code can replace an inline function of the baseline.
#include "kernels.hpp"

#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace porthal {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 6;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kTileRows = 3;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 6;
#else
constexpr int kLanes = 4, kTileRows = 3;
#endif
constexpr int kVectors = 4;  // vectors across a panel; kTileRows * kVectors sums stay in registers
constexpr int kPanel = kLanes * kVectors;
// A panel block of this depth stays in L1 while all rows pass over it: short for few rows, where memory decides.
constexpr std::int64_t kShortBlock = 128, kLongBlock = 256;
constexpr std::int64_t kStreamRows = 3;  // up to so many rows, computing hides behind reading

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t S __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
inline V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Written out where GCC would split a __builtin_convertvector into halves; masked, as the plain ones warn in GCC 12.
inline U widen(S s) {
#if defined(__AVX512F__)
  return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)s);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)s);
#else
  return __builtin_convertvector(s, U);
#endif
}
inline S narrow(U u) {
#if defined(__AVX512F__)
  return (S)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
#else
  return __builtin_convertvector(u, S);
#endif
}

inline F load(const float* p) { return load_raw<F>(p); }
inline F load(const bf16* p) { return (F)(widen(load_raw<S>(p)) << 16); }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
// Round to nearest even; a NaN stays a (quiet) NaN. Not vcvtneps2bf16: that one flushes subnormals.
inline void store(bf16* p, F v) {
  const U u = (U)v, nan = (U)(v != v);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  const S s = narrow((rounded & ~nan) | (quiet & nan));
  std::memcpy(p, &s, sizeof s);
}

template <class T>
inline F load_some(const T* p, std::int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* p, F v, std::int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

inline float total(F v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

template <class T, class W>
void rms_norm(const T* x, const W* weight, T* y, std::int64_t n, float eps) {
  F squares[4] = {};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) {
      const F v = load(x + i + j * kLanes);
      squares[j] += v * v;
    }
  for (; i + kLanes <= n; i += kLanes) squares[0] += load(x + i) * load(x + i);
  if (i < n) {
    const F v = load_some(x + i, n - i);
    squares[0] += v * v;
  }
  const float mean = total((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  const float scale = 1.0f / __builtin_sqrtf(mean + eps);
  for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_some(y + i, load_some(x + i, n - i) * scale * load_some(weight + i, n - i), n - i);
}

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

// One step in depth of a tile: sums[m][:] += a[m] * panel row.
template <int Rows>
inline void step(const float* const* a, const float* row, std::int64_t k, F (&sums)[Rows][kVectors]) {
  F b[kVectors];
  for (int j = 0; j < kVectors; ++j) b[j] = load(row + j * kLanes);
  for (int m = 0; m < Rows; ++m)
    for (int j = 0; j < kVectors; ++j) sums[m][j] += a[m][k] * b[j];
}

template <int Rows>
inline void step(const bf16* const* a, const bf16* row, std::int64_t k, F (&sums)[Rows][kVectors]) {
#if defined(__AVX512BF16__)
  __m512bh b[kVectors];
  for (int j = 0; j < kVectors; ++j) b[j] = (__m512bh)_mm512_loadu_si512(row + 2 * j * kLanes);
  for (int m = 0; m < Rows; ++m) {
    std::int32_t pair;
    std::memcpy(&pair, a[m] + k, sizeof pair);
    const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
    for (int j = 0; j < kVectors; ++j) sums[m][j] = (F)_mm512_dpbf16_ps((__m512)sums[m][j], x, b[j]);
  }
#else
  float low[Rows], high[Rows];
  for (int m = 0; m < Rows; ++m) {
    const std::uint32_t first = static_cast<std::uint32_t>(a[m][k].bits) << 16;
    const std::uint32_t second = static_cast<std::uint32_t>(a[m][k + 1].bits) << 16;
    std::memcpy(&low[m], &first, 4);
    std::memcpy(&high[m], &second, 4);
  }
  for (int j = 0; j < kVectors; ++j) {
    const U pairs = load_raw<U>(row + 2 * j * kLanes);
    const F first = (F)(pairs << 16), second = (F)(pairs & 0xffff0000u);
    for (int m = 0; m < Rows; ++m) {
      sums[m][j] += low[m] * first;
      sums[m][j] += high[m] * second;
    }
  }
#endif
}

// out = (begin ? out : 0) + a[Rows][begin:end] . panel; fetches `ahead` cache lines per step from `next` on.
template <class T, int Rows>
void tile(const T* const* a, const T* panel, std::int64_t begin, std::int64_t end, float* out, const char* next,
          int ahead) {
  F sums[Rows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sums[m][j] = begin ? load(out + m * kPanel + j * kLanes) : F{};
  if (ahead == 0) {
    for (std::int64_t k = begin; k < end; k += kGroup<T>) step<Rows>(a, panel + k * kPanel, k, sums);
  } else {
    for (std::int64_t k = begin; k < end; k += kGroup<T>) {
      for (int line = 0; line < ahead; ++line, next += 64) __builtin_prefetch(next);
      step<Rows>(a, panel + k * kPanel, k, sums);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(out + m * kPanel + j * kLanes, sums[m][j]);
}

template <class T>
void multiply(const T* const* a, std::int64_t rows, const T* panel, std::int64_t depth, const T* following,
              float* sums) {
  constexpr decltype(&tile<T, 1>) kTiles[] = {
    tile<T, 1>, tile<T, 2>, tile<T, 3>,
#if defined(__AVX512F__) || defined(__aarch64__)
    tile<T, 4>, tile<T, 5>, tile<T, 6>,
#endif
  };
  static_assert(sizeof kTiles / sizeof *kTiles == kTileRows, "one tile per row count");
  const std::int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  // Few rows read the panel as one stream, which the hardware fetches ahead best. With more, memory would idle while
  // later tiles compute on the block in L1: the tiles share in fetching the next block, in address order.
  const bool stream = rows <= kStreamRows;
  const std::int64_t block = stream ? depth : tiles < 4 ? kShortBlock : kLongBlock;
  constexpr int kLines = kPanel * 4 / 64;
  const int share = tiles >= kLines ? 1 : kLines / static_cast<int>(tiles);
  for (std::int64_t k = 0; k < depth; k += block) {
    const std::int64_t end = k + block < depth ? k + block : depth, steps = (end - k) / kGroup<T>;
    const char* const next = reinterpret_cast<const char*>(end < depth ? panel + end * kPanel : following);
    for (std::int64_t t = 0; t < tiles; ++t) {  // tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2
      const std::int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
      const int ahead = !stream && next && t * share < kLines ? share : 0;
      kTiles[height - 1](a + first, panel, k, end, sums + first * kPanel,
                         ahead ? next + t * share * steps * 64 : nullptr, ahead);
    }
  }
}

// exp with about 1 ulp of error between the clamps; NaN passes through.
inline F exp(F x) {
  x = x > 88.3f ? F{} + 88.3f : x;
  x = x < -87.3f ? F{} - 87.3f : x;
  const F shift = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = x * 1.44269504f + shift, n = shifted - shift;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (F)(((U)shifted + (127u - 0x4b400000u)) << 23);
}

template <class T>
void gate(const float* sums, std::int64_t rows, T* h, std::int64_t stride, std::int64_t columns) {
  for (std::int64_t m = 0; m < rows; ++m, sums += kPanel, h += stride)
    for (std::int64_t i = 0; i < columns; i += kLanes) {
      const F g = load(sums + i), up = load(sums + kPanel / 2 + i), v = g / (1.0f + exp(-g)) * up;
      if (columns - i >= kLanes)
        store(h + i, v);
      else
        store_some(h + i, v, columns - i);
    }
}

template <class T>
void combine(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, T* y,
             std::int64_t columns) {
  F out[kVectors] = {};
  for (std::int64_t j = 0; j < count; ++j)
    if (picks[j] >= 0)
      for (int v = 0; v < kVectors; ++v)
        out[v] += weights[j] * load(sums + static_cast<std::int64_t>(picks[j]) * kPanel + v * kLanes);
  for (int v = 0; v < kVectors && v * kLanes < columns; ++v)
    if (columns - v * kLanes >= kLanes)
      store(y + v * kLanes, out[v]);
    else
      store_some(y + v * kLanes, out[v], columns - v * kLanes);
}

template <class T>
constexpr Loops<T> loops() {
  return {rms_norm<T, T>, rms_norm<T, float>, collect<T>, multiply<T>, gate<T>, combine<T>};
}

}  // namespace

#define PORTHAL_STRING_(x) #x
#define PORTHAL_STRING(x) PORTHAL_STRING_(x)
#define PORTHAL_JOIN_(a, b) a##b
#define PORTHAL_JOIN(a, b) PORTHAL_JOIN_(a, b)

const Kernels PORTHAL_JOIN(kernels_, PORTHAL_ISA) = {PORTHAL_STRING(PORTHAL_ISA), kPanel, loops<float>(),
                                                     loops<bf16>()};

}  // namespace porthal
