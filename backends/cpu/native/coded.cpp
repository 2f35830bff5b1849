// Products with codes, which are decoded a block at a time, into L1, or multiplied as they are. Sums are scaled in float32.
#include "coded.hpp"

#include <type_traits>

#include "codes.hpp"
#include "tiles.hpp"

namespace porthal {
namespace {

constexpr int kVectors = 4, kPanel = kVectors * kLanes;
constexpr std::int64_t kBlock = 128;  // of depth
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 2;
#endif
#if defined(__AMX_BF16__)
constexpr bool kHasTiles = true;  // and streams that end with a page, as in panel.cpp
#else
constexpr bool kHasTiles = false;
#endif

inline void fetch(const void* p) {
  if (kHasTiles) __builtin_prefetch(static_cast<const char*>(p) + 4096, 0, 2);
}

// -- what a word of a row is, and how it is multiplied with words of a block ---------------------------------------------

struct Singles {
  using Sum = F;
  static constexpr std::int64_t kPer = 1, kItem = 4;
  static F dot(F sum, const char* x, U b) {
    float one;
    std::memcpy(&one, x, sizeof one);
    return sum + one * (F)b;
  }
  static void put(char* row, F v, std::int64_t n) { std::memcpy(row, &v, n * sizeof(float)); }
};

#if defined(__AVX512BF16__)
struct Pairs {
  using Sum = F;
  static constexpr std::int64_t kPer = 2, kItem = 2;
  static F dot(F sum, const char* x, U b) {
    std::int32_t pair;
    std::memcpy(&pair, x, sizeof pair);
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  }
  static void put(char* row, F v, std::int64_t n) {
    if (n == kLanes)
      store(reinterpret_cast<bf16*>(row), v);
    else
      store_some(reinterpret_cast<bf16*>(row), v, n);
  }
};
#if defined(__AMX_BF16__)
struct TiledPairs : Pairs {};
using BestPairs = TiledPairs;
#else
using BestPairs = Pairs;
#endif
#else
using Pairs = Singles;
using BestPairs = Singles;
#endif

#if defined(__AVX512VNNI__)
// Of codes that are 128 more than they say, as the instruction takes one side without a sign.
struct Bytes {
  using Sum = I;
  static constexpr std::int64_t kPer = 4, kItem = 1;
  static I dot(I sum, const char* x, U b) {
    std::int32_t four;
    std::memcpy(&four, x, sizeof four);
    return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, _mm512_set1_epi32(four));
  }
  static void put(char* row, F v, std::int64_t n) {
    const B bytes = narrow((I)_mm512_maskz_cvtps_epi32(0xffff, (__m512)v));
    std::memcpy(row, &bytes, n);
  }
};
using BestBytes = Bytes;
#else
using BestBytes = Singles;
#endif

// Words of a panel as words of a block.
template <class Code, class Kind>
inline void decode(const std::uint32_t* from, std::int64_t units, std::uint32_t* to) {
  constexpr int kPart = form_of(Code::kCoding).unit / Kind::kPer;
  for (; units; --units, from += kPanel, to += kPart * kPanel)
    for (int j = 0; j < kVectors; ++j) {
      const U w = load_raw<U>(from + j * kLanes);
      fetch(from + j * kLanes);
      U said[kPart];
      if constexpr (Kind::kPer == 1)
        for (int i = 0; i < kPart; ++i) said[i] = (U)Code::number_of(w, i);
      else
        Code::pairs_of(w, said);
      for (int i = 0; i < kPart; ++i) std::memcpy(to + i * kPanel + j * kLanes, &said[i], sizeof said[i]);
    }
}

// -- rows ----------------------------------------------------------------------------------------------------------------

// Behind a row's codes its scales, NaN where a number is not finite; of bytes also what the 128 add to each of its products.
template <class X, class Code, class Kind>
void ready(const char* x, std::ptrdiff_t step, std::int64_t n, std::int64_t depth, void* row) {
  char* const to = static_cast<char*>(row);
  float* scales = reinterpret_cast<float*>(to + row_codes(depth, Kind::kItem));
  const std::int64_t group = Code::kTop && Code::kGroup ? Code::kGroup : depth;
  for (std::int64_t begin = 0, end; begin < depth; begin = end) {
    end = depth - begin < group ? depth : begin + group;
    F scale = F{} + 1.0f;
    if constexpr (Code::kTop != 0.0f) {
      *scales = scale_of<X, Code>(x, step, begin, end < n ? end : n);
      scale = F{} + *scales++;
    }
    I sum = {};
    const std::int64_t behind = end < depth ? end : row_codes(depth, Kind::kItem) / Kind::kItem;  // zeros, up to a cache line
    for (std::int64_t i = begin; i < behind; i += kLanes) {
      F v = i < n ? some<X>(x, step, i, n) : F{};
      if constexpr (Code::kTop != 0.0f) {
        v = coded<Code>(v, scale);
      }
      if constexpr (Kind::kPer == 4) sum += __builtin_convertvector(v, I);
      Kind::put(to + i * Kind::kItem, v, behind - i < kLanes ? behind - i : kLanes);
    }
    if constexpr (Kind::kPer == 4) {
      std::int32_t all = 0;
      for (int i = 0; i < kLanes; ++i) all += sum[i];
      all *= 128;
      std::memcpy(scales, &all, sizeof all);
    }
  }
}

// -- products ------------------------------------------------------------------------------------------------------------

// What rows add to sums[rows][kPanel]: `steps` of their words from byte `at` on, times a block. Sums of bytes are whole
// numbers; all else is scaled, by what a row has at byte `scale`, if that is not 0, and by `columns`.
struct Block {
  std::int64_t at, steps;
  const std::uint32_t* words;
  std::int64_t scale;
  const float* columns;
  bool first;  // there are no sums yet

