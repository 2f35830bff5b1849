// The distribution that a row of logits is drawn from: softmax at a temperature, cut to top-k and top-p.
//
// Nothing is sorted but the few candidates among which a bound falls: one pass over a row adds up weights by bins of falling
// logits, another collects the bin that a bound falls in.
#pragma once

#include "logits.hpp"

namespace porthal {

constexpr std::int64_t kBins = 512, kCopies = 4;  // copies, because neighbours often fall into the same bin

// How the candidates of a row are weighed: exp((x - top) * inverse), 0 where x is NaN or -inf; and what bin they fall in.
struct Scale {
  float top, inverse, bins_per;  // bins per unit of logits below the top; the last bin holds all that lie deeper
};

// The last candidate that is kept, in the order of falling logits, equal ones by index.
struct Bound {
  float value;
  std::int64_t index;
};

template <class T>
struct SampleLoops {  // one row of n
  float (*highest)(const T* x, std::int64_t n);  // NaN aside
  // Of `count` elements that lie evenly in the row, as floats.
  void (*sample)(const T* x, std::int64_t n, float* some, std::int64_t count);
  // masses[kCopies][kBins] += the weight of each element, or 1 of each that is above -inf.
  void (*fill)(const T* x, std::int64_t n, const Scale& scale, bool ones, double* masses);
  // The elements from `least` on that fall in bins first to last, in the order of indices; returns how many. Room for n + 16.
  std::int64_t (*collect)(const T* x, std::int64_t n, const Scale& scale, std::int64_t first, std::int64_t last, float least,
                          float* values, float* weights, std::uint32_t* indices);
  // p[i] = max(weight * factor - q[i], 0) for begin <= i < end, with weight 0 behind the bound, q null: 0; returns the sum.
  double (*rest)(const T* x, std::int64_t begin, std::int64_t end, const Scale& scale, const Bound& bound, float factor,
                 const float* q, float* p);
};

}  // namespace porthal

#if !defined(PORTHAL_ISA)
#include <algorithm>
#include <cstring>
#include <vector>

namespace porthal {

PORTHAL_TABLES(PerFloat<SampleLoops>, sample_loops)

constexpr float kInfinity = __builtin_inff();
constexpr std::int64_t kSome = 1024;

struct Candidate {
  std::uint64_t order;  // falling logits, then rising indices
  float value, weight;
};

// Where a bound on the cumulated weight falls: the element, and the weight up to it, its own included.
struct Place {
  Bound at;
  double mass;
};

inline std::uint64_t order_of(float value, std::uint32_t index) {
  value += 0.0f;  // -0 is 0
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const std::uint32_t rising = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<std::uint64_t>(~rising) << 32 | index;
}

// The distribution that one row is drawn from, and the memory that finding a bound in it takes.
template <class T>
class Drawn {
 public:
  bool certain = false;  // all of it is on `only`
  std::int64_t only = 0;
  Bound last{};      // the last candidate that is kept
  double mass = 0;   // the weight of those that are kept
  Scale scale{};

  void make(const T* row, std::int64_t n, float temperature, std::int64_t top_k, float top_p) {
    x_ = row;
    n_ = n;
    loops_ = &sample_loops(isa()).of(row);
    const float top = loops_->highest(row, n);
    certain = temperature == 0 || !(top < kInfinity) || top == -kInfinity;
    if (certain) {
      only = logit_loops(isa()).of(row).argmax(row, n);
      return;
    }
    // The bins reach down to the lowest of some elements: those below it, a few, share the last one.
    some_.resize(std::min(n, kSome));
    loops_->sample(row, n, some_.data(), static_cast<std::int64_t>(some_.size()));
    float low = top;
    for (const float v : some_) low = v < low && v > -kInfinity ? v : low;
    const float span = std::min(top - low, 40.0f * temperature);
    scale = {top, 1.0f / temperature, span > 0 ? static_cast<float>(kBins - 1) / span : 0.0f};
    last = {-kInfinity, 0};
    filled_ = false;
    const bool few = top_k > 0 && n >= 4096 && top_k <= n / 16;
    if (few && take_highest(top_k)) {
      sorted_ = true;
    } else {
      sorted_ = false;
      fill(false);
      mass = total_;
      if (top_k > 0 && top_k < n) {
        const double target = static_cast<double>(top_k) - 0.5;
        fill(true);
        if (total_ > target) {  // by rank: every candidate counts as 1
          last = find(target, true, true).at;
          mass = kept_mass();
        }
        fill(false);
      }
    }
    if (top_p < 1.0f) {
      const Place cut = find(static_cast<double>(top_p) * mass, false, false);
      last = cut.at;
      mass = cut.mass;
    }
  }

