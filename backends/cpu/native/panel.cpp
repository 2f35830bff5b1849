// Where all products with packed weights are computed.
#include "panel.hpp"

#include <type_traits>

#include "simd.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 12;  // kTileRows * 2 sums stay in registers
#else
constexpr int kTileRows = 6;
#endif
constexpr int kHalf = 2 * kLanes, kPanel = 2 * kHalf;
// Up to kTileRows rows read a panel as one stream, which the hardware fetches ahead best. More pass over it in blocks: in
// tiles of one half, or of both where rows are many enough to hide the fetching of the next block.
constexpr std::int64_t kWideRows = kTileRows == 12 ? 21 : INT64_MAX;
constexpr std::int64_t kSteps = kTileRows == 12 ? 64 : 256, kWideSteps = 256;  // in depth of a block
constexpr std::int64_t kJump = 32;                     // cache lines of the next panel that a stream fetches

#if defined(__AMX_BF16__)
constexpr bool kPagesEndStreams = true;  // Intel's; on Zen 4 the same costs 20 to 45 %
#else
constexpr bool kPagesEndStreams = false;
#endif

inline F load(const Upper* p) { return load(&p->half); }

// One step in depth of a tile: sums += a[m] * the panel's next group. Vectors 2 and 3 are those of the second half.
template <class T, int Rows, int Vectors>
inline void step(const Row<T>* const* a, const T* panel, std::int64_t apart, std::int64_t k, F (&sums)[Rows][Vectors]) {
  const T* at[Vectors];
  for (int j = 0; j < Vectors; ++j) at[j] = panel + j / 2 * apart + j % 2 * kLanes * kGroup<T>;
  if constexpr (kGroup<T> == 1) {
    F b[Vectors];
    for (int j = 0; j < Vectors; ++j) b[j] = load(at[j]);
    for (int m = 0; m < Rows; ++m)
      for (int j = 0; j < Vectors; ++j) sums[m][j] += a[m][k] * b[j];
  } else {
#if defined(__AVX512BF16__)
    __m512bh b[Vectors];
    for (int j = 0; j < Vectors; ++j) b[j] = (__m512bh)_mm512_loadu_si512(at[j]);
    for (int m = 0; m < Rows; ++m) {
      std::int32_t pair;
      std::memcpy(&pair, a[m] + k, sizeof pair);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      for (int j = 0; j < Vectors; ++j) sums[m][j] = (F)_mm512_dpbf16_ps((__m512)sums[m][j], x, b[j]);
    }
#else
    for (int odd = 0; odd < 2; ++odd) {
      F b[Vectors];
      for (int j = 0; j < Vectors; ++j) {
        if (odd) asm("" : "+r"(at[j]));  // read again: kept in a register it would cost one that sums need
        const U pairs = load_raw<U>(at[j]);
        b[j] = (F)(odd ? pairs & 0xffff0000u : pairs << 16);
      }
      for (int m = 0; m < Rows; ++m)
        for (int j = 0; j < Vectors; ++j) sums[m][j] += a[m][k + odd] * b[j];
    }
#endif
  }
}

// out += a[Rows][begin:end] . half (from 0 at begin = 0); panel is where that begins. Fetches a cache line at `next` in each of
// the first `lines` steps. A stream for many rows helps the hardware: into L2 a line of the half far ahead, in every second
// step; any stream does where the hardware's end with a page, with every line.
template <class T, int Rows, int Vectors, bool Stream = false>
void tile(const Row<T>* const* a, const T* panel, std::int64_t apart, std::int64_t begin, std::int64_t end, float* out,
          const char* next, std::int64_t lines) {
  constexpr int kStepBytes = kHalf * kGroup<T> * sizeof(T);
  F sums[Rows][Vectors];
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sums[m][j] = begin ? load(out + m * kPanel + j * kLanes) : F{};
  std::int64_t k = begin;
  for (; lines > 0 && k < end; --lines, next += 64, k += kGroup<T>, panel += kHalf * kGroup<T>) {
    __builtin_prefetch(next);
    step<T, Rows, Vectors>(a, panel, apart, k, sums);
  }
  for (; k < end; k += kGroup<T>, panel += kHalf * kGroup<T>) {
    if (Stream && (kPagesEndStreams || (Rows >= 8 && !(k & kGroup<T>))))
      for (int j = 0; j < Vectors; j += 2)
        for (int at = 0; at < (kPagesEndStreams ? kStepBytes : 64); at += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(panel + j / 2 * apart) + 4096 + at, 0, 2);
    step<T, Rows, Vectors>(a, panel, apart, k, sums);
  }
#pragma GCC unroll 16
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(out + m * kPanel + j * kLanes, sums[m][j]);
}

