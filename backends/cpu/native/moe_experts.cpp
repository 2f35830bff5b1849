// The experts of a mixture: gate and up, silu, down, weighted sum; grouped by expert, weights read once per row block.
#include "isa.hpp"

namespace porthal {

template <class T>
struct ExpertLoops {
  // sums[rows, panel] = a[rows][depth] . panel. Each sum runs over depth in one fixed order, whatever rows is.
  // `following` is the panel that this thread reads next, or null: its beginning is fetched meanwhile.
  void (*multiply)(const T* const* a, std::int64_t rows, const T* panel, std::int64_t depth, const T* following,
                   float* sums);
  // h[rows, panel/2] = silu(gate half of sums) * up half of sums, `columns` of them, rows `stride` elements apart.
  void (*gate)(const float* sums, std::int64_t rows, T* h, std::int64_t stride, std::int64_t columns);
  // y[columns] = sum over j ascending of weights[j] * sums[picks[j]], skipping picks[j] < 0.
  void (*combine)(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, T* y,
                  std::int64_t columns);
};

template <template <class> class Loops>
struct PerPacked {  // element types that weights are packed in
  Loops<float> f32;
  Loops<bf16> b16;

  const Loops<float>& of(const float*) const { return f32; }
  const Loops<bf16>& of(const bf16*) const { return b16; }
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "gemm.hpp"

namespace porthal {
namespace {

template <class T>
void gate(const float* sums, std::int64_t rows, T* h, std::int64_t stride, std::int64_t columns) {
  for (std::int64_t m = 0; m < rows; ++m, sums += kPanel, h += stride)
    for (std::int64_t i = 0; i < columns; i += kLanes) {
      const F g = load(sums + i), up = load(sums + kPanel / 2 + i), v = g / (1.0f + exp(-g)) * up;
      if (columns - i >= kLanes)
        store(h + i, v);
      else
        store_some(h + i, v, columns - i);
    }
}

template <class T>
void combine(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, T* y,
             std::int64_t columns) {
  F out[kVectors] = {};
  for (std::int64_t j = 0; j < count; ++j)
    if (picks[j] >= 0)
      for (int v = 0; v < kVectors; ++v)
        out[v] += weights[j] * load(sums + static_cast<std::int64_t>(picks[j]) * kPanel + v * kLanes);
  for (int v = 0; v < kVectors && v * kLanes < columns; ++v)
    if (columns - v * kLanes >= kLanes)
      store(y + v * kLanes, out[v]);
    else
      store_some(y + v * kLanes, out[v], columns - v * kLanes);
}

template <class T>
constexpr ExpertLoops<T> loops() {
  return {multiply<T>, gate<T>, combine<T>};
}

}  // namespace

PORTHAL_LOOPS(PerPacked<ExpertLoops>, experts_loops) = {loops<float>(), loops<bf16>()};

}  // namespace porthal
#else
#include <algorithm>

#include "bind.hpp"
#include "packed.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PerPacked<ExpertLoops>, experts_loops)

namespace {

constexpr std::int64_t kRowBlock = 192;     // routed rows that pass over one panel together
constexpr std::int64_t kTokenBlock = 4096;  // tokens per round: bounds the scratch memory

// Which routed rows each expert gets: a stable counting sort of the (token, choice) pairs of one token block.
struct Routing {
  std::vector<std::int32_t> tokens;    // token of each routed row
  std::vector<std::int32_t> picks;     // [token, choice] -> routed row or -1
  std::vector<float> weights;          // [token, choice]
  struct Work {
    std::int64_t expert, first, rows;
  };
  std::vector<Work> work;  // at most kRowBlock rows of one expert each
  std::int64_t active = 0;
  std::vector<std::int64_t> next;

