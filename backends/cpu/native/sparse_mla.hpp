// Sparse multi-head latent attention: blocks of a row's keys, and who adds which of them when.
#pragma once

#include "isa.hpp"

namespace porthal {

struct MlaDims {
  std::int64_t heads, c, r;
  float scale;
};

template <class T>
struct MlaKeys {
  static constexpr std::int64_t kMost = 144;
  const T *c[kMost], *kp[kMost];
  std::int64_t count;
  T* decoded;  // room for as many latents of a cache under a scheme
};

template <class T>
struct MlaLoops {
  std::int64_t block, unit;               // keys of a block, at most, and what it is a multiple of
  std::int64_t (*space)(const MlaDims&);  // floats that a thread needs
  std::int64_t (*state)(const MlaDims&);  // floats that a row's sums take
  // Packs a row's queries into space: heads are `stride` bytes apart.
  void (*queries)(const MlaDims&, const T* latent, std::ptrdiff_t latent_stride, const T* rope, std::ptrdiff_t rope_stride,
                  float* space);
  // Adds a block to a row's sums, which it begins if it is the first; meanwhile fetches the keys of the next.
  void (*add)(const MlaDims&, const MlaKeys<T>& keys, const MlaKeys<T>& next, bool first, float* space, float* state);
  // Adds the sums of a later block.
  void (*merge)(const MlaDims&, const float* later, float* space, float* state);
  void (*finish)(const MlaDims&, const float* state, T* o);
};

}  // namespace porthal

#if !defined(PORTHAL_ISA)
#include <algorithm>
#include <vector>

#include "coded_rows.hpp"
#include "packed.hpp"
#include "requests.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES_WITH_TILES(FloatsAndPairs<MlaLoops>, sparse_mla_loops)

constexpr std::int64_t kSplitRows = 4;           // rows of a thread, up to which blocks are handed out instead of rows
constexpr std::int64_t kAlone = 1 << 20;         // products that are not worth waking anybody for
constexpr std::int64_t kSplitFloats = 1 << 24;  // that their sums may take

template <class T>
struct Mla {
  const Array &q_latent, &q_rope;
  const Matrix c, kp, indices, length, scales;  // of latents under a scheme, which are codes
  const std::int64_t group;
  const RowCodes<T>* const codes;  // null without one
  const Requests& requests;
  const MlaDims dims;
  T* const o;
  const MlaLoops<T>& loops = sparse_mla_loops(isa()).of(static_cast<const T*>(nullptr), dims.c | dims.r);

  std::int64_t keys(std::int64_t t) const { return length.at<std::int32_t>(0, t); }
  std::int64_t blocks(std::int64_t t) const { return ceil_div(keys(t), loops.block); }

  // Blocks of nearly equal size, in whole tiles.
  void block(std::int64_t t, std::int64_t i, MlaKeys<T>& to) const {
    to.count = 0;
    if (i >= blocks(t)) return;
    const std::int64_t size = ceil_div(ceil_div(keys(t), blocks(t)), loops.unit) * loops.unit, begin = i * size;
    const std::int64_t request = requests.of_row(t);
    to.count = std::min(keys(t) - begin, size);
    for (std::int64_t k = 0; k < to.count; ++k) {
      const std::int64_t slot = requests.slot(request, indices.at<std::int32_t>(t, begin + k));
      to.c[k] = codes ? to.decoded + k * dims.c : c.row<T>(slot);
      if (codes) codes->decode(c.row<char>(slot), scales.row<float>(slot), dims.c, group, to.decoded + k * dims.c);
      to.kp[k] = kp.row<T>(slot);
    }
  }

  // Two blocks of a thread: the one that is added, and the next.
  MlaKeys<T>* keys_of_thread() const {
    thread_local MlaKeys<T> keys[2];
    thread_local Scratch<T> decoded[2];
    for (int i = 0; codes && i < 2; ++i) keys[i].decoded = decoded[i].at_least(MlaKeys<T>::kMost * dims.c);
    return keys;
  }

