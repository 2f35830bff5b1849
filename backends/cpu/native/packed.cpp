#include "packed.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(PanelLoops, panel_loops)

namespace {

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

void Packed::Unmap::operator()(char* memory) const { munmap(memory, bytes); }

Packed::Packed(std::int64_t experts, std::int64_t rows, std::int64_t columns, bool is_bf16, bool gated)
    : experts(experts),
      rows(rows),
      columns(columns),
      is_bf16(is_bf16),
      gated(gated),
      isa(porthal::isa()),
      panel(panel_loops(isa).columns),
      item(is_bf16 ? 2 : 4),
      panels(gated ? ceil_div(rows / 2, panel / 2) : ceil_div(rows, panel)),
      panel_bytes(panel * 4 * (is_bf16 ? ceil_div(columns, 2) : columns)),
      memory_(map_pages(mapped_size(bytes())), Unmap{mapped_size(bytes())}) {}

// visit(packed, stride, row, begin, end): elements [begin, end) of logical row `row` go to `packed`, one group every
// `stride` bytes. Panels in parallel, each in blocks of depth that stay in L1 while its rows are transposed.
template <class Visit>
void Packed::each_run(std::int64_t expert, Visit visit) const {
  constexpr std::int64_t kBlock = 128;
  const std::int64_t width = panel, half = width / 2, group = is_bf16 ? 2 : 1;
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

void Packed::set(std::int64_t expert, const Matrix& logical) {
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

void Packed::get(std::int64_t expert, void* logical) const {
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

}  // namespace porthal
