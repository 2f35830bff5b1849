// Scores of the indexer for a group of rows and a range of positions, for the two operators that need them.
#pragma once

#include "isa.hpp"

namespace porthal {

constexpr std::int64_t kIndexerKeys = 48;   // of a block, which with a row's queries is in L1
constexpr std::int64_t kIndexerChunk = 32 * kIndexerKeys;

struct IndexerDims {
  std::int64_t heads, width;
  float scale;
};

template <class T>
struct IndexerLoops {
  std::int64_t (*wide)(const IndexerDims&);    // floats that a thread needs
  std::int64_t (*packed)(const IndexerDims&);  // floats that a row's queries and weights take, packed
  // Packs the i-th row; its weights are of T or, where those are null, float32.
  void (*pack)(const IndexerDims&, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32, std::int64_t i,
               float* wide, float* packed);
  // Scores of kIndexerKeys keys for packed rows; of row i the first visible[i] are written, to out + i * stride. Meanwhile
  // fetches the following keys.
  void (*scores)(const IndexerDims&, const char* const* keys, const char* const* following, float* wide, const float* packed,
                 std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride);
};

// The same for keys that are codes of int8: queries become such too, and their scales part of the weights. What is written is
// to be multiplied with the keys' scales. For rows of any width, and of whole cache lines for more than a few heads.
template <class T>
struct CodedIndexer {
  IndexerLoops<T> each, lines;
};

}  // namespace porthal

#if !defined(PORTHAL_ISA)
#include <algorithm>
#include <limits>
#include <vector>

#include "packed.hpp"
#include "requests.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES_WITH_TILES(FloatsAndPairs<IndexerLoops>, indexer_loops)
PORTHAL_TABLES_WITH_TILES(PerFloat<CodedIndexer>, coded_indexer_loops)

template <class T>
const IndexerLoops<T>& indexer_loops_of(const IndexerDims& d, bool coded) {
  const T* const type = nullptr;
  if (!coded) return indexer_loops(isa()).of(type, d.width);
  const CodedIndexer<T>& found = coded_indexer_loops(isa()).of(type);
  return d.width % 64 || d.heads < 16 ? found.each : found.lines;
}

// Rows of one request that share its keys.
struct RowGroup {
  std::int64_t request, first, rows;
};

template <class T>
class Scorer {
 public:
  using Element = T;
  static constexpr std::int64_t kMostRows = 16;

  Scorer(const Array& iq, const Array& w, const Matrix& keys, const Matrix& scales, const Requests& requests,
         const Matrix& visible, float scale)
      : iq_(iq), w_(w), weights_(w.matrix(iq.shape[0], iq.shape[1])), keys_(keys), scales_(scales), requests_(requests),
        visible_(visible), dims_{iq.shape[1], iq.shape[2], scale},
        loops_(indexer_loops_of<T>(dims_, scales.data)) {
    for (std::int64_t r = 0; r < requests.count(); ++r)
      for (std::int64_t t = requests.first_row(r); t < requests.first_row(r + 1); t += kMostRows)
        groups.push_back({r, t, std::min(kMostRows, requests.first_row(r + 1) - t)});
  }

  std::int64_t visible(std::int64_t t) const { return visible_.at<std::int32_t>(0, t); }

  std::int64_t rows() const { return iq_.shape[0]; }