  // The first candidate, in the order of falling logits, at which the cumulated weight exceeds u times all of it.
  std::int64_t draw(float u) {
    if (certain) return only;
    const Bound at = find(static_cast<double>(u) * mass, true, false).at;
    return order_of(at.value, 0) > order_of(last.value, 0) || (at.value == last.value && at.index > last.index) ? last.index
                                                                                                                : at.index;
  }

  float weight(std::int64_t i) const {  // of one element, 0 if it is not kept
    float p;
    loops_->rest(x_, i, i + 1, scale, last, 1.0f, nullptr, &p);
    return p;
  }

  // In the order of indices: the first at which the cumulated max(p - q, 0) exceeds u times all of it. q is null, or a row,
  // or all on one index, `whole`.
  std::int64_t draw_rest(float u, const float* q, std::int64_t whole) {
    if (certain) return only;
    constexpr std::int64_t kBlock = 1024;
    const float factor = static_cast<float>(1.0 / mass);
    float p[kBlock];
    const auto block = [&](std::int64_t begin) {
      const std::int64_t end = std::min(n_, begin + kBlock);
      double sum = loops_->rest(x_, begin, end, scale, last, factor, q, p);
      if (whole >= begin && whole < end) {
        p[whole - begin] = 0;
        sum = 0;
        for (std::int64_t i = 0; i < end - begin; ++i) sum += p[i];
      }
      return sum;
    };
    sums_.assign(1, 0.0);
    for (std::int64_t i = 0; i < n_; i += kBlock) sums_.push_back(sums_.back() + block(i));
    if (!(sums_.back() > 0)) return draw_rest(u, nullptr, -1);  // p equals q: the rejection came from rounding
    const double target = static_cast<double>(u) * sums_.back();
    std::int64_t at = 0;
    while (at + 2 < static_cast<std::int64_t>(sums_.size()) && !(sums_[at + 1] > target)) ++at;
    block(at * kBlock);
    std::int64_t chosen = last.index;
    double sum = sums_[at];
    for (std::int64_t i = at * kBlock; i < std::min(n_, (at + 1) * kBlock) && !(sum > target); ++i) {
      sum += p[i % kBlock];
      if (p[i % kBlock] > 0) chosen = i;
    }
    return chosen;
  }

 private:
  const T* x_ = nullptr;
  std::int64_t n_ = 0;
  const SampleLoops<T>* loops_ = nullptr;
  bool filled_ = false, ones_ = false, sorted_ = false;
  double total_ = 0;
  std::vector<double> bins_, sums_;
  std::vector<Candidate> list_, kept_;
  std::vector<float> values_, weights_, some_;
  std::vector<std::uint32_t> indices_;

  std::int64_t collect(std::int64_t first, std::int64_t last_bin, float least) {
    if (static_cast<std::int64_t>(values_.size()) < n_ + 16) {
      values_.resize(n_ + 16);
      weights_.resize(n_ + 16);
      indices_.resize(n_ + 16);
    }
    return loops_->collect(x_, n_, scale, first, last_bin, least, values_.data(), weights_.data(), indices_.data());
  }

  void listed(std::int64_t count) {
    list_.resize(count);
    for (std::int64_t i = 0; i < count; ++i) list_[i] = {order_of(values_[i], indices_[i]), values_[i], weights_[i]};
  }

  static Bound bound(const Candidate& c) { return {c.value, static_cast<std::int64_t>(c.order & 0xffffffffu)}; }

