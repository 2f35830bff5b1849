// Scores of the indexer for a group of rows and a range of positions, for the two operators that need them.
#pragma once

#include "isa.hpp"

namespace porthal {

constexpr std::int64_t kIndexerKeys = 64;  // of a block at most, which with a row's queries is in L1
constexpr std::int64_t kIndexerChunk = 24 * kIndexerKeys;

struct IndexerDims {
  std::int64_t heads, width;
  float scale;
};

// A block of keys and, of codes, their scales: a run, from the first on `apart` bytes from each other, or where that is 0
// anywhere.
struct KeyBlock {
  const char* key[kIndexerKeys];
  std::ptrdiff_t apart;
  const float* scales;
  float copied[kIndexerKeys];

  const char* at(std::int64_t k) const { return apart ? key[0] + k * apart : key[k]; }
};

template <class T>
struct IndexerLoops {
  std::int64_t keys;  // of a block
  bool runs;          // whether a block may be one
  std::int64_t (*wide)(const IndexerDims&);    // floats that a thread needs
  std::int64_t (*packed)(const IndexerDims&);  // floats that a row's queries and weights take, packed
  // Packs the i-th row; its weights are of T or, where those are null, float32.
  void (*pack)(const IndexerDims&, const T* iq, std::ptrdiff_t stride, const T* weights, const float* weights32, std::int64_t i,
               float* wide, float* packed);
  // Scores of a block for packed rows; of row i the first visible[i] are written, to out + i * stride. Meanwhile fetches the
  // following block.
  void (*scores)(const IndexerDims&, const KeyBlock& keys, const KeyBlock& following, float* wide, const float* packed,
                 std::int64_t rows, const std::int64_t* visible, float* out, std::int64_t stride);
};

// The same for keys that are codes; queries become such too. For rows of any width, and of whole cache lines for more than a
// few heads.
template <class T>
struct CodedIndexer {
  IndexerLoops<T> each, lines;
};
template <class T>
struct CodedIndexers {
  CodedIndexer<T> int8, e4m3;
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
PORTHAL_TABLES_WITH_TILES(PerFloat<CodedIndexers>, coded_indexer_loops)

template <class T>
const IndexerLoops<T>& indexer_loops_of(const IndexerDims& d, Kind keys) {
  const T* const type = nullptr;
  if (keys != Kind::i8 && keys != Kind::u8) return indexer_loops(isa()).of(type, d.width);
  const CodedIndexers<T>& of_type = coded_indexer_loops(isa()).of(type);
  const CodedIndexer<T>& found = keys == Kind::i8 ? of_type.int8 : of_type.e4m3;
  const bool lines = d.width % 64 == 0 && d.heads >= 16 && (keys == Kind::i8 || d.width <= 128);  // a scale for each query
  return lines ? found.lines : found.each;
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

  Scorer(const Array& iq, const Array& w, Kind kind, const Matrix& keys, const Matrix& scales, const Requests& requests,
         const Matrix& visible, float scale)
      : iq_(iq), w_(w), weights_(w.matrix(iq.shape[0], iq.shape[1])), keys_(keys), scales_(scales), requests_(requests),
        visible_(visible), dims_{iq.shape[1], iq.shape[2], scale},
        loops_(indexer_loops_of<T>(dims_, kind)) {
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
    KeyBlock blocks[2];
    locate(group.request, begin, begin + most, blocks[0]);
    int now = 0;
    for (std::int64_t at = begin; at < begin + most; at += loops_.keys, now = 1 - now) {
      const bool more = at + loops_.keys < begin + most;
      if (more) locate(group.request, at + loops_.keys, begin + most, blocks[1 - now]);
      for (std::int64_t i = 0; i < group.rows; ++i) sees[i] = std::min(visible(group.first + i), end) - at;
      loops_.scores(dims_, blocks[now], blocks[more ? 1 - now : now], wide, packed, group.rows, sees, out + (at - begin), stride);
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
  void locate(std::int64_t request, std::int64_t begin, std::int64_t end, KeyBlock& block) const {
    const std::int64_t size = requests_.block_size();
    std::int64_t k = 0;
    block.apart = 0;
    block.scales = scales_.data ? block.copied : nullptr;
    for (std::int64_t position = begin; position < std::min(end, begin + loops_.keys);) {
      const std::int64_t slot = requests_.slot(request, position);
      const std::int64_t run = std::min({end, begin + loops_.keys, (position / size + 1) * size}) - position;
      if (run == loops_.keys && loops_.runs && keys_.row_stride && (!scales_.data || scales_.row_stride == sizeof(float))) {
        block.key[0] = keys_.row<char>(slot);
        block.apart = keys_.row_stride;
        if (scales_.data) block.scales = scales_.row<float>(slot);
        return;
      }
      for (std::int64_t i = 0; i < run; ++i) {
        if (scales_.data) block.copied[k] = *scales_.row<float>(slot + i);
        block.key[k++] = keys_.row<char>(slot + i);
      }
      position += run;
    }
    std::fill(block.key + k, block.key + loops_.keys, block.key[k - 1]);
    std::fill(block.copied + k, block.copied + loops_.keys, 1.0f);
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
  if (key_scale)
    keys.is_one_of({Kind::i8, Kind::u8}, "native int8, or uint8 of e4m3"), key_scale->has(Kind::f32);
  else
    keys.has(iq.kind);
  if (w.kind != iq.kind) w.has(Kind::f32);
  visible.has(Kind::i32);
  const Matrix rows = keys.matrix(kAny, iq.shape[2]), sees = visible.vector(iq.shape[0]);
  const Requests requests(cu_q, block_table, block_size, iq.shape[0], rows.rows);
  with_float(iq.kind, [&](auto tag) {
    using T = decltype(tag);
    if (!(key_scale ? rows.packed<char>() : rows.packed<T>())) refuse("keys", "has gaps inside a row", "rows of unit stride");
    const Matrix scales = key_scale ? key_scale->matrix(rows.rows, 1) : Matrix{};
    f(Scorer<T>(iq, w, keys.kind, rows, scales, requests, sees, static_cast<float>(scale)));
  });
}

}  // namespace porthal
#endif
