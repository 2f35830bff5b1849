#include "packed.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <new>

namespace porthal {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Zeroed pages on a huge-page boundary: 4 KB pages cost 15-20 % of read bandwidth.
char* map_pages(std::size_t bytes) {
  void* const raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
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

// Whole pages of the common size: only those that fill huge ones become huge, so that small weights stay small.
std::size_t mapped_size(std::int64_t bytes) {
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  return ceil_div(bytes, page) * page;
}

}  // namespace

void* scratch_memory(std::size_t bytes) {
  const std::size_t unit = bytes < kHugePage / 2 ? 64 : kHugePage, whole = (bytes + unit - 1) / unit * unit;
  void* const memory = std::aligned_alloc(unit, whole);
  if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (unit == kHugePage) madvise(memory, whole, MADV_HUGEPAGE);
#endif
  return memory;
}

void Packed::Unmap::operator()(char* memory) const { munmap(memory, bytes); }

Packed::Packed(std::int64_t experts, std::int64_t rows, std::int64_t columns, Kind kind, bool gated)
    : experts(experts),
      rows(rows),
      columns(columns),
      kind(kind),
      gated(gated),
      isa(porthal::isa()),
      panel(panel_loops(isa).f32.columns),
      row_block(kind == Kind::b16 ? panel_loops(isa).b16.row_block : panel_loops(isa).f32.row_block),
      item(kind == Kind::f32 ? 4 : 2),
      depth(kind == Kind::b16 ? ceil_div(columns, kGroup<bf16>) * kGroup<bf16> : columns),
      panels(gated ? ceil_div(rows / 2, panel / 2) : ceil_div(rows, panel)),
      upper_(kind == Kind::f32),
      memory_(map_pages(mapped_size(experts * panels * panel * depth * item)),
              Unmap{mapped_size(experts * panels * panel * depth * item)}) {}

// visit(half, row, count): the half's first `count` columns are logical rows from `row` on; those behind them are padding.
// Halves in parallel.
template <class Visit>
void Packed::each_half(std::int64_t expert, Visit visit) const {
  const std::int64_t half = panel / 2, all = gated ? rows / 2 : rows;
  parallel_for(2 * panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t row = (gated ? i / 2 : i) * half, count = std::clamp<std::int64_t>(all - row, 0, half);
      visit(memory_.get() + expert * panels * panel_bytes() + i * (panel_bytes() / 2), row + (gated ? i % 2 * all : 0), count);
    }
  });
}

// Whether the panels hold what is in the matrix; where not, they are not finished.
template <class T>
bool Packed::pack(std::int64_t expert, const Matrix& logical, typename PanelLoops<T>::Pack* pack) {
  constexpr std::int64_t kBlock = 256;  // of depth, of rows that are copied as they are strided
  const std::int64_t half = panel / 2, size_of_item = panel_bytes() / (panel * depth);
  std::atomic<bool> whole{true};
  each_half(expert, [&](char* to, std::int64_t row, std::int64_t count) {
    T copies[kMostColumns / 2][kBlock], zeros[kBlock] = {};
    const T* from[kMostColumns / 2];
    for (std::int64_t begin = 0; count && begin < columns && whole; begin += kBlock) {
      const std::int64_t size = std::min(columns - begin, kBlock);
      for (std::int64_t i = 0; i < half; ++i) {
        from[i] = i >= count ? zeros : logical.packed<T>() ? logical.row<T>(row + i) + begin : copies[i];
        for (std::int64_t k = 0; from[i] == copies[i] && k < size; ++k) copies[i][k] = logical.at<T>(row + i, begin + k);
      }
      if (!pack(from, size, to + begin * half * size_of_item)) whole = false;
    }
  });
  return whole;
}

void Packed::set(std::int64_t expert, const Matrix& logical) {
  with_float(kind, [&](auto tag) {
    using T = decltype(tag);
    const PanelLoops<T>& loops = panel_loops(isa).of(static_cast<const T*>(nullptr));
    if (upper_ && pack<T>(expert, logical, loops.pack_upper)) return;
    if (upper_) widen();
    pack<T>(expert, logical, loops.pack);
  });
}

// In place, from the end on.
void Packed::widen() {
  constexpr std::int64_t kSome = 16;  // which any panel consists of
  for (std::int64_t i = bytes() / 2 - kSome; i >= 0; i -= kSome) {
    std::uint16_t halves[kSome];
    std::uint32_t words[kSome];
    std::memcpy(halves, memory_.get() + 2 * i, sizeof halves);
    for (std::int64_t j = 0; j < kSome; ++j) words[j] = std::uint32_t{halves[j]} << 16;
    std::memcpy(memory_.get() + 4 * i, words, sizeof words);
  }
  upper_ = false;
}

void Packed::get(std::int64_t expert, void* logical) const {
  const std::int64_t half = panel / 2, group = kind == Kind::b16 ? kGroup<bf16> : 1, size = upper_ ? 2 : item;
  each_half(expert, [&](const char* from, std::int64_t row, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) {
      char* to = static_cast<char*>(logical) + (row + i) * columns * item;
      for (std::int64_t k = 0; k < columns; k += group, to += group * item) {
        if (upper_) std::memset(to, 0, 2);
        std::memcpy(to + item - size, from + (k * half + i * group) * size, std::min(group, columns - k) * size);
      }
    }
  });
}

}  // namespace porthal