  // The columns [begin, end) of the group's rows, -inf where they see nothing; `fresh` where the thread scored others before.
  void score(const RowGroup& group, bool fresh, std::int64_t begin, std::int64_t end, float* out, std::int64_t stride) const {
    thread_local Scratch<float> wide_of_thread, packed_of_thread;
    float* const wide = wide_of_thread.at_least(loops_.wide(dims_));
    float* const packed = packed_of_thread.at_least(group.rows * loops_.packed(dims_));
    std::int64_t sees[kMostRows], most = 0;
    for (std::int64_t i = 0; i < group.rows; ++i) {
      const std::int64_t here = std::clamp<std::int64_t>(visible(group.first + i) - begin, 0, end - begin);
      std::fill(out + i * stride + here, out + i * stride + (end - begin), -std::numeric_limits<float>::infinity());
      most = std::max(most, here);
    }
    if (most == 0) return;
    if (fresh) pack(group, wide, packed);
    const char *keys[2][kIndexerKeys];
    float scales[2][kIndexerKeys];
    locate(group.request, begin, begin + most, keys[0], scales[0]);
    int now = 0;
    for (std::int64_t at = begin; at < begin + most; at += kIndexerKeys, now = 1 - now) {
      if (at + kIndexerKeys < begin + most)
        locate(group.request, at + kIndexerKeys, begin + most, keys[1 - now], scales[1 - now]);
      else
        std::copy_n(keys[now], kIndexerKeys, keys[1 - now]);
      for (std::int64_t i = 0; i < group.rows; ++i) sees[i] = std::min(visible(group.first + i), end) - at;
      loops_.scores(dims_, keys[now], keys[1 - now], wide, packed, group.rows, sees, out + (at - begin), stride);
      for (std::int64_t i = 0; scales_.data && i < group.rows; ++i)
        for (std::int64_t k = 0; k < std::min(sees[i], kIndexerKeys); ++k) out[at - begin + i * stride + k] *= scales[now][k];
    }
  }

  // Work of a few microseconds is not worth waking anybody for.
  bool alone(std::int64_t width) const { return rows() * width * dims_.heads * dims_.width < 1 << 20; }

  std::vector<RowGroup> groups;

 private:
  void pack(const RowGroup& group, float* wide, float* packed) const {
    thread_local std::vector<T> copy, weights;
    thread_local std::vector<float> weights32;
    for (std::int64_t i = 0; i < group.rows; ++i) {
      std::ptrdiff_t stride;
      const std::int64_t t = group.first + i;
      const T* const iq = iq_.dense_matrix<T>(t, copy, stride);
      const bool same = w_.kind == iq_.kind;
      loops_.pack(dims_, iq, stride, same ? weights_.dense_row<T>(t, weights) : nullptr,
                  same ? nullptr : weights_.dense_row<float>(t, weights32), i, wide, packed);
    }
  }

  // The keys of a block of positions, and their scales if they have such; the last fills the block.
  void locate(std::int64_t request, std::int64_t begin, std::int64_t end, const char** to, float* scales) const {
    std::int64_t k = 0;
    for (std::int64_t position = begin; position < std::min(end, begin + kIndexerKeys);) {
      const std::int64_t size = requests_.block_size(), slot = requests_.slot(request, position);
      const std::int64_t run = std::min({end, begin + kIndexerKeys, (position / size + 1) * size}) - position;
      for (std::int64_t i = 0; i < run; ++i) {
        if (scales_.data) scales[k] = *scales_.row<float>(slot + i);
        to[k++] = keys_.row<char>(slot + i);
      }
      position += run;
    }
    std::fill(to + k, to + kIndexerKeys, to[k - 1]);
  }

  const Array &iq_, &w_;
  const Matrix weights_, keys_, scales_;
  const Requests& requests_;
  const Matrix visible_;
  const IndexerDims dims_;
  const IndexerLoops<T>& loops_;
};

// f(scorer) for operands that are checked.
template <class F>
void with_scorer(const Array& iq, const Array& w, const Array& keys, const Array* key_scale, const Array& visible,
                 const Array& cu_q, const Array& block_table, std::int64_t block_size, double scale, F&& f) {
  iq.is_float();
  iq.is_shape({kAny, kAny, kAny});
  keys.has(key_scale ? Kind::i8 : iq.kind);
  if (key_scale) key_scale->has(Kind::f32);
  if (w.kind != iq.kind) w.has(Kind::f32);
  visible.has(Kind::i32);
  const Matrix rows = keys.matrix(kAny, iq.shape[2]), sees = visible.vector(iq.shape[0]);
  const Requests requests(cu_q, block_table, block_size, iq.shape[0], rows.rows);
  with_float(iq.kind, [&](auto tag) {
    using T = decltype(tag);
    if (!(key_scale ? rows.packed<char>() : rows.packed<T>())) refuse("keys", "has gaps inside a row", "rows of unit stride");
    const Matrix scales = key_scale ? key_scale->matrix(rows.rows, 1) : Matrix{};
    f(Scorer<T>(iq, w, rows, scales, requests, sees, static_cast<float>(scale)));
  });
}

}  // namespace porthal
#endif