  void build(const Matrix& ids, const Matrix& mix, std::int64_t begin, std::int64_t end, std::int64_t first_expert,
             std::int64_t experts) {
    const std::int64_t choices = ids.columns;
    const auto local = [&](std::int64_t t, std::int64_t j) {
      const std::int64_t id = ids.at<std::int32_t>(t, j), e = id - first_expert;
      return id >= 0 && e >= 0 && e < experts ? e : -1;
    };
    next.assign(experts, 0);
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t j = 0; j < choices; ++j)
        if (const std::int64_t e = local(t, j); e >= 0) ++next[e];
    work.clear();
    active = 0;
    std::int64_t row = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t count = next[e], parts = ceil_div(count, kRowBlock);
      active += count > 0;
      for (std::int64_t part = 0; part < parts; ++part) {
        const std::int64_t first = count * part / parts;
        work.push_back({e, row + first, count * (part + 1) / parts - first});
      }
      next[e] = row;
      row += count;
    }
    tokens.resize(row);
    picks.resize((end - begin) * choices);
    weights.resize((end - begin) * choices);
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t j = 0; j < choices; ++j) {
        const std::int64_t e = local(t, j), slot = (t - begin) * choices + j;
        picks[slot] = e < 0 ? -1 : static_cast<std::int32_t>(next[e]++);
        weights[slot] = mix.at<float>(t, j);
        if (e >= 0) tokens[picks[slot]] = static_cast<std::int32_t>(t);
      }
  }
};

template <class T>
void run(const Matrix& x, const Matrix& ids, const Matrix& weights, const Packed& w13,
                 const Packed& w2, std::int64_t first_expert, T* y) {
  thread_local Routing routing_of_caller;
  thread_local Scratch<T> hidden_of_caller, copy_of_caller;
  Routing& routing = routing_of_caller;
  const ExpertLoops<T>& loops = experts_loops(w13.isa).of(y);
  const std::int64_t width = w13.panel, half = width / 2;
  const std::int64_t model = w13.columns, inner = w2.columns, choices = ids.columns;
  const std::int64_t depth = ceil_div(model, kGroup<T>) * kGroup<T>, stride = ceil_div(inner, kGroup<T>) * kGroup<T>;

  for (std::int64_t begin = 0; begin < x.rows; begin += kTokenBlock) {
    const std::int64_t end = std::min(x.rows, begin + kTokenBlock);
    routing.build(ids, weights, begin, end, first_expert, w13.experts);
    const std::int64_t routed = static_cast<std::int64_t>(routing.tokens.size());
    const std::int64_t works = static_cast<std::int64_t>(routing.work.size());

    // Rows that cannot be read in place (strided, or of odd length in bf16) are copied, padded with zeros.
    const T* rows = x.row<T>(begin);
    std::ptrdiff_t row_stride = x.row_stride;
    if (!x.packed<T>() || depth != model) {
      T* const copy = copy_of_caller.at_least((end - begin) * depth);
      for (std::int64_t t = begin; t < end; ++t)
        for (std::int64_t k = 0; k < depth; ++k) copy[(t - begin) * depth + k] = k < model ? x.at<T>(t, k) : T{};
      rows = copy;
      row_stride = depth * sizeof(T);
    }
    const auto input = [&](std::int64_t routed_row) {
      return reinterpret_cast<const T*>(reinterpret_cast<const char*>(rows) +
                                        (routing.tokens[routed_row] - begin) * row_stride);
    };

    T* const hidden = hidden_of_caller.at_least(routed * stride);
    for (std::int64_t r = 0; r < routed && stride != inner; ++r) hidden[r * stride + inner] = T{};

    // Work that fits a few tens of microseconds is not worth waking anybody for.
    const std::int64_t bytes = routing.active * (w13.panels * w13.panel_bytes + w2.panels * w2.panel_bytes);
    const bool alone = bytes * ceil_div(routed, 8 * std::max<std::int64_t>(1, routing.active)) < (1 << 19);

    const auto panel = [](const Packed& w, std::int64_t expert, std::int64_t p) {
      return reinterpret_cast<const T*>(w.at(expert, p));
    };
    const std::int64_t ups = works * w13.panels;
    const std::int64_t share = std::clamp<std::int64_t>(ups / (16 * num_threads()), 1, 8);
    parallel_for(ups, alone ? ups : share, [&](std::int64_t from, std::int64_t to) {
      alignas(64) float sums[kRowBlock * 64];
      const T* a[kRowBlock];
      for (std::int64_t i = from; i < to; ++i) {
        const Routing::Work& work = routing.work[i / w13.panels];
        const std::int64_t p = i % w13.panels;
        for (std::int64_t m = 0; m < work.rows; ++m) a[m] = input(work.first + m);
        const std::int64_t then = i + 1;
        const T* const following =
            then < to ? panel(w13, routing.work[then / w13.panels].expert, then % w13.panels) : nullptr;
        loops.multiply(a, work.rows, panel(w13, work.expert, p), depth, following, sums);
        loops.gate(sums, work.rows, hidden + work.first * stride + p * half, stride, std::min(half, inner - p * half));
      }
    });

    parallel_for(w2.panels, alone ? w2.panels : 1, [&](std::int64_t from, std::int64_t to) {
      thread_local Scratch<float> sums_of_thread;
      float* const sums = sums_of_thread.at_least(routed * width);
      const T* a[kRowBlock];
      for (std::int64_t p = from; p < to; ++p) {
        for (std::int64_t i = 0; i < works; ++i) {
          const Routing::Work& work = routing.work[i];
          for (std::int64_t m = 0; m < work.rows; ++m) a[m] = hidden + (work.first + m) * stride;
          const T* const following = i + 1 < works ? panel(w2, routing.work[i + 1].expert, p) : nullptr;
          loops.multiply(a, work.rows, panel(w2, work.expert, p), stride, following, sums + work.first * width);
        }
        for (std::int64_t t = begin; t < end; ++t) {
          const std::int64_t slot = (t - begin) * choices;
          loops.combine(sums, routing.picks.data() + slot, routing.weights.data() + slot, choices,
                        y + t * model + p * width, std::min(width, model - p * width));
        }
      }
    });
  }
}