  float scale_of(const char* row) const {
    float found = 1.0f;
    if (scale) std::memcpy(&found, row + scale, sizeof found);
    return found;
  }
  void add(F sums, float of_row, F of_columns, float* to) const {
    store(to, (first ? F{} : load(to)) + sums * (of_row * of_columns));
  }
};

// Where the parts of a panel lie.
template <class Code>
class Panel {
 public:
  static constexpr Form kForm = form_of(Code::kCoding);
  explicit Panel(const void* panel)
      : columns_(static_cast<const float*>(panel)),
        groups_(static_cast<const std::uint32_t*>(panel) + kForm.of_column * kPanel) {}

  // From element `at` of the depth on, which is in the given group.
  const std::uint32_t* words(std::int64_t at, std::int64_t group) const {
    return groups_ + group * kStride + (at - group * kForm.group) / kForm.unit * kPanel;
  }
  // Of a group that ends there, the scales of columns from `column` on.
  F scales(std::int64_t end, std::int64_t group, int column) const {
    const std::uint32_t* const at = words(end, group);
    if constexpr (kForm.scale == 4) {
      return load(reinterpret_cast<const float*>(at) + column);
    } else {
      const F scale = Code::scale_of(load_raw<B>(reinterpret_cast<const char*>(at) + column));
      return kForm.of_column ? scale * load(columns_ + column) : scale;
    }
  }
  // The same of all columns: where they lie as float32, or in `room`.
  const float* scales(std::int64_t end, std::int64_t group, float* room) const {
    if (kForm.scale == 4) return reinterpret_cast<const float*>(words(end, group));
    for (int j = 0; j < kPanel; j += kLanes) store(room + j, scales(end, group, j));
    return room;
  }

