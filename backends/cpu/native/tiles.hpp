// AMX: products of tiles, which are up to 16 rows of 64 bytes in eight registers. The order of a sum depends on depth alone:
// even and odd elements of a step of 32 apart, then both, then the steps. Subnormal numbers count as 0, as in vdpbf16ps. Of
// bytes sums are whole numbers.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>

#include <cstdint>

namespace porthal {
namespace {

constexpr std::int64_t kTile = 16;  // rows, and words of a row: pairs of bf16, four bytes, or sums

// Registers 0 to 3 are sums, of the rows in 4 and 5 with the pairs in 6 and 7: 0 1 += 4 . 6 7 and 2 3 += 5 . 6 7.
// What a word of rows and columns is: a pair of bf16; four bytes, in columns without a sign; or four with a sign in both.
enum class Words { pairs, bytes, codes };

template <Words W>
class TilesOf {
 public:
  TilesOf() = default;
  TilesOf(const TilesOf&) = delete;
  ~TilesOf() { _tile_release(); }  // what is left in registers would be saved at every switch of threads

  // Up to 32 rows, 16 or 32 columns, and up to 16 words of a step in depth. A change empties the registers.
  void shape(std::int64_t rows, std::int64_t columns, std::int64_t words) {
    if (rows == rows_ && columns == columns_ && words == words_) return;
    rows_ = rows, columns_ = columns, words_ = words;
    const auto byte = [](std::int64_t n) { return static_cast<std::uint8_t>(n); };
    const auto line = [](bool there, std::int64_t n) { return static_cast<std::uint16_t>(there ? 4 * n : 0); };
    const std::uint8_t upper = byte(rows < kTile ? rows : kTile), lower = byte(rows - upper), depth = byte(words);
    const bool wide = columns > kTile;
    const auto second = [&](std::uint8_t n) { return wide ? n : std::uint8_t{0}; };
    const Layout layout{
      1, 0, {},
      {64, line(wide, kTile), line(lower, kTile), line(wide && lower, kTile), line(true, words), line(lower, words), 64,
       line(wide, kTile)}, {},
      {upper, second(upper), lower, second(lower), upper, lower, depth, second(depth)}, {}};
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }

  // The sums, from and to memory where rows are `stride` bytes apart.
  void zero() const {
    _tile_zero(0);
    if (wide()) _tile_zero(1);
    if (both()) _tile_zero(2);
    if (both() && wide()) _tile_zero(3);
  }
  void load(const void* sums, std::int64_t stride) const {
    const char *const upper = reinterpret_cast<const char*>(sums), *const lower = upper + kTile * stride;
    asm volatile("" : : : "memory");  // loads of tiles do not say what they read
    _tile_loadd(0, upper, stride);
    if (wide()) _tile_loadd(1, upper + 64, stride);
    if (both()) _tile_loadd(2, lower, stride);
    if (both() && wide()) _tile_loadd(3, lower + 64, stride);
  }
  void store(void* sums, std::int64_t stride) const {
    char *const upper = reinterpret_cast<char*>(sums), *const lower = upper + kTile * stride;
    _tile_stored(0, upper, stride);
    if (wide()) _tile_stored(1, upper + 64, stride);
    if (both()) _tile_stored(2, lower, stride);
    if (both() && wide()) _tile_stored(3, lower + 64, stride);
  }

  // Adds `steps` products: rows lie `stride` bytes apart, and pairs `pair` bytes. beside() is done in every step.
  template <class Beside>
  void add(const void* rows, std::int64_t stride, const void* pairs, std::int64_t pair, std::int64_t steps,
           Beside&& beside) const {
    const char *const a = static_cast<const char*>(rows), *const b = static_cast<const char*>(pairs);
    asm volatile("" : : : "memory");
    if (both() && wide())
      steps_of<true, true>(a, stride, b, pair, steps, beside);
    else if (both())
      steps_of<true, false>(a, stride, b, pair, steps, beside);
    else if (wide())
      steps_of<false, true>(a, stride, b, pair, steps, beside);
    else
      steps_of<false, false>(a, stride, b, pair, steps, beside);
  }

 private:
  bool both() const { return rows_ > kTile; }
  bool wide() const { return columns_ > kTile; }

// Numbers of registers are part of an instruction.
#define PORTHAL_TILE_PRODUCT(to, a, b)       \
  do {                                       \
    if constexpr (W == Words::pairs)         \
      _tile_dpbf16ps(to, a, b);              \
    else if constexpr (W == Words::bytes)    \
      _tile_dpbsud(to, a, b);                \
    else                                     \
      _tile_dpbssd(to, a, b);                \
  } while (false)

  template <bool Both, bool Wide, class Beside>
  static void steps_of(const char* rows, std::int64_t stride, const char* pairs, std::int64_t pair, std::int64_t steps,
                       Beside& beside) {
    for (; steps; --steps, rows += 64, pairs += kTile * pair) {
      _tile_loadd(6, pairs, pair);
      _tile_loadd(4, rows, stride);
      if (Wide) _tile_loadd(7, pairs + 64, pair);
      if (Both) _tile_loadd(5, rows + kTile * stride, stride);
      PORTHAL_TILE_PRODUCT(0, 4, 6);
      if (Wide) PORTHAL_TILE_PRODUCT(1, 4, 7);
      if (Both) PORTHAL_TILE_PRODUCT(2, 5, 6);
      if (Both && Wide) PORTHAL_TILE_PRODUCT(3, 5, 7);
      beside();
    }
  }

  struct Layout {
    std::uint8_t palette, start, reserved[14];
    std::uint16_t bytes[8], none[8];
    std::uint8_t rows[8], also_none[8];
  };
  std::int64_t rows_ = 0, columns_ = 0, words_ = 0;
};
using Tiles = TilesOf<Words::pairs>;

// Up to 16 rows of bf16 times 64 columns, in steps of 32 of depth: registers 0 to 3 += 4 . 5 6 7 5.
class FewRows {
 public:
  explicit FewRows(std::int64_t rows) {
    const auto height = static_cast<std::uint8_t>(rows);
    struct Layout {
      std::uint8_t palette, start, reserved[14];
      std::uint16_t bytes[8], none[8];
      std::uint8_t rows[8], also_none[8];
    };
    const Layout layout{
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {}, {height, height, height, height, height, 16, 16, 16}, {}};
    asm volatile("ldtilecfg %0" : : "m"(layout));
  }
  FewRows(const FewRows&) = delete;
  ~FewRows() { _tile_release(); }

  void zero() const {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  // Pairs lie 256 bytes apart.
  void add(const void* rows, std::int64_t stride, const void* pairs) const {
    const char* const b = static_cast<const char*>(pairs);
    asm volatile("" : : : "memory");
    _tile_loadd(4, rows, stride);
    _tile_loadd(5, b, 256);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, b + 64, 256);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, b + 128, 256);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, b + 192, 256);
    _tile_dpbf16ps(3, 4, 5);
  }
  void store(float* sums) const {  // [rows][64]
    _tile_stored(0, sums, 256);
    _tile_stored(1, sums + 16, 256);
    _tile_stored(2, sums + 32, 256);
    _tile_stored(3, sums + 48, 256);
    asm volatile("" : : : "memory");
  }
};

}  // namespace
}  // namespace porthal
#endif