void moe_experts(const Array& x, const Array& ids, const Array& weights, const Packed& w13, const Packed& w2,
                 std::int64_t first_expert, const Array& y) {
  if (x.kind != w13.kind() || w13.is_bf16 != w2.is_bf16) throw std::invalid_argument("x, w13 and w2 differ in dtype.");
  if (!w13.gated || w2.gated) throw std::invalid_argument("w13 must be packed with gated=True and w2 without.");
  if (w13.experts != w2.experts || w13.rows != 2 * w2.columns || w13.columns != w2.rows)
    throw std::invalid_argument("w13 and w2 do not fit together: w13 is [E, 2I, H] and w2 is [E, H, I].");
  if (w13.isa != w2.isa) throw std::invalid_argument("w13 and w2 were packed for different instruction sets.");
  ids.has(Kind::i32);
  weights.has(Kind::f32);
  y.has(x.kind);
  const Matrix rows = x.matrix(kAny, w13.columns), chosen = ids.matrix(rows.rows);
  const Matrix mix = weights.matrix(rows.rows, chosen.columns);
  void* const out = y.output({rows.rows, rows.columns});
  if (x.kind == Kind::f32)
    run(rows, chosen, mix, w13, w2, first_expert, static_cast<float*>(out));
  else
    run(rows, chosen, mix, w13, w2, first_expert, static_cast<bf16*>(out));
}

}  // namespace

PORTHAL_OP(moe_experts, "x ids weights w13 w2 first_expert y",
           "y[t] = sum_j weights[t, j] * w2[e] @ (silu(gate) * up), [gate; up] = w13[e] @ x[t], e = ids[t, j] -\n"
           "first_expert; ids negative or not held here add nothing. x, y [T, H]; ids int32 and weights float32\n"
           "[T, K]. Sums in float32 in a fixed order: a row of y depends on its own inputs only, bit by bit. In bf16\n"
           "silu(gate) * up is rounded, and subnormal products may count as 0.")

}  // namespace porthal
#endif