template <class T>
using Tile = decltype(&tile<T, 1, 2>);

template <class T, bool Stream>
constexpr Tile<T> kTiles[] = {
  tile<T, 1, 2, Stream>,  tile<T, 2, 2, Stream>,  tile<T, 3, 2, Stream>, tile<T, 4, 2, Stream>,
  tile<T, 5, 2, Stream>,  tile<T, 6, 2, Stream>,
#if defined(__AVX512F__) || defined(__aarch64__)
  tile<T, 7, 2, Stream>,  tile<T, 8, 2, Stream>,  tile<T, 9, 2, Stream>, tile<T, 10, 2, Stream>,
  tile<T, 11, 2, Stream>, tile<T, 12, 2, Stream>,
#endif
};

// Rows in tiles of nearly equal height over depth [begin, end) of one half, or of both (apart > 0); they share in fetching
// what is read next, `bytes` of each half.
template <class T>
void pass(const Row<T>* const* a, std::int64_t rows, std::int64_t most, const T* half, std::int64_t apart,
          std::int64_t begin, std::int64_t end, const char* next, const char* next_second, std::int64_t bytes, float* sums) {
  const std::int64_t tiles = (rows + most - 1) / most;
  const std::int64_t steps = (end - begin) / kGroup<T>;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t first = rows * t / tiles, height = rows * (t + 1) / tiles - first;
    std::int64_t at = t * steps * 64;
    const char* fetched = next;
    if (apart && at >= bytes) at -= bytes, fetched = next_second;
    const std::int64_t lines = fetched && at < bytes ? (bytes - at + 63) / 64 : 0;
    Tile<T> run = kTiles<T, false>[(height - 1) % kTileRows];
#if defined(__AVX512F__) || defined(__aarch64__)
    if (apart) run = height == 6 ? tile<T, 6, 4> : height == 5 ? tile<T, 5, 4> : tile<T, 4, 4>;
#endif
    run(a + first, half, apart, begin, end, sums + first * kPanel, lines ? fetched + at : nullptr, lines);
  }
}

// A block of a half as many rows read it: that of Upper is widened, to `space`.
template <class T>
const T* block_of(const T* half, std::int64_t, float*) {
  return half;
}
const float* block_of(const Upper* half, std::int64_t count, float* space) {
  for (std::int64_t i = 0; i < count; i += kLanes) store(space + i, load(half + i));
  return space;
}

template <class T>
void multiply_one(const Row<T>* const* a, std::int64_t count, const T* panel, std::int64_t depth, std::int64_t used,
                  const T* following, float* sums) {
  const std::int64_t apart = depth * kHalf, halves = used > kHalf ? 2 : 1;
  const auto bytes = [](const T* p) { return reinterpret_cast<const char*>(p); };
  // The sums of a few rows of one half are too few to hide how long an addition takes.
  if constexpr (kTileRows < 12 || kGroup<T> * sizeof(T) < 4) {
    constexpr Tile<T> kBoth[] = {tile<T, 1, 4, true>, tile<T, 2, 4, true>, tile<T, 3, 4, true>};
    if (count <= 3 && halves == 2)
      return kBoth[count - 1](a, panel, apart, 0, depth, sums, bytes(following), following ? kJump : 0);
  }
  if (count <= kTileRows) {
    for (std::int64_t h = 0; h < halves; ++h) {
      const bool last = following && h + 1 == halves;  // the hardware needs a while to follow where the stream jumps to
      kTiles<T, true>[count - 1](a, panel + h * apart, 0, 0, depth, sums + h * kHalf, bytes(following), last ? kJump : 0);
    }
    return;
  }
  const bool wide = count >= kWideRows && halves == 2;
  const std::int64_t block = (wide ? kWideSteps : kSteps) * kGroup<T>;
  alignas(64) float space[std::is_same_v<T, Upper> ? kWideSteps * kPanel : 1];
  for (std::int64_t h = 0; h < (wide ? 1 : halves); ++h)
    for (std::int64_t k = 0, end; k < depth; k = end) {
      end = k + block < depth ? k + block : depth;
      const T* const half = panel + h * apart + k * kHalf;
      const std::int64_t count_of_half = (end - k) * kHalf, fetched = count_of_half * sizeof(T);
      const T* const next = end < depth || (h + 1 < halves && !wide) ? half + count_of_half : following;
      const auto* const first = block_of(half, count_of_half, space);
      if (wide) {
        const auto* const second = block_of(half + apart, count_of_half, space + count_of_half);
        pass(a, count, 6, first, second - first, k, end, bytes(next), next ? bytes(next + apart) : nullptr, fetched, sums);
      } else {
        pass(a, count, kTileRows, first, 0, k, end, bytes(next), nullptr, fetched, sums + h * kHalf);
      }
    }
}

