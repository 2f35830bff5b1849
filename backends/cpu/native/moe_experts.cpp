// The experts of a mixture: gate and up, silu, down, weighted sum; grouped by expert, weights read once per row block.
#include "threads.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "native.hpp"

namespace porthal {
namespace {

constexpr std::int64_t kRowBlock = 192;     // routed rows that pass over one panel together
constexpr std::int64_t kTokenBlock = 4096;  // tokens per round: bounds the scratch memory

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Zeroed pages on a huge-page boundary: 4 KB pages cost 15-20 % of read bandwidth.
char* map_pages(std::size_t bytes) {
  void* const raw =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) throw std::bad_alloc();
  const std::size_t start = reinterpret_cast<std::size_t>(raw), head = (kHugePage - start % kHugePage) % kHugePage;
  char* const memory = static_cast<char*>(raw) + head;
  if (head) munmap(raw, head);
  if (head < kHugePage) munmap(memory + bytes, kHugePage - head);
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

std::size_t mapped_size(std::int64_t bytes) {
  return std::max<std::size_t>(1, ceil_div(bytes, kHugePage)) * kHugePage;
}

}  // namespace

void PackedExperts::Unmap::operator()(char* memory) const { munmap(memory, bytes); }

PackedExperts::PackedExperts(std::int64_t experts, std::int64_t rows, std::int64_t columns, bool is_bf16, bool gated)
    : experts(experts),
      rows(rows),
      columns(columns),
      is_bf16(is_bf16),
      gated(gated),
      kernels(porthal::kernels()),
      item(is_bf16 ? 2 : 4),
      panels(gated ? ceil_div(rows / 2, kernels.panel / 2) : ceil_div(rows, kernels.panel)),
      panel_bytes(kernels.panel * 4 * (is_bf16 ? ceil_div(columns, 2) : columns)),
      memory_(map_pages(mapped_size(bytes())), Unmap{mapped_size(bytes())}) {}

// visit(packed, stride, row, begin, end): elements [begin, end) of logical row `row` go to `packed`, one group every
// `stride` bytes. Panels in parallel, each in blocks of depth that stay in L1 while its rows are transposed.
template <class Visit>
void PackedExperts::each_run(std::int64_t expert, Visit visit) const {
  constexpr std::int64_t kBlock = 128;
  const std::int64_t width = kernels.panel, half = width / 2, group = is_bf16 ? 2 : 1;
  parallel_for(panels, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t p = first; p < last; ++p)
      for (std::int64_t begin = 0; begin < columns; begin += kBlock)
        for (std::int64_t lane = 0; lane < width; ++lane) {
          const std::int64_t output = gated ? p * half + lane % half : p * width + lane;
          if (output >= (gated ? rows / 2 : rows)) continue;
          char* const packed = memory_.get() + (expert * panels + p) * panel_bytes + (begin / group * width + lane) * 4;
          const std::int64_t row = output + (gated && lane >= half ? rows / 2 : 0);
          visit(packed, width * 4, row, begin, std::min(columns, begin + kBlock));
        }
  });
}

void PackedExperts::set(std::int64_t expert, const Matrix& logical) {
  const std::ptrdiff_t step = logical.column_stride;
  each_run(expert, [&](char* to, std::int64_t stride, std::int64_t row, std::int64_t begin, std::int64_t end) {
    const char* from = logical.data + row * logical.row_stride + begin * step;
    if (is_bf16) {
      for (std::int64_t k = begin; k < end; k += 2, to += stride, from += 2 * step) {
        std::memcpy(to, from, 2);
        if (k + 1 < end) std::memcpy(to + 2, from + step, 2);
      }
    } else {
      for (std::int64_t k = begin; k < end; ++k, to += stride, from += step) std::memcpy(to, from, 4);
    }
  });
}

void PackedExperts::get(std::int64_t expert, void* logical) const {
  each_run(expert, [&](const char* from, std::int64_t stride, std::int64_t row, std::int64_t begin, std::int64_t end) {
    char* to = static_cast<char*>(logical) + (row * columns + begin) * item;
    for (std::int64_t k = begin; k < end; from += stride) {
      const std::int64_t count = std::min<std::int64_t>(end - k, is_bf16 ? 2 : 1);
      std::memcpy(to, from, count * item);
      to += count * item;
      k += count;
    }
  });
}

namespace {

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

// Memory that grows and stays, without the zeroing of std::vector.
template <class T>
class Scratch {
 public:
  T* at_least(std::int64_t count) {
    if (count > size_) {
      memory_.reset(new T[count]);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  std::int64_t size_ = 0;
};

}  // namespace

template <class T>
void moe_experts(const Matrix& x, const Matrix& ids, const Matrix& weights, const PackedExperts& w13,
                 const PackedExperts& w2, std::int64_t first_expert, T* y) {
  thread_local Routing routing_of_caller;
  thread_local Scratch<T> hidden_of_caller, copy_of_caller;
  Routing& routing = routing_of_caller;
  const Loops<T>& loops = w13.kernels.loops(y);
  const std::int64_t width = w13.kernels.panel, half = width / 2;
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

    const auto panel = [](const PackedExperts& w, std::int64_t expert, std::int64_t p) {
      return reinterpret_cast<const T*>(w.panel(expert, p));
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

template void moe_experts<float>(const Matrix&, const Matrix&, const Matrix&, const PackedExperts&,
                                 const PackedExperts&, std::int64_t, float*);
template void moe_experts<bf16>(const Matrix&, const Matrix&, const Matrix&, const PackedExperts&,
                                const PackedExperts&, std::int64_t, bf16*);

}  // namespace porthal