 private:
  static constexpr std::int64_t kStride = kPanel * (4 * kForm.group / kForm.unit + kForm.scale) / 4;
  const float* columns_;
  const std::uint32_t* groups_;
};

template <class Kind, int Rows>
void tile(const Block& b, const char* const* a, float* out) {
  using Sum = typename Kind::Sum;
  constexpr bool kWhole = Kind::kPer == 4;
  Sum sums[Rows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j)
      sums[m][j] = kWhole && !b.first ? load_raw<Sum>(out + m * kPanel + j * kLanes) : Sum{};
  const std::uint32_t* words = b.words;
  for (std::int64_t at = b.at, end = b.at + 4 * b.steps; at < end; at += 4, words += kPanel) {
    U column[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      column[j] = load_raw<U>(words + j * kLanes);
      if (kWhole) fetch(words + j * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[m][j] = Kind::dot(sums[m][j], a[m] + at, column[j]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* const to = out + m * kPanel + j * kLanes;
      if constexpr (kWhole)
        std::memcpy(to, &sums[m][j], sizeof sums[m][j]);
      else
        b.add(sums[m][j], b.scale_of(a[m]), load(b.columns + j * kLanes), to);
    }
}

template <class Kind>
using Tile = decltype(&tile<Kind, 1>);
template <class Kind>
constexpr Tile<Kind> kTiles[] = {
  tile<Kind, 1>, tile<Kind, 2>,
#if defined(__AVX512F__) || defined(__aarch64__)
  tile<Kind, 3>, tile<Kind, 4>, tile<Kind, 5>, tile<Kind, 6>,
#endif
};

// Whether a block is read in whole steps of tiles.
template <class Kind>
constexpr bool kTiled = kHasTiles && std::is_same<Kind, BestPairs>::value;

// What products of one kind need beside their operands.
template <class Kind>
struct Space {};

template <class Kind>
void products(Space<Kind>&, const Block& b, const char* const* a, std::int64_t count, float* out) {
  const std::int64_t tiles = (count + kTileRows - 1) / kTileRows;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t begin = count * t / tiles, height = count * (t + 1) / tiles - begin;
    kTiles<Kind>[(height - 1) % kTileRows](b, a + begin, out + begin * kPanel);
  }
}

#if defined(__AMX_BF16__)
constexpr std::int64_t kColumns = 2 * kTile, kRows = 2 * kTile;  // of products in tiles

template <>
struct Space<TiledPairs> {
  Tiles tiles;
  alignas(64) float sums[kRows * kColumns];
};

// The same in tiles. Rows lie equally far apart.
template <>
void products<TiledPairs>(Space<TiledPairs>& space, const Block& b, const char* const* a, std::int64_t count, float* out) {
  const std::int64_t stride = count > 1 ? a[1] - a[0] : 64;
  for (std::int64_t m = 0; m < count; m += kRows)
    for (std::int64_t c = 0; c < kPanel; c += kColumns) {
      const std::int64_t rows = count - m < kRows ? count - m : kRows;
      space.tiles.shape(rows, kColumns, kTile);
      space.tiles.zero();
      space.tiles.add(a[m] + b.at, stride, b.words + c, kPanel * 4, b.steps / kTile, [] {});
      space.tiles.store(space.sums, kColumns * sizeof(float));
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t j = 0; j < kColumns; j += kLanes)
          b.add(load(space.sums + i * kColumns + j), b.scale_of(a[m + i]), load(b.columns + c + j),
                out + (m + i) * kPanel + c + j);
    }
}

// Of a few rows each step is multiplied as soon as it is decoded, which hides how long a tile's sums take.
template <class Code>
void few_in_tiles(const char* const* a, std::int64_t count, const Panel<Code>& panel, std::int64_t depth, float* sums) {
  constexpr std::int64_t kUnit = Panel<Code>::kForm.unit, kStep = 2 * kTile;
  const std::int64_t stride = count > 1 ? a[1] - a[0] : 64, scales = Code::kTop ? row_codes(depth, Pairs::kItem) : 0;
  const FewRows tiles(count);
  alignas(64) std::uint32_t steps[2][kTile * kPanel];
  alignas(64) float found[kTile * kPanel];
  std::int64_t turn = 0;
  for (std::int64_t k = 0, g = 0; k < depth; k += Code::kGroup, ++g) {
    const std::int64_t end = depth - k < Code::kGroup ? depth : k + Code::kGroup;
    tiles.zero();
    for (std::int64_t at = k; at < end; at += kStep, turn = 1 - turn) {
      const std::int64_t units = (end - at < kStep ? end - at : kStep) / kUnit;
      decode<Code, Pairs>(panel.words(at, g), units, steps[turn]);
      if (units < kStep / kUnit) std::memset(steps[turn] + units * kUnit / 2 * kPanel, 0, (kStep - units * kUnit) * kPanel * 2);
      tiles.add(a[0] + at * Pairs::kItem, stride, steps[turn]);
    }
    tiles.store(found);
    const Block now{0, 0, nullptr, scales ? scales + 4 * g : 0, nullptr, k == 0};
    for (int j = 0; j < kPanel; j += kLanes) {
      const F columns = panel.scales(end, g, j);
      for (std::int64_t i = 0; i < count; ++i)
        now.add(load(found + i * kPanel + j), now.scale_of(a[i]), columns, sums + i * kPanel + j);
    }
  }
}

constexpr std::int64_t kStream = 12;  // rows that read a panel as one stream of bytes faster than in tiles

void bytes_in_tiles(const char* const* a, std::int64_t count, const std::uint32_t* words, std::int64_t all, float* sums) {
  const std::int64_t stride = a[1] - a[0], whole = all / kTile * kTile;
  TilesOf<Words::bytes> tiles;
  for (std::int64_t k = 0, end; k < all; k = end) {
    const std::int64_t step = k < whole ? kTile : all - whole;
    end = k == whole ? all : k + kBlock < whole ? k + kBlock : whole;
    for (std::int64_t c = 0; c < kPanel; c += kColumns)
      for (std::int64_t m = 0; m < count; m += kRows) {
        float* const to = sums + m * kPanel + c;
        tiles.shape(count - m < kRows ? count - m : kRows, kColumns, step);
        if (k)
          tiles.load(to, kPanel * 4);
        else
          tiles.zero();
        tiles.add(a[m] + 4 * k, stride, words + k * kPanel + c, kPanel * 4, (end - k) / step, [] {});
        tiles.store(to, kPanel * 4);
      }
  }
}
#endif

#if defined(__AVX512BF16__)
// Of a few rows codes are multiplied as soon as they are decoded, and stored nowhere: storing them costs more than decoding
// them again for the next rows, of which as many go together as registers have room for.
constexpr std::int64_t kStreamed = 12;
template <class Code>
constexpr std::int64_t kAtOnce = Panel<Code>::kForm.unit == 4 ? 6 : 4;

template <class Code, int Rows>
void stream(const char* const* a, Panel<Code> panel, std::int64_t depth, float* sums) {
  constexpr std::int64_t kUnit = Panel<Code>::kForm.unit, kPart = kUnit / Pairs::kPer;
  const std::int64_t scales = Code::kTop ? row_codes(depth, Pairs::kItem) : 0;
  std::memset(sums, 0, Rows * kPanel * sizeof(float));
  for (std::int64_t k = 0, g = 0, end; k < depth; k = end, ++g) {
    end = depth - k < Code::kGroup ? depth : k + Code::kGroup;
    F found[Rows][kVectors] = {};
    const std::uint32_t* words = panel.words(k, g);
    for (std::int64_t at = k; at < end; at += kUnit, words += kPanel)
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        U said[kPart];
        Code::pairs_of(load_raw<U>(words + j * kLanes), said);
#pragma GCC unroll 4
        for (int i = 0; i < kPart; ++i)
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) found[m][j] = Pairs::dot(found[m][j], a[m] + at * Pairs::kItem + 4 * i, said[i]);
      }
    const Block now{0, 0, nullptr, scales ? scales + 4 * g : 0, nullptr, false};
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      const F columns = panel.scales(end, g, j * kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) now.add(found[m][j], now.scale_of(a[m]), columns, sums + m * kPanel + j * kLanes);
    }
  }
}