  void queries(std::int64_t t, float* space) const {
    thread_local std::vector<T> latent_copy, rope_copy;
    std::ptrdiff_t latent_stride, rope_stride;
    const T* const latent = q_latent.dense_matrix<T>(t, latent_copy, latent_stride);
    const T* const rope = q_rope.dense_matrix<T>(t, rope_copy, rope_stride);
    loops.queries(dims, latent, latent_stride, rope, rope_stride, space);
  }

  void rows(std::int64_t begin, std::int64_t end) const {
    thread_local Scratch<float> memory;
    MlaKeys<T>* const keys = keys_of_thread();
    float* const space = memory.at_least(loops.space(dims) + loops.state(dims));
    float* const state = space + loops.space(dims);
    int now = 0;
    block(begin, 0, keys[now]);
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t count = blocks(t);
      if (count) queries(t, space);
      for (std::int64_t i = 0; i < count; ++i, now = 1 - now) {
        if (i + 1 < count)
          block(t, i + 1, keys[1 - now]);
        else if (t + 1 < end)
          block(t + 1, 0, keys[1 - now]);
        else
          keys[1 - now].count = 0;
        loops.add(dims, keys[now], keys[1 - now], i == 0, space, state);
      }
      if (!count && t + 1 < end) block(t + 1, 0, keys[now]);
      finish(t, state);
    }
  }

  void finish(std::int64_t t, const float* state) const {
    T* const to = o + t * dims.heads * dims.c;
    if (blocks(t))
      loops.finish(dims, state, to);
    else
      std::fill_n(to, dims.heads * dims.c, T{});
  }

  // Blocks instead of rows are handed out, and then added in the order in which `rows` adds them.
  void split(std::int64_t count, std::int64_t all) const {
    thread_local Scratch<float> states_of_caller;
    thread_local std::vector<std::int64_t> row_of_caller;
    float* const states = states_of_caller.at_least(all * loops.state(dims));
    std::vector<std::int64_t>& row = row_of_caller;
    row.clear();
    for (std::int64_t t = 0; t < count; ++t) row.insert(row.end(), blocks(t), t);
    const auto first = [&](std::int64_t t) { return std::lower_bound(row.begin(), row.end(), t) - row.begin(); };
    parallel_for(all, ceil_div(all, 2 * num_threads()), [&](std::int64_t begin, std::int64_t end) {
      thread_local Scratch<float> memory;
      MlaKeys<T>* const keys = keys_of_thread();
      float* const space = memory.at_least(loops.space(dims));
      block(row[begin], begin - first(row[begin]), keys[begin % 2]);
      for (std::int64_t i = begin; i < end; ++i) {
        MlaKeys<T>& next = keys[(i + 1) % 2];
        next.count = 0;
        if (i + 1 < end) block(row[i + 1], i + 1 - first(row[i + 1]), next);
        if (i == begin || row[i - 1] != row[i]) queries(row[i], space);
        loops.add(dims, keys[i % 2], next, true, space, states + i * loops.state(dims));
      }
    });
    parallel_for(count, 1, [&](std::int64_t begin, std::int64_t end) {
      thread_local Scratch<float> memory;
      for (std::int64_t t = begin; t < end; ++t) {
        float* const state = states + first(t) * loops.state(dims);
        for (std::int64_t i = 1; i < blocks(t); ++i)
          loops.merge(dims, state + i * loops.state(dims), memory.at_least(loops.space(dims)), state);
        finish(t, state);
      }
    });
  }

  void run(std::int64_t count) const {
    std::int64_t all = 0, selected = 0;
    for (std::int64_t t = 0; t < count; ++t) {
      all += blocks(t);
      selected += keys(t);
    }
    const int threads = num_threads();
    if (threads == 1 || selected * dims.heads * (2 * dims.c + dims.r) < kAlone) return count ? rows(0, count) : void();
    if (count < kSplitRows * threads && all > count && all * loops.state(dims) < kSplitFloats) return split(count, all);
    parallel_for(count, std::clamp<std::int64_t>(count / (4 * threads), 1, 8),
                 [&](std::int64_t begin, std::int64_t end) { rows(begin, end); });
  }
};

}  // namespace porthal
#endif
