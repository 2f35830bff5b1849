// The inner loop of every product with packed weights: rows of activations times one panel of output columns.
#pragma once

#include "simd.hpp"

namespace porthal {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 3;
#endif
constexpr int kVectors = 4;  // vectors across a panel; kTileRows * kVectors sums stay in registers
constexpr int kPanel = kLanes * kVectors;
// A panel block of this depth stays in L1 while all rows pass over it: short for few rows, where memory decides.
constexpr std::int64_t kShortBlock = 128, kLongBlock = 256;
constexpr std::int64_t kStreamRows = 3;  // up to so many rows, computing hides behind reading

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

}  // namespace
}  // namespace porthal
