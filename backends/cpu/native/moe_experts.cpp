// The experts of a mixture: gate and up, silu, down, weighted sum; grouped by expert, weights read once per row block.
#include "isa.hpp"

namespace porthal {

template <class T>
struct ExpertLoops {
  // The rows of the second product: h[rows][columns] = silu(gate half of sums) * up half of sums, rows `stride` bytes apart.
  void (*gate)(const float* sums, std::int64_t rows, char* h, std::int64_t stride, std::int64_t columns);
  // y[columns] = sum over j ascending of weights[j] * sums[picks[j]], skipping picks[j] < 0, and y itself if `add`.
  void (*combine)(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, bool add, T* y,
                  std::int64_t columns);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "panel.hpp"
#include "simd.hpp"

namespace porthal {
namespace {

constexpr int kVectors = 4, kPanel = kVectors * kLanes;  // of a panel

template <class T>
void gate(const float* sums, std::int64_t rows, char* at, std::int64_t stride, std::int64_t columns) {
  for (std::int64_t m = 0; m < rows; ++m, sums += kPanel, at += stride) {
    Row<T>* const h = reinterpret_cast<Row<T>*>(at);
    for (std::int64_t i = 0; i < columns; i += kLanes) {
      const F g = load(sums + i), up = load(sums + kPanel / 2 + i), v = g / (1.0f + exp(-g)) * up;
      if (columns - i >= kLanes)
        store(h + i, v);
      else
        store_some(h + i, v, columns - i);
    }
  }
}

template <class T>
void combine(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, bool add, T* y,
             std::int64_t columns) {
  F out[kVectors] = {};
  for (std::int64_t j = 0; j < count; ++j)
    if (picks[j] >= 0)
      for (int v = 0; v < kVectors; ++v)
        out[v] += weights[j] * load(sums + static_cast<std::int64_t>(picks[j]) * kPanel + v * kLanes);
  for (int v = 0; v < kVectors && v * kLanes < columns; ++v) {
    T* const at = y + v * kLanes;
    const std::int64_t some = columns - v * kLanes;
    if (some >= kLanes)
      store(at, add ? out[v] + load(at) : out[v]);
    else
      store_some(at, add ? out[v] + load_some(at, some) : out[v], some);
  }
}

template <class T>
constexpr ExpertLoops<T> loops() {
  return {gate<T>, combine<T>};
}

}  // namespace

PORTHAL_LOOPS(PerFloat<ExpertLoops>, experts_loops) = {loops<float>(), loops<bf16>(), loops<fp16>()};

}  // namespace porthal
#else
#include <cstring>
#include <vector>

#include "bind.hpp"
#include "packed.hpp"

namespace porthal {

PORTHAL_TABLES(PerFloat<ExpertLoops>, experts_loops)

namespace {

constexpr std::int64_t kTokenBlock = 4096;  // tokens per round: bounds the scratch memory

// Which routed rows each expert gets: a stable counting sort of the (token, choice) pairs of one token block.
struct Routing {
  std::vector<std::int32_t> tokens;    // token of each routed row
  std::vector<std::int32_t> picks;     // [token, choice] -> routed row or -1
  std::vector<float> weights;          // [token, choice]
  struct Work {
    std::int64_t expert, first, rows;
  };
  std::vector<Work> work;  // at most a row block of one expert each
  std::vector<std::int64_t> next;

