// The second part of sparse_mla.cpp: a block of keys in tiles. Its keys are copied beside each other, once as rows, which are
// multiplied with queries, and once as pairs of rows, with which weights are multiplied.
#pragma once

#if defined(__AMX_BF16__)
namespace porthal {
namespace {

constexpr std::int64_t kTileKeys = 128, kTilePairs = kTileKeys / 2;  // of a block

// What a thread needs beside a row's sums: as in Space, and products of up to 32 heads with as many columns.
struct TileSpace {
  float *old, *now, *top, *sum, *scores, *added;
  Word *weights, *queries, *pairs, *keys;
  std::int64_t key;  // words of a copied key: an odd number of cache lines apart, see Space
  TileSpace(const MlaDims& d, float* memory) {
    const std::int64_t heads = Heads(d.heads).padded(), words = (d.c + d.r) / 2;
    key = key_words(d);
    old = memory;
    now = old + heads;
    top = now + heads;
    sum = top + heads;
    scores = sum + heads;
    added = scores + kTileKeys * heads;
    weights = reinterpret_cast<Word*>(added + 4 * kTile * kTile);
    queries = weights + heads * kTilePairs;
    pairs = queries + heads * words;
    keys = pairs + d.c * kTilePairs;
  }
  static std::int64_t key_words(const MlaDims& d) { return up((d.c + d.r) / 2, 2 * kLine) + kLine; }
  static std::int64_t floats(const MlaDims& d) {
    return Heads(d.heads).padded() * (4 + kTileKeys + kTilePairs + (d.c + d.r) / 2) + 4 * kTile * kTile + d.c * kTilePairs +
           kTileKeys * key_words(d);
  }
};

void queries_of_lines(const MlaDims& d, const bf16* latent, std::ptrdiff_t latent_stride, const bf16* rope,
                      std::ptrdiff_t rope_stride, float* memory) {
  const TileSpace space(d, memory);
  const std::int64_t c = d.c / 2, all = (d.c + d.r) / 2;
  pack_queries(reinterpret_cast<const char*>(latent), latent_stride, d.heads, c, 0, all, space.queries);
  pack_queries(reinterpret_cast<const char*>(rope), rope_stride, d.heads, all - c, c, all, space.queries);
}

// Keys as rows, and their values as pairs[32 columns][pair][column]. What fills the last step of pairs is zeros.
inline void copy_keys(const MlaDims& d, const MlaKeys<bf16>& keys, const TileSpace& space) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                       35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const std::int64_t c = d.c / 2;
  for (std::int64_t k = 0; k < up(keys.count, 2 * kTile); k += 2) {
    Word *const first = space.keys + k * space.key, *const second = first + space.key;
    const bool one = k < keys.count, two = k + 1 < keys.count;
    for (std::int64_t w = 0; w < c; w += kLine) {
      const __m512i a = one ? _mm512_loadu_si512(keys.c[k] + 2 * w) : __m512i{};
      const __m512i b = two ? _mm512_loadu_si512(keys.c[k + 1] + 2 * w) : __m512i{};
      Word* const pair = space.pairs + 2 * w * kTilePairs + k / 2 * 2 * kTile;
      _mm512_store_si512(first + w, a);
      _mm512_store_si512(second + w, b);
      _mm512_store_si512(pair, _mm512_permutex2var_epi16(a, low, b));
      _mm512_store_si512(pair + kTile, _mm512_permutex2var_epi16(a, high, b));
    }
    for (std::int64_t w = 0; w < d.r / 2; w += kLine) {
      _mm512_store_si512(first + c + w, one ? _mm512_loadu_si512(keys.kp[k] + 2 * w) : __m512i{});
      _mm512_store_si512(second + c + w, two ? _mm512_loadu_si512(keys.kp[k + 1] + 2 * w) : __m512i{});
    }
  }
}

// weights[head][pair] = exp(scale * score - highest), zeros where there is no key; and their sums.
inline void soften_lines(const TileSpace& space, std::int64_t count, std::int64_t heads, float scale) {
  for (std::int64_t h = 0; h < heads; h += kLanes) {
    F top = F{} + kLowest, sum = {};
    for (std::int64_t k = 0; k < count; ++k) {
      const F s = load(space.scores + k * heads + h) * scale;
      store(space.scores + k * heads + h, s);
      top = s > top ? s : top;
    }
    for (std::int64_t k = 0; k < count; k += 2 * kTile) {
      U square[kLanes];
      for (std::int64_t i = 0; i < kLanes; ++i) {
        const std::int64_t at = k + 2 * i;
        square[i] = at < count ? word_of(Pairs{}, space.scores + at * heads + h, sum, top, at + 1 < count ? heads : 0) : U{};
      }
      transpose(square);
      for (std::int64_t i = 0; i < kLanes; ++i)
        std::memcpy(space.weights + (h + i) * kTilePairs + k / 2, &square[i], sizeof(U));
    }
    store(space.top + h, top);
    store(space.sum + h, sum);
  }
}

void add_lines(const MlaDims& d, const MlaKeys<bf16>& keys, const MlaKeys<bf16>&, bool first, float* memory,
               float* sums) {
  const TileSpace space(d, memory);
  const State state(d, sums);
  const Heads panels(d.heads);
  const std::int64_t heads = panels.padded(), words = (d.c + d.r) / 2, count = up(keys.count, 2 * kTile);
  Tiles tiles;
  copy_keys(d, keys, space);
  for (std::int64_t p = 0; p < panels.panels; ++p)
    for (std::int64_t v = panels.first(p), end = panels.first(p + 1), in_word = end - v; v < end; v += 2) {
      const Word* const queries = space.queries + panels.first(p) * kLanes * words + (v - panels.first(p)) * kLanes;
      tiles.shape(2 * kTile, v + 1 < end ? 2 * kTile : kTile, kTile);
      for (std::int64_t k = 0; k < count; k += 2 * kTile) {
        tiles.zero();
        tiles.add(space.keys + k * space.key, space.key * sizeof(Word), queries, in_word * kLanes * sizeof(Word), words / kTile,
                  [] {});
        tiles.store(space.scores + k * heads + v * kLanes, heads * sizeof(float));
      }
    }

  soften_lines(space, keys.count, heads, d.scale);
  for (std::int64_t h = 0; h < heads; h += kLanes)
    if (first) {
      store(state.top + h, load(space.top + h));
      store(state.sum + h, load(space.sum + h));
    } else {
      join(space.top + h, space.sum + h, space.old + h, space.now + h, state.top + h, state.sum + h);
    }

  for (std::int64_t h = 0; h < heads; h += 2 * kTile) {
    const std::int64_t some = heads - h < 2 * kTile ? heads - h : 2 * kTile;
    tiles.shape(some, 2 * kTile, kTile);
    for (std::int64_t column = 0; column < d.c; column += 2 * kTile) {
      float* const o = state.o + h * state.width + column;
      tiles.zero();
      tiles.add(space.weights + h * kTilePairs, kTilePairs * sizeof(Word), space.pairs + column * kTilePairs,
                2 * kTile * sizeof(Word), count / (2 * kTile), [] {});
      if (first) {
        tiles.store(o, state.width * sizeof(float));
        continue;
      }
      tiles.store(space.added, 2 * kTile * sizeof(float));
      for (std::int64_t n = 0; n < some; ++n)
        for (std::int64_t i = 0; i < 2 * kTile; i += kLanes) {
          float* const to = o + n * state.width + i;
          store(to, joined(F{} + space.old[h + n], load(to), F{} + space.now[h + n], load(space.added + n * 2 * kTile + i)));
        }
    }
  }
}

}  // namespace
}  // namespace porthal
#endif
