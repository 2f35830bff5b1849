// The k greatest of a row's scores, exact for any input: candidates are collected by a threshold that rises, and cut down to k
// by radix selection on order-preserving keys whenever there are too many.
#pragma once

#include "isa.hpp"

namespace porthal {

template <class T>
struct SelectLoops {
  // Appends key and position, first + i, of every score whose key is >= threshold, in order, and returns how many. There must
  // be room for kSelectSlack more.
  std::size_t (*collect)(const T* scores, std::size_t n, std::uint32_t threshold, std::uint32_t first, std::uint32_t* keys,
                         std::uint32_t* positions);
  // Keeps, in order, the keys above edge and the first `ties` of those that equal it; with their positions.
  std::size_t (*keep)(std::uint32_t* keys, std::uint32_t* positions, std::size_t n, std::uint32_t edge, std::size_t ties);
  // Writes the keys from low to high, in order, and returns how many.
  std::size_t (*between)(const std::uint32_t* keys, std::size_t n, std::uint32_t low, std::uint32_t high, std::uint32_t* to);
  void (*range)(const std::uint32_t* keys, std::size_t n, std::uint32_t* low, std::uint32_t* high);
};

}  // namespace porthal

#if !defined(PORTHAL_ISA)
#include <algorithm>
#include <cmath>
#include <vector>

#include "packed.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<SelectLoops>, select_loops)

constexpr std::size_t kSelectSlack = 16;

template <class T>
class Candidates {
 public:
  void use(const SelectLoops<T>& loops) { loops_ = &loops; }

  // A row that wants k of scores whose keys are >= threshold.
  void begin(std::size_t k, std::uint32_t threshold = 0) {
    k_ = k;
    count_ = 0;
    threshold_ = threshold;
  }

  void add(const T* scores, std::size_t n, std::uint32_t first) {
    for (std::size_t i = 0; i < n;) {
      const std::size_t some = std::min(n - i, std::max<std::size_t>(4 * k_, kLeast));
      room(count_ + some);
      count_ += loops_->collect(scores + i, some, threshold_, first + static_cast<std::uint32_t>(i), keys_.data() + count_,
                               positions_.data() + count_);
      i += some;
      if (count_ >= 4 * k_ && i < n) cut();
    }
    if (count_ >= 4 * std::max(k_, kLeast)) cut();
  }

  // The positions of the k greatest, ascending; of equal scores the first. How many there are, if fewer than k.
  std::size_t finish(std::int32_t* to) {
    cut();
    std::copy_n(positions_.data(), count_, to);
    return count_;
  }

  // The same with their keys, for `take` of a row that is put together from parts of it, in their order.
  std::size_t finish(std::uint32_t* keys, std::int32_t* to) {
    finish(to);
    std::copy_n(keys_.data(), count_, keys);
    return count_;
  }
  void take(const std::uint32_t* keys, const std::int32_t* positions, std::size_t n) {
    room(count_ + n);
    std::copy_n(keys, n, keys_.data() + count_);
    std::copy_n(positions, n, positions_.data() + count_);
    count_ += n;
  }

  std::size_t count() const { return count_; }

  // A threshold that about k of n scores reach, a little low, guessed from some of them. Only speed depends on it.
  std::uint32_t guess(const T* scores, std::size_t n, std::size_t k) {
    constexpr std::size_t kRuns = 64, kRun = 16, kSample = kRuns * kRun;
    const double expected = static_cast<double>(k) * kSample / n;
    const std::size_t rank = static_cast<std::size_t>(expected + 4 * std::sqrt(expected) + 4);
    if (n < 4 * kSample || rank > kSample / 2) return 0;
    begin(rank);
    room(kSample);
    for (std::size_t i = 0; i < kRuns; ++i)
      count_ += loops_->collect(scores + (n - kRun) / (kRuns - 1) * i, kRun, 0, 0, keys_.data() + count_, positions_.data() + count_);
    std::size_t ties = rank;
    return edge(&ties);
  }

 private:
  static constexpr std::size_t kLeast = 1024, kBins = 256;

  void room(std::size_t n) {
    if (keys_.size() >= n + kSelectSlack) return;
    keys_.resize(n + kSelectSlack);
    positions_.resize(n + kSelectSlack);
    some_.resize(n + kSelectSlack);
  }

  void cut() {
    if (count_ <= k_) return;
    if (k_ == 0) {
      count_ = 0;
      return;
    }
    std::size_t ties = k_;
    const std::uint32_t least = edge(&ties);
    count_ = loops_->keep(keys_.data(), positions_.data(), count_, least, ties);
    threshold_ = std::max(threshold_, least + 1);  // later scores lose to equal ones
  }

  // The key of rank *rank from the top; *rank becomes how many of its equals are among those of that rank and above.
  std::uint32_t edge(std::size_t* rank) {
    std::size_t n = count_, k = *rank;
    const std::uint32_t* keys = keys_.data();
    for (;;) {
      std::uint32_t low, high;
      loops_->range(keys, n, &low, &high);
      if (low == high) break;
      if (n <= 64) {
        std::uint32_t* const some = some_.data();
        if (keys != some) std::copy_n(keys, n, some);
        std::sort(some, some + n, [](std::uint32_t a, std::uint32_t b) { return a > b; });
        low = some[k - 1];
        k -= std::find(some, some + n, low) - some;
        *rank = k;
        return low;
      }
      const std::uint32_t span = high - low;
      const int shift = std::max(0, 32 - __builtin_clz(span) - 8);
      std::uint32_t counts[4][kBins] = {};  // four, because neighbours often fall into the same bin
      std::size_t i = 0;
      for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; ++j) ++counts[j][(keys[i + j] - low) >> shift];
      for (; i < n; ++i) ++counts[0][(keys[i] - low) >> shift];
      std::uint32_t bin = kBins - 1;
      for (;; --bin) {
        const std::size_t here = counts[0][bin] + counts[1][bin] + counts[2][bin] + counts[3][bin];
        if (here >= k) break;
        k -= here;
      }
      const std::uint32_t first = low + (bin << shift), width = (1u << shift) - 1;
      n = loops_->between(keys, n, first, std::min(high - first, width) + first, some_.data());
      keys = some_.data();
    }
    *rank = k;
    return keys[0];
  }

  const SelectLoops<T>* loops_ = nullptr;
  std::vector<std::uint32_t> keys_, positions_, some_;
  std::size_t k_ = 0, count_ = 0;
  std::uint32_t threshold_ = 0;
};

}  // namespace porthal
#endif