  // Without ids each token goes to the first expert, with weight 1.
  void build(const Matrix* ids, const Matrix* mix, std::int64_t begin, std::int64_t end, std::int64_t first_expert,
             std::int64_t experts, std::int64_t row_block) {
    const std::int64_t choices = ids ? ids->columns : 1;
    const auto local = [&](std::int64_t t, std::int64_t j) {
      if (!ids) return std::int64_t{0};
      const std::int64_t id = ids->at<std::int32_t>(t, j), e = id - first_expert;
      return id >= 0 && e >= 0 && e < experts ? e : -1;
    };
    next.assign(experts, 0);
    for (std::int64_t t = begin; t < end; ++t)
      for (std::int64_t j = 0; j < choices; ++j)
        if (const std::int64_t e = local(t, j); e >= 0) ++next[e];
    work.clear();
    std::int64_t row = 0;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t count = next[e], parts = ceil_div(count, row_block);
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
        weights[slot] = mix ? mix->at<float>(t, j) : 1.0f;
        if (e >= 0) tokens[picks[slot]] = static_cast<std::int32_t>(t);
      }
  }
};

template <class T>
void run(const Matrix& x, const Matrix* ids, const Matrix* weights, const Packed& w13, const Packed& w2,
         std::int64_t first_expert, bool add, T* y) {
  thread_local Routing routing_of_caller;
  thread_local ReadyRows tokens_of_caller, hidden_of_caller;
  thread_local Scratch<float> values_of_caller;
  Routing& routing = routing_of_caller;
  ReadyRows &tokens = tokens_of_caller, &hidden = hidden_of_caller;
  const std::int64_t item = panel_loops(w13.isa).of(y).item;  // of hidden rows that are not to be quantised
  const bool coded13 = w13.coding != Coding::none, coded2 = w2.coding != Coding::none;
  const Product<T> up = w13.product<T>(), down = w2.product<T>();
  Product<T> down_of_float = down;
  down_of_float.ready = down.ready_float;
  const ExpertLoops<T>& loops = experts_loops(w13.isa).of(y);
  const auto gate = experts_loops(w13.isa).f32.gate;
  const std::int64_t width = w13.panel, half = width / 2;
  const std::int64_t model = w13.columns, inner = w2.columns, choices = ids ? ids->columns : 1;

  for (std::int64_t begin = 0; begin < x.rows; begin += kTokenBlock) {
    const std::int64_t end = std::min(x.rows, begin + kTokenBlock);
    routing.build(ids, weights, begin, end, first_expert, w13.experts, w13.row_block);
    const std::int64_t routed = static_cast<std::int64_t>(routing.tokens.size());
    const std::int64_t works = static_cast<std::int64_t>(routing.work.size());
    const std::int64_t most = ceil_div(routed, std::max<std::int64_t>(1, works));

    // Under a scheme a row is quantised as a whole: a token's once for all its experts, what is hidden after the first product.
    if (coded13)
      tokens.make(up, w13, end - begin, x.column_stride, [&](std::int64_t i) { return x.row<char>(begin + i); });
    float* const values = coded2 ? values_of_caller.at_least(routed * inner) : nullptr;
    if (!coded2) hidden.make_room(routed, down.row_bytes);
    for (std::int64_t r = 0; r < routed && !coded2 && w2.depth != inner; ++r)
      std::memset(hidden[r] + inner * item, 0, (w2.depth - inner) * item);

    const std::int64_t ups = works * w13.panels;
    parallel_for(ups, panels_at_a_time(ups, w13.panel_bytes(), most), [&](std::int64_t from, std::int64_t to) {
      thread_local ReadyRows rows_of_thread;
      thread_local Scratch<float> sums_of_thread;
      ReadyRows& rows = rows_of_thread;
      float* const sums = sums_of_thread.at_least(w13.row_block * width * up.together);
      const void* a[kMostRows];
      for (std::int64_t i = from, then; i < to; i = then) {
        const Routing::Work& work = routing.work[i / w13.panels];
        const std::int64_t p = i % w13.panels, count = std::min({to - i, w13.panels - p, up.together});
        then = i + count;
        if (i == from || p == 0) {  // the rows of an expert's tokens, side by side
          rows.make_room(work.rows, up.row_bytes);
          for (std::int64_t m = 0; m < work.rows; ++m) {
            const std::int64_t token = routing.tokens[work.first + m];
            if (coded13)
              std::memcpy(rows[m], tokens[token - begin], up.row_bytes);
            else
              up.ready(x.row<char>(token), x.column_stride, model, w13.depth, rows[m]);
            a[m] = rows[m];
          }
        }
        const void* const following = then < to ? w13.at(routing.work[then / w13.panels].expert, then % w13.panels) : nullptr;
        up.multiply(a, work.rows, w13.at(work.expert, p), count, w13.depth, width, following, sums);
        for (std::int64_t j = 0; j < count; ++j)
          if (const std::int64_t at = (p + j) * half; coded2)
            gate(sums + j * work.rows * width, work.rows, reinterpret_cast<char*>(values + work.first * inner + at),
                 inner * sizeof(float), std::min(half, inner - at));
          else
            loops.gate(sums + j * work.rows * width, work.rows, hidden[work.first] + at * item, hidden.stride(),
                       std::min(half, inner - at));
      }
    });

    if (coded2)
      hidden.make(down_of_float, w2, routed, sizeof(float),
                  [&](std::int64_t i) { return reinterpret_cast<char*>(values + i * inner); });

    const std::int64_t chunk = panels_at_a_time(w2.panels * works, w2.panel_bytes(), most) == w2.panels * works ? w2.panels : 1;
    parallel_for(w2.panels, chunk, [&](std::int64_t from, std::int64_t to) {
      thread_local Scratch<float> sums_of_thread;
      float* const sums = sums_of_thread.at_least(routed * width);
      const void* a[kMostRows];
      for (std::int64_t p = from; p < to; ++p) {
        const std::int64_t used = std::min(width, model - p * width);
        for (std::int64_t i = 0; i < works; ++i) {
          const Routing::Work& work = routing.work[i];
          for (std::int64_t m = 0; m < work.rows; ++m) a[m] = hidden[work.first + m];
          const void* const following = i + 1 < works ? w2.at(routing.work[i + 1].expert, p) : nullptr;
          down.multiply(a, work.rows, w2.at(work.expert, p), 1, w2.depth, used, following, sums + work.first * width);
        }
        for (std::int64_t t = begin; t < end; ++t) {
          const std::int64_t slot = (t - begin) * choices;
          loops.combine(sums, routing.picks.data() + slot, routing.weights.data() + slot, choices, add,
                        y + t * model + p * width, used);
        }
      }
    });
  }
}

void moe_experts(const Array& x, const Array* ids, const Array* weights, const Packed& w13, const Packed& w2,
                 std::int64_t first_expert, bool add, const Array& y) {
  if (x.kind != w13.kind || w13.kind != w2.kind) throw std::invalid_argument("x, w13 and w2 differ in dtype.");
  if (!w13.gated || w2.gated) throw std::invalid_argument("w13 must be packed with gated=True and w2 without.");
  if (w13.experts != w2.experts || w13.rows != 2 * w2.columns || w13.columns != w2.rows)
    throw std::invalid_argument("w13 and w2 do not fit together: w13 is [E, 2I, H] and w2 is [E, H, I].");
  if (w13.isa != w2.isa) throw std::invalid_argument("w13 and w2 were packed for different instruction sets.");
  if (!ids != !weights || (!ids && w13.experts != 1))
    throw std::invalid_argument("ids and weights may be None, both, where there is one expert.");
  y.has(x.kind);
  const Matrix rows = x.matrix(kAny, w13.columns);
  Matrix chosen{}, mix{};
  if (ids && weights) {
    ids->has(Kind::i32);
    weights->has(Kind::f32);
    chosen = ids->matrix(rows.rows);
    mix = weights->matrix(rows.rows, chosen.columns);
  }
  void* const out = y.output({rows.rows, rows.columns});
  with_float(x.kind, [&](auto tag) {
    run(rows, ids ? &chosen : nullptr, ids ? &mix : nullptr, w13, w2, first_expert, add, static_cast<decltype(tag)*>(out));
  });
}

}  // namespace

PORTHAL_OP(moe_experts, "x ids weights w13 w2 first_expert add y",
           "y[t] = sum_j weights[t, j] * w2[e] @ (silu(gate) * up), [gate; up] = w13[e] @ x[t], e = ids[t, j] -\n"
           "first_expert; ids negative or not held here add nothing. x, y [T, H]; ids int32 and weights float32\n"
           "[T, K], or None: every token goes to the one expert. If add, what is in y is added to the sum. Sums in\n"
           "float32 in a fixed order: a row of y depends on its own inputs only, bit by bit. In bfloat16\n"
           "silu(gate) * up may be rounded, and subnormal products may count as 0.")

}  // namespace porthal
#endif
