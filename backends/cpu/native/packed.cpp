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

namespace {

std::int64_t deepened(std::int64_t columns, Kind kind, Coding coding) {
  const std::int64_t plain = kind == Kind::b16 ? kGroup<bf16> : 1;
  const std::int64_t unit = coding == Coding::none ? plain : form_of(coding).unit;
  return ceil_div(columns, unit) * unit;
}

}  // namespace

Packed::Packed(std::int64_t experts, std::int64_t rows, std::int64_t columns, Kind kind, bool gated, Coding coding)
    : experts(experts),
      rows(rows),
      columns(columns),
      kind(kind),
      gated(gated),
      coding(coding),
      isa(porthal::isa()),
      panel(panel_loops(isa).f32.columns),
      row_block(kind == Kind::b16 ? panel_loops(isa).b16.row_block : panel_loops(isa).f32.row_block),
      item(kind == Kind::f32 ? 4 : 2),
      depth(deepened(columns, kind, coding)),
      panels(gated ? ceil_div(rows / 2, panel / 2) : ceil_div(rows, panel)),
      upper_(kind == Kind::f32 && coding == Coding::none),
      memory_(map_pages(mapped_size(bytes() << upper_)), Unmap{mapped_size(bytes() << upper_)}) {}

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
  if (coding != Coding::none) throw std::invalid_argument("the weights are packed under a scheme: set their codes.");
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
  if (coding != Coding::none) throw std::invalid_argument("the weights are packed under a scheme: get their codes.");
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

namespace {

// A column of a panel: what is multiplied with all its scales; of each group its words, `panel` apart, and its scale.
struct Column {
  float* whole;
  char* groups;
  const Form& form;
  std::int64_t panel, index, depth;

  std::int64_t group() const { return form.group ? form.group : depth; }
  char* of(std::int64_t g) const { return groups + g * panel * (4 * group() / form.unit + form.scale); }
  std::uint32_t& word(std::int64_t k) const {
    return reinterpret_cast<std::uint32_t*>(of(k / group()))[k % group() / form.unit * panel + index];
  }
  char* scale(std::int64_t g) const {
    return of(g) + std::min(depth - g * group(), group()) / form.unit * panel * 4 + index * form.scale;
  }
};

}  // namespace

// visit(column, row): with its logical row, or -1. Panels in parallel.
template <class Visit>
void Packed::each_column(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole, Visit visit) const {
  if (coding == Coding::none) throw std::invalid_argument("the weights are packed without a scheme: they have no codes.");
  if (!whole == form().of_column)
    throw std::invalid_argument(std::string("whole must be ") + (whole ? "None under " : "given under ") + form().scheme + ".");
  codes.has(form().whole_numbers ? Kind::i8 : Kind::u8);
  scale.has(form().scale == 4 ? Kind::f32 : Kind::u8);
  codes.is_shape({rows, columns});
  scale.is_shape({ceil_div(rows, form().high), groups()});
  if (whole) {
    whole->has(Kind::f32);
    whole->is_shape({rows});
  }
  const std::int64_t half = panel / 2, all = gated ? rows / 2 : rows;
  parallel_for(panels, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      char* const at = memory_.get() + (expert * panels + p) * panel_bytes();
      for (std::int64_t c = 0; c < panel; ++c) {
        const std::int64_t up = gated && c >= half, row = gated ? p * half + c - up * half : p * panel + c;
        visit(Column{reinterpret_cast<float*>(at) + c, at + form().of_column * panel * 4, form(), panel, c, depth},
              row < all ? up * all + row : -1);
      }
    }
  });
}

void Packed::set(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole) {
  const std::uint32_t mask = form().unit == 8 ? 0xf : 0xff;
  const std::uint32_t more = coding == Coding::int8_channel ? 0x80808080u : 0;  // as products want them
  const std::int64_t size = form().scale;
  const Matrix from = codes.matrix(), scales = scale.matrix();
  each_column(expert, codes, scale, whole, [&](Column to, std::int64_t row) {
    std::vector<std::uint8_t> copy;
    const std::uint8_t* const code = row < 0 ? nullptr : from.dense_row<std::uint8_t>(row, copy);
    for (std::int64_t k = 0; k < depth; k += form().unit) {
      std::uint32_t word = 0;
      for (std::int64_t i = 0; code && i < std::min(form().unit, columns - k); ++i)
        word |= (code[k + i] & mask) << code_shift(coding, static_cast<int>(i));
      to.word(k) = word ^ more;
    }
    for (std::int64_t g = 0; code && g < groups(); ++g)
      std::memcpy(to.scale(g), &scales.at<char>(row / form().high, g), size);
    if (code && whole) *to.whole = whole->at<float>(row);
  });
}

void Packed::get(std::int64_t expert, const Array& codes, const Array& scale, const Array* whole) const {
  auto* const to = static_cast<std::uint8_t*>(codes.output({rows, columns}));
  auto* const scales = static_cast<char*>(scale.output({ceil_div(rows, form().high), groups()}));
  auto* const wholes = whole ? static_cast<float*>(whole->output({rows})) : nullptr;
  const std::uint32_t more = coding == Coding::int8_channel ? 0x80808080u : 0;
  const std::int64_t size = form().scale;
  each_column(expert, codes, scale, whole, [&](Column from, std::int64_t row) {
    if (row < 0) return;
    for (std::int64_t k = 0; k < columns; ++k) {
      const std::uint32_t word = from.word(k) ^ more;
      const auto byte = static_cast<std::uint8_t>(word >> code_shift(coding, static_cast<int>(k % form().unit)));
      const int nibble = form().whole_numbers ? static_cast<std::int8_t>(byte << 4) >> 4 : byte & 0xf;
      to[row * columns + k] = form().unit == 8 ? static_cast<std::uint8_t>(nibble) : byte;
    }
    for (std::int64_t g = 0; row % form().high == 0 && g < groups(); ++g)
      std::memcpy(scales + (row / form().high * groups() + g) * size, from.scale(g), size);
    if (wholes) wholes[row] = *from.whole;
  });
}

}  // namespace porthal