template <class T>
void multiply(const void* const* rows, std::int64_t count, const void* at, std::int64_t panels, std::int64_t depth,
              std::int64_t used, const void* following, float* sums) {
  const T *panel = static_cast<const T*>(at), *const then = static_cast<const T*>(following);
  for (; panels; --panels, panel += depth * kPanel, sums += count * kPanel)
    multiply_one(reinterpret_cast<const Row<T>* const*>(rows), count, panel, depth, panels > 1 ? kPanel : used,
                 panels > 1 ? panel + depth * kPanel : then, sums);
}

#if defined(__AMX_BF16__)
// Few rows read each half of a panel as one stream, fetched from a little ahead. More pass over blocks in depth, of one half
// after the other: their sums and their part of the block stay in L2, and the half's block in L1.
constexpr std::int64_t kFewRows = 2 * kTile, kManyRows = 128, kAhead = 8192;

void multiply(const void* const* rows, std::int64_t count, const void* panel, std::int64_t panels, std::int64_t depth,
              std::int64_t used, const void* following, float* sums) {
  constexpr std::int64_t kPair = kHalf * 4, kStep = kTile * kPair;  // bytes of a half's pair of rows, and of a step in depth
  constexpr std::int64_t kRow = kPanel * sizeof(float);             // bytes of a row of sums
  const char* const a = static_cast<const char*>(rows[0]);
  const std::int64_t stride = count > 1 ? static_cast<const char*>(rows[1]) - a : 64;
  const std::int64_t words = depth / 2, whole = words / kTile * kTile, halves = 2 * panels - (used > kHalf ? 0 : 1);
  const std::int64_t tiles = (count + kFewRows - 1) / kFewRows, half_bytes = words * kPair;
  const std::int64_t block = tiles == 1 ? whole : count < kManyRows ? 16 * kTile : 8 * kTile;
  const char* const weights = static_cast<const char*>(panel);
  const char* const then = static_cast<const char*>(following ? following : panel);
  Tiles sum;
  for (std::int64_t k = 0, end; k < words; k = end) {
    const std::int64_t step = k < whole ? kTile : words - whole;  // what is left of the depth is a step of its own
    end = k == whole ? words : k + block < whole ? k + block : whole;
    for (std::int64_t h = 0; h < halves; ++h) {
      const char* const half = weights + h * half_bytes + k * kPair;
      const char *next = half + kAhead, *jump = weights + halves * half_bytes;  // where fetching goes on with what follows
      if (tiles > 1) {
        next = h + 1 < halves ? half + half_bytes : end < words ? weights + end * kPair : then;
        jump = nullptr;
      }
      const std::int64_t lines = (kStep / 64 + tiles - 1) / tiles;
      const auto fetch = [&] {
        for (std::int64_t i = 0; i < lines; ++i, next += 64) {
          if (next == jump) next = then;
          __builtin_prefetch(next, 0, 2);
        }
      };
      for (std::int64_t i = 0; i < tiles; ++i) {  // to and fro, so that the shape changes once in a half
        const std::int64_t m = (h % 2 ? tiles - 1 - i : i) * kFewRows;
        float* const to = sums + (h / 2 * count + m) * kPanel + h % 2 * kHalf;
        sum.shape(count - m < kFewRows ? count - m : kFewRows, kHalf, step);
        if (k)
          sum.load(to, kRow);
        else
          sum.zero();
        sum.add(a + m * stride + k * 4, stride, half, kPair, (end - k) / step, fetch);
        sum.store(to, kRow);
      }
    }
  }
}
#endif

template <class T>
void ready(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row) {
  Row<T>* const to = static_cast<Row<T>*>(row);
  const bool dense = step == sizeof(T);
  std::int64_t i = 0;
  if constexpr (std::is_same_v<T, Row<T>>) {
    if (dense) {
      std::memcpy(to, x, n * sizeof(T));
      i = n;
    }
    for (; i < n; ++i) std::memcpy(to + i, x + i * step, sizeof(T));
  } else {
    for (; i < n; i += kLanes) {
      const std::int64_t some = n - i < kLanes ? n - i : kLanes;
      T part[kLanes] = {};
      if (dense)
        std::memcpy(part, x + i * sizeof(T), some * sizeof(T));
      else
        for (std::int64_t j = 0; j < some; ++j) std::memcpy(part + j, x + (i + j) * step, sizeof(T));
      const F wide = load(part);
      std::memcpy(to + i, &wide, some * sizeof(float));
    }
  }
  for (i = n; i < depth; ++i) to[i] = Row<T>{};
}

