// topk(indexer_scores(...)) without the scores in memory: those of a chunk of positions go to each row's candidates.
#include <numeric>

#include "bind.hpp"
#include "indexer.hpp"
#include "selection.hpp"
#include "threads.hpp"

namespace porthal {
namespace {

constexpr std::int64_t kRange = 8 * kIndexerChunk;  // positions that are worth a thread
constexpr std::int64_t kRangesRoom = 1 << 23;       // candidates of all ranges together

template <class T>
struct Run {
  const Scorer<T>& scorer;
  const std::int64_t k;
  std::int32_t* const indices;

  // The candidates of a group's rows among the positions [begin, end).
  std::vector<Candidates<float>>& best(const RowGroup& group, std::int64_t begin, std::int64_t end) const {
    thread_local std::vector<Candidates<float>> candidates(Scorer<T>::kMostRows);
    thread_local Scratch<float> memory;
    float* const scores = memory.at_least(Scorer<T>::kMostRows * kIndexerChunk);
    for (std::int64_t i = 0; i < group.rows; ++i) {
      candidates[i].use(select_loops(isa()).f32);
      candidates[i].begin(k);
    }
    for (std::int64_t at = begin; at < end; at += kIndexerChunk) {
      const std::int64_t stop = std::min(end, at + kIndexerChunk);
      scorer.score(group, at == begin, at, stop, scores, kIndexerChunk);
      for (std::int64_t i = 0; i < group.rows; ++i)
        if (const std::int64_t sees = std::min(scorer.visible(group.first + i), stop) - at; sees > 0)
          candidates[i].add(scores + i * kIndexerChunk, sees, at);
    }
    return candidates;
  }

  std::int64_t most(const RowGroup& group) const {  // positions that one of its rows sees
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < group.rows; ++i) most = std::max(most, scorer.visible(group.first + i));
    return most;
  }

  void finish(std::int64_t t, Candidates<float>& candidates) const {
    std::int32_t* const to = indices + t * k;
    std::fill(to + candidates.finish(to), to + k, -1);
  }

  void whole(std::int64_t from, std::int64_t to) const {
    for (std::int64_t g = from; g < to; ++g) {
      const RowGroup& group = scorer.groups[g];
      if (most(group) <= k) {  // all are chosen
        for (std::int64_t t = group.first; t < group.first + group.rows; ++t) {
          std::int32_t *const to = indices + t * k, *const end = to + std::max<std::int64_t>(scorer.visible(t), 0);
          std::iota(to, end, 0);
          std::fill(end, to + k, -1);
        }
        continue;
      }
      std::vector<Candidates<float>>& candidates = best(group, 0, most(group));
      for (std::int64_t i = 0; i < group.rows; ++i) finish(group.first + i, candidates[i]);
    }
  }

  // Where there are fewer groups than threads can share, ranges of positions are handed out, and their best chosen from.
  void split(std::int64_t ranges) const {
    thread_local Scratch<std::uint32_t> keys_of_caller;
    thread_local Scratch<std::int32_t> positions_of_caller;
    thread_local std::vector<std::size_t> counts_of_caller;
    const std::int64_t rows = scorer.rows();
    std::uint32_t* const keys = keys_of_caller.at_least(rows * ranges * k);
    std::int32_t* const positions = positions_of_caller.at_least(rows * ranges * k);
    std::vector<std::size_t>& counts = counts_of_caller;
    counts.assign(rows * ranges, 0);
    parallel_for(scorer.groups.size() * ranges, 1, [&](std::int64_t from, std::int64_t to) {
      for (std::int64_t item = from; item < to; ++item) {
        const RowGroup& group = scorer.groups[item / ranges];
        const std::int64_t range = item % ranges, begin = range * kRange, end = std::min(begin + kRange, most(group));
        if (begin >= end) continue;
        std::vector<Candidates<float>>& candidates = best(group, begin, end);
        for (std::int64_t i = 0; i < group.rows; ++i) {
          const std::int64_t place = (group.first + i) * ranges + range;
          counts[place] = candidates[i].finish(keys + place * k, positions + place * k);
        }
      }
    });
    parallel_for(rows, 1, [&](std::int64_t from, std::int64_t to) {
      thread_local Candidates<float> candidates;
      candidates.use(select_loops(isa()).f32);
      for (std::int64_t t = from; t < to; ++t) {
        candidates.begin(k);
        for (std::int64_t place = t * ranges; place < (t + 1) * ranges; ++place)
          candidates.take(keys + place * k, positions + place * k, counts[place]);
        finish(t, candidates);
      }
    });
  }

  void run() const {
    const std::int64_t groups = scorer.groups.size(), threads = num_threads();
    std::int64_t width = 0;
    for (const RowGroup& group : scorer.groups) width = std::max(width, most(group));
    const std::int64_t ranges = ceil_div(width, kRange);
    if (threads > 1 && groups < 4 * threads && ranges > 1 && scorer.rows() * ranges * k < kRangesRoom) return split(ranges);
    parallel_for(groups, scorer.alone(width) ? groups : 1, [&](std::int64_t from, std::int64_t to) { whole(from, to); });
  }
};

void indexer_topk(const Array& iq, const Array& w, const Array& keys, const Array* key_scale, const Array& visible,
                  const Array& cu_q,
                  const Array& block_table, std::int64_t block_size, double scale, std::int64_t k, const Array& indices) {
  indices.has(Kind::i32);
  if (k < 0) refuse("k", "is " + std::to_string(k), "at least 0");
  auto* const out = static_cast<std::int32_t*>(indices.output({iq.dims ? iq.shape[0] : 0, k}));
  with_scorer(iq, w, keys, key_scale, visible, cu_q, block_table, block_size, scale, [&](const auto& scorer) {
    using T = typename std::decay_t<decltype(scorer)>::Element;
    Run<T>{scorer, k, out}.run();
  });
}

}  // namespace

PORTHAL_OP(indexer_topk, "iq w keys key_scale visible cu_q block_table block_size scale k indices",
           "indices[T, k] int32 = topk of indexer_scores, which are never stored: the positions of the min(k, visible) greatest\n"
           "scores of each row, ascending, of equal scores the first; the rest is -1. Operands as for indexer_scores.")

}  // namespace porthal