template <class Code>
constexpr decltype(&stream<Code, 1>) kStreams[] = {
  stream<Code, 1>, stream<Code, 2>, stream<Code, 3>, stream<Code, 4>, stream<Code, 5>, stream<Code, 6>};

template <class Code>
void streams(const char* const* a, std::int64_t count, Panel<Code> panel, std::int64_t depth, float* sums) {
  const std::int64_t parts = (count + kAtOnce<Code> - 1) / kAtOnce<Code>;
  for (std::int64_t part = 0; part < parts; ++part) {
    const std::int64_t begin = count * part / parts, end = count * (part + 1) / parts;
    kStreams<Code>[end - begin - 1](a + begin, panel, depth, sums + begin * kPanel);
  }
}
#endif

template <class T, class Code, class Kind>
void multiply(const void* const* rows, std::int64_t count, const void* of_panel, std::int64_t, std::int64_t depth, std::int64_t,
              const void*, float* sums) {
  constexpr std::int64_t kUnit = Panel<Code>::kForm.unit, kPart = kUnit / Kind::kPer;
  constexpr std::int64_t kGroup = Code::kGroup ? Code::kGroup : kBlock;
  static_assert(kGroup <= kBlock, "a block is in L1");
  const char* const* const a = reinterpret_cast<const char* const*>(rows);
  const Panel<Code> panel(of_panel);
  const std::int64_t scales = Code::kTop ? row_codes(depth, Kind::kItem) : 0;
#if defined(__AMX_BF16__)
  if constexpr (kTiled<Kind>)
    if (count <= kTile) return few_in_tiles<Code>(a, count, panel, depth, sums);
#endif
#if defined(__AVX512BF16__)
  if constexpr (Kind::kPer == 2 && !kTiled<Kind>)
    if (count <= kStreamed) return streams<Code>(a, count, panel, depth, sums);
#endif
  Space<Kind> space;
  alignas(64) std::uint32_t block[kGroup / Kind::kPer * kPanel];
  alignas(64) float room[kPanel];
  for (std::int64_t k = 0, g = 0, end; k < depth; k = end, ++g) {
    end = depth - k < kGroup ? depth : k + kGroup;
    const std::int64_t units = (end - k) / kUnit, which = Code::kGroup ? g : 0, last = Code::kGroup ? end : depth;
    decode<Code, Kind>(panel.words(k, which), units, block);
    std::int64_t steps = units * kPart;
    for (; kTiled<Kind> && steps % 16; ++steps) std::memset(block + steps * kPanel, 0, kPanel * 4);
    const float* const columns = panel.scales(last, which, room);
    const Block now{k * Kind::kItem, steps, block, scales ? scales + 4 * which : 0, columns, k == 0};
    products<Kind>(space, now, a, count, sums);
  }
}