template <class T>
void store(const float* sums, std::int64_t count, std::int64_t used, T* y, std::int64_t stride) {
  for (std::int64_t m = 0; m < count; ++m, sums += kPanel, y += stride) {
    std::int64_t i = 0;
    for (; i + kLanes <= used; i += kLanes) store(y + i, load(sums + i));
    if (i < used) store_some(y + i, load(sums + i), used - i);
  }
}

// Words [r][c] to [c][r], in a butterfly of exchanges between rows 1, 2, 4 ... apart.
inline void transpose(U (&v)[kLanes]) {
#pragma GCC unroll 8
  for (int h = 1; h < kLanes; h *= 2) {
    U low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & h ? kLanes + i - h : i;
      high[i] = i & h ? kLanes + i : i + h;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r)
      if (!(r & h)) {
        const U a = v[r], b = v[r + h];
        v[r] = __builtin_shuffle(a, b, low);
        v[r + h] = __builtin_shuffle(a, b, high);
      }
  }
}

// A line of packed words. Nobody reads them soon, so where they fill a cache line it is not read before it is written.
inline void write(void* to, U words) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)words);
#else
  std::memcpy(to, &words, sizeof words);
#endif
}

// float and pairs of bf16 are words; fp16 is read in pairs and parted. Too many rows for the hardware to fetch ahead. P is
// what is written: T, or Upper, for which the lower halves must be zero.
template <class T, class P = T>
bool pack(const T* const* rows, std::int64_t n, void* half) {
  constexpr std::int64_t kWord = 4 / sizeof(T), kColumns = kLanes * kWord;
  U lost = {};
  for (std::int64_t k = 0; k < n; k += kColumns) {
    const std::int64_t some = n - k < kColumns ? n - k : kColumns;
    for (int part = 0; part < 2; ++part) {
      U v[kLanes];
      if (some == kColumns)
        for (int r = 0; r < kLanes; ++r) {
          const T* const from = rows[part * kLanes + r] + k;
          __builtin_prefetch(reinterpret_cast<const char*>(from) + 512, 0, 2);
          v[r] = load_raw<U>(from);
          if (std::is_same_v<P, Upper>) lost |= v[r] & 0xffffu;
        }
      else
        for (int r = 0; r < kLanes; ++r) {
          v[r] = U{};
          std::memcpy(&v[r], rows[part * kLanes + r] + k, some * sizeof(T));
          if (std::is_same_v<P, Upper>) lost |= v[r] & 0xffffu;
        }
      transpose(v);
      P* const to = static_cast<P*>(half) + k * kHalf + part * kLanes * kGroup<T>;
      for (std::int64_t c = 0; c * kWord < some; ++c)
        if constexpr (std::is_same_v<P, Upper>) {
          const S upper = narrow(v[c] >> 16);
          std::memcpy(to + c * kHalf, &upper, sizeof upper);
        } else if constexpr (kGroup<T> * sizeof(T) == 4) {
          write(to + c * kHalf * kGroup<T>, v[c]);
        } else {
          const S first = narrow(v[c] & 0xffffu), second = narrow(v[c] >> 16);
          std::memcpy(to + 2 * c * kHalf, &first, sizeof first);
          if (2 * c + 1 < some) std::memcpy(to + (2 * c + 1) * kHalf, &second, sizeof second);
        }
    }
  }
#if defined(__AVX512F__)
  _mm_sfence();
#endif
  return !any((I)(lost != 0));
}

template <class T>
constexpr PanelLoops<T> loops() {
  return {kPanel, sizeof(Row<T>), 192, 1, ready<T>, multiply<T>, store<T>, pack<T>, nullptr, nullptr};
}

template <>
constexpr PanelLoops<float> loops<float>() {
  return {kPanel, sizeof(float), 192, 1, ready<float>, multiply<float>, store<float>, pack<float>, multiply<Upper>,
          pack<float, Upper>};
}

#if defined(__AMX_BF16__)
template <>
constexpr PanelLoops<bf16> loops<bf16>() {
  return {kPanel, sizeof(bf16), kMostRows, 8, ready<bf16>, multiply, store<bf16>, pack<bf16>, nullptr, nullptr};
}
#endif

}  // namespace

PORTHAL_LOOPS(PerFloat<PanelLoops>, panel_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