  // The k highest in order, with their mass; false where a guess from some of them was too high.
  bool take_highest(std::int64_t k) {
    const double expected = static_cast<double>(k) * kSome / n_;
    const auto rank = some_.begin() + std::min<std::int64_t>(kSome - 1, expected + 4 * __builtin_sqrt(expected) + 4);
    for (float& v : some_) v = v > -kInfinity ? v : -kInfinity;
    std::nth_element(some_.begin(), rank, some_.end(), [](float a, float b) { return a > b; });
    if (*rank == -kInfinity) return false;
    const std::int64_t found = collect(0, kBins - 1, *rank);
    if (found < k) return false;
    listed(found);
    const auto before = [](const Candidate& a, const Candidate& b) { return a.order < b.order; };
    std::nth_element(list_.begin(), list_.begin() + (k - 1), list_.end(), before);
    list_.resize(k);
    std::sort(list_.begin(), list_.end(), before);
    mass = 0;
    for (const Candidate& c : list_) mass += c.weight;
    last = bound(list_.back());
    return true;
  }

  void fill(bool ones) {
    if (filled_ && ones_ == ones) return;
    bins_.assign(kBins * kCopies, 0.0);
    loops_->fill(x_, n_, scale, ones, bins_.data());
    total_ = 0;
    for (std::int64_t b = 0; b < kBins; ++b) {
      for (std::int64_t j = 1; j < kCopies; ++j) bins_[b] += bins_[j * kBins + b];
      total_ += bins_[b];
    }
    filled_ = true;
    ones_ = ones;
  }

  double kept_mass() {
    constexpr std::int64_t kBlock = 1024;
    float p[kBlock];
    double all = 0;
    for (std::int64_t i = 0; i < n_; i += kBlock)
      all += loops_->rest(x_, i, std::min(n_, i + kBlock), scale, last, 1.0f, nullptr, p);
    return all;
  }

  // The first candidate at which the cumulated weight is above the target, or at least the target.
  Place find(double target, bool above, bool ones) {
    const auto reached = [=](double mass) { return above ? mass > target : mass >= target; };
    double before = 0;
    if (sorted_) return walk(list_, 0.0, reached);
    std::int64_t b = 0, some = 0;  // the bin, and the last one with anything in it
    for (; b < kBins && !reached(before + bins_[b]); ++b) {
      if (bins_[b] > 0) some = b;
      before += bins_[b];
    }
    if (b == kBins) {
      b = some;
      before -= bins_[b];
    }
    listed(collect(b, b, -kInfinity));
    if (ones)
      for (Candidate& c : list_) c.weight = 1.0f;
    while (list_.size() > 64) {  // each round keeps one bin of the range that the candidates span
      std::uint32_t low = ~0u, high = 0;
      for (const Candidate& c : list_) {
        low = std::min(low, static_cast<std::uint32_t>(c.order >> 32));
        high = std::max(high, static_cast<std::uint32_t>(c.order >> 32));
      }
      if (low == high) return walk(list_, before, reached);  // by index, as they are
      constexpr int kBits = 8;
      const int width = 32 - __builtin_clz(high - low), shift = std::max(0, width - kBits);
      const auto bin = [=](const Candidate& c) { return (static_cast<std::uint32_t>(c.order >> 32) - low) >> shift; };
      double masses[1 << kBits] = {};
      for (const Candidate& c : list_) masses[bin(c)] += c.weight;
      std::uint32_t at = 0, full = 0;
      double passed = before;
      for (; at < (1u << kBits) && !reached(passed + masses[at]); ++at) {
        if (masses[at] > 0) full = at;
        passed += masses[at];
      }
      if (at == 1u << kBits) {
        at = full;
        passed -= masses[at];
      }
      before = passed;
      kept_.clear();
      for (const Candidate& c : list_)
        if (bin(c) == at) kept_.push_back(c);
      list_.swap(kept_);
    }
    std::sort(list_.begin(), list_.end(), [](const Candidate& a, const Candidate& b) { return a.order < b.order; });
    return walk(list_, before, reached);
  }

  template <class Reached>
  Place walk(const std::vector<Candidate>& sorted, double before, Reached reached) const {
    Place place{last, before};  // sums that were rounded in another order may fall short of it: then the last that weighs
    for (const Candidate& c : sorted) {
      if (before > 0 && !(c.weight > 0)) continue;
      before += c.weight;
      place = {bound(c), before};
      if (reached(before)) break;
    }
    return place;
  }
};

}  // namespace porthal
#endif