#if defined(__AVX512VNNI__)
// Whole numbers until the end. A few rows read a panel as one stream, more pass over it in blocks that stay in L1.
template <class T>
void multiply_bytes(const void* const* rows, std::int64_t count, const void* panel, std::int64_t, std::int64_t depth,
                    std::int64_t, const void*, float* sums) {
  const char* const* const a = reinterpret_cast<const char* const*>(rows);
  const auto* const words = static_cast<const std::uint32_t*>(panel);
  const std::int64_t all = depth / 4, block = count <= kTileRows ? all : kBlock, scales = row_codes(depth, 1);
  Space<Bytes> space;
  std::int64_t k = 0;
#if defined(__AMX_INT8__)
  if (count > kStream) bytes_in_tiles(a, count, words, k = all, sums);
#endif
  for (; k < all; k += block)
    products<Bytes>(space, {4 * k, all - k < block ? all - k : block, words + k * kPanel, 0, nullptr, k == 0}, a, count, sums);
  const float* const columns = reinterpret_cast<const float*>(words + all * kPanel);
  for (std::int64_t m = 0; m < count; ++m) {
    float scale;
    std::int32_t more;
    std::memcpy(&scale, a[m] + scales, sizeof scale);
    std::memcpy(&more, a[m] + scales + sizeof scale, sizeof more);
    for (int j = 0; j < kVectors; ++j) {
      float* const to = sums + m * kPanel + j * kLanes;
      store(to, number((I)(load_raw<U>(to) - static_cast<std::uint32_t>(more))) * (scale * load(columns + j * kLanes)));
    }
  }
}
#endif

template <class T, class Code, class Kind>
constexpr CodedLoops<T> loops_of() {
  return {Kind::kItem, ready<T, Code, Kind>, ready<float, Code, Kind>, multiply<T, Code, Kind>};
}

template <class T>
constexpr Coded<T> loops() {
  constexpr bool kPairs = std::is_same<T, bf16>::value;
  using Kept = typename std::conditional<kPairs, BestPairs, Singles>::type;
  using Short = typename std::conditional<kPairs, Pairs, Singles>::type;  // of groups that do not fill a step of tiles
  return {{
#if defined(__AVX512VNNI__)
    {1, ready<T, Int8, Bytes>, ready<float, Int8, Bytes>, multiply_bytes<T>},
#else
    loops_of<T, Int8, Singles>(),
#endif
    loops_of<T, E4m3, BestPairs>(), loops_of<T, Int4<Coding::int4_g128>, Kept>(),
    loops_of<T, Int4<Coding::int4_g32>, Kept>(), loops_of<T, E2m1<Coding::mxfp4>, Kept>(),
    loops_of<T, E2m1<Coding::nvfp4>, Short>()}};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<Coded>, coded_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
