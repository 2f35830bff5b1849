// Rows copied to where they belong, bit for bit: concatenation, gathers, and writes to a paged cache.
#include <algorithm>
#include <cstring>

#include "bind.hpp"
#include "copies.hpp"
#include "threads.hpp"

namespace porthal {
namespace {

std::int64_t item_size(const Array& a) {
  a.is_one_of({Kind::f32, Kind::b16, Kind::f16, Kind::i32}, "native float32, bfloat16, float16 or int32");
  return a.kind == Kind::b16 || a.kind == Kind::f16 ? 2 : 4;
}

// n elements from one place to another, each with its own step in bytes.
void copy(char* to, std::ptrdiff_t to_step, const char* from, std::ptrdiff_t from_step, std::int64_t n, std::int64_t item) {
  if (to_step == item && from_step == item) {
    std::memcpy(to, from, n * item);
  } else if (item == 1) {
    for (std::int64_t i = 0; i < n; ++i) to[i * to_step] = from[i * from_step];
  } else if (item == 2) {
    for (std::int64_t i = 0; i < n; ++i) std::memcpy(to + i * to_step, from + i * from_step, 2);
  } else {
    for (std::int64_t i = 0; i < n; ++i) std::memcpy(to + i * to_step, from + i * from_step, 4);
  }
}

void copy_row(const Matrix& to, std::int64_t i, const Matrix& from, std::int64_t j, std::int64_t item) {
  copy(const_cast<char*>(to.data) + i * to.row_stride, to.column_stride, from.data + j * from.row_stride, from.column_stride,
       from.columns, item);
}

Matrix written(const Array& a, std::int64_t rows, std::int64_t columns) {
  if (!a.writable) refuse(a.name, "is read-only", "a writeable output");
  return a.matrix(rows, columns);
}

[[noreturn]] void out_of_range(const char* name, std::int64_t i, std::int64_t value, std::int64_t low, std::int64_t end) {
  refuse(std::string(name) + "[" + std::to_string(i) + "]", "is " + std::to_string(value),
         std::to_string(low) + " to " + std::to_string(end - 1));
}

// Every value of an int32 vector, which must lie in [low, end).
void check_range(const char* name, const Matrix& values, std::int64_t low, std::int64_t end) {
  for (std::int64_t i = 0; i < values.columns; ++i)
    if (const std::int64_t v = values.at<std::int32_t>(0, i); v < low || v >= end) out_of_range(name, i, v, low, end);
}

}  // namespace

void concat(const Array& a, const Array& b, const Array& y) {
  const std::int64_t item = item_size(a);
  b.has(a.kind);
  y.has(a.kind);
  const Matrix left = a.matrix(), right = b.matrix(left.rows);
  const std::int64_t columns = left.columns + right.columns;
  char* const out = static_cast<char*>(y.output({left.rows, columns}));
  parallel_for(left.rows, rows_per_chunk(columns * item), [&](std::int64_t begin, std::int64_t end) {
    const Matrix all{out, left.rows, columns, columns * item, item};
    const Matrix tail{out + left.columns * item, left.rows, right.columns, columns * item, item};
    for (std::int64_t t = begin; t < end; ++t) {
      copy_row(all, t, left, t, item);
      copy_row(tail, t, right, t, item);
    }
  });
}

namespace {

// y[m] = x[rows[m]], zeros where that is -1, which only `low` = -1 permits.
void gather(const Array& x, const Array& rows, const Array& y, std::int64_t low) {
  const std::int64_t item = item_size(x);
  y.has(x.kind);
  rows.has(Kind::i32);
  const Matrix from = x.matrix(), chosen = rows.vector();
  char* const out = static_cast<char*>(y.output({chosen.columns, from.columns}));
  const Matrix to{out, chosen.columns, from.columns, from.columns * item, item};
  check_range(rows.name, chosen, low, from.rows);
  parallel_for(to.rows, rows_per_chunk(to.row_stride), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m)
      if (const std::int32_t row = chosen.at<std::int32_t>(0, m); row < 0)
        std::memset(out + m * to.row_stride, 0, to.row_stride);
      else
        copy_row(to, m, from, row, item);
  });
}

void take_rows(const Array& x, const Array& rows, const Array& y) { gather(x, rows, y, -1); }

void embedding(const Array& ids, const Array& table, const Array& x) { gather(table, ids, x, 0); }

void select_rows(const Array& indices, const Array& length, const Array& rows, const Array& out, const Array& out_length) {
  indices.has(Kind::i32);
  length.has(Kind::i32);
  const Matrix lengths = length.vector(indices.matrix().rows), chosen = rows.vector();
  out_length.has(Kind::i32);
  auto* const to = static_cast<std::int32_t*>(out_length.output({chosen.columns}));
  gather(indices, rows, out, 0);
  for (std::int64_t m = 0; m < chosen.columns; ++m) to[m] = lengths.at<std::int32_t>(0, chosen.at<std::int32_t>(0, m));
}

}  // namespace

void kv_write(const Array& field, const Array& slots, const Array& rows) {
  const std::int64_t item = item_size(field);
  rows.has(field.kind);
  slots.has(Kind::i64);
  const Matrix from = rows.matrix(), cache = written(field, kAny, from.columns), places = slots.vector(from.rows);
  for (std::int64_t t = 0; t < from.rows; ++t)
    if (const std::int64_t slot = places.at<std::int64_t>(0, t); slot < -1 || slot >= cache.rows)
      out_of_range("slots", t, slot, -1, cache.rows);
  parallel_for(from.rows, rows_per_chunk(from.columns * item), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      if (const std::int64_t slot = places.at<std::int64_t>(0, t); slot >= 0) copy_row(cache, slot, from, t, item);
  });
}

namespace {

// Per query row, by the lengths of its request: see Batch, whose arrays these are.
void plan(const Array& cu_q, const Array& kv_len, const Array& table, std::int64_t block_size, const Array& positions,
          const Array& visible, const Array& slots) {
  for (const Array* a : {&cu_q, &kv_len, &table, &positions, &visible}) a->has(Kind::i32);
  slots.has(Kind::i64);
  const Matrix keys = kv_len.vector(), pages = table.matrix(keys.columns), ends = cu_q.vector(keys.columns + 1);
  const std::int64_t rows = ends.at<std::int32_t>(0, keys.columns);
  auto* const at = static_cast<std::int32_t*>(positions.output({rows}));
  auto* const seen = static_cast<std::int32_t*>(visible.output({rows}));
  auto* const slot = static_cast<std::int64_t*>(slots.output({rows}));
  if (block_size < 1) refuse("block_size", "is " + std::to_string(block_size), "at least 1");
  std::int64_t t = 0;
  for (std::int64_t r = 0; r < keys.columns; ++r) {
    const std::int64_t length = keys.at<std::int32_t>(0, r), end = ends.at<std::int32_t>(0, r + 1);
    if (end < t || end > rows) refuse("cu_q", "has " + std::to_string(end) + " at " + std::to_string(r + 1), "rising counts");
    for (const std::int64_t start = length - end; t < end; ++t) {
      const std::int64_t position = length > 0 ? start + t : 0, page = position / block_size;
      const std::int64_t block = length > 0 && page < pages.columns ? pages.at<std::int32_t>(r, page) : -1;
      at[t] = static_cast<std::int32_t>(position);
      seen[t] = static_cast<std::int32_t>(length > 0 ? position + 1 : 0);
      slot[t] = block < 0 ? -1 : block * block_size + position % block_size;
    }
  }
}

// What a selection of k positions has of each row.
void selected(const Array& visible, std::int64_t k, const Array& length) {
  visible.has(Kind::i32);
  length.has(Kind::i32);
  const Matrix seen = visible.vector();
  auto* const to = static_cast<std::int32_t*>(length.output({seen.columns}));
  for (std::int64_t t = 0; t < seen.columns; ++t)
    to[t] = static_cast<std::int32_t>(std::min<std::int64_t>(seen.at<std::int32_t>(0, t), k));
}

// One step's copies of whole pages. Those whose source is also a target are read before any is written.
void page_copy(const Array& field, const Array& source, const Array& target, std::int64_t block_size) {
  const std::int64_t item = field.kind == Kind::i8 || field.kind == Kind::u8 ? 1 : item_size(field);  // codes too
  source.has(Kind::i32);
  target.has(Kind::i32);
  const Matrix cache = written(field, kAny, kAny), from = source.vector(), to = target.vector(from.columns);
  if (block_size < 1 || cache.rows % block_size)
    refuse("block_size", "is " + std::to_string(block_size), "a divisor of " + std::to_string(cache.rows) + " slots");
  const std::int64_t pages = cache.rows / block_size, bytes = cache.columns * item;
  check_range("source", from, 0, pages);
  check_range("target", to, 0, pages);
  thread_local std::vector<std::int64_t> held_of_caller;  // of pages that are overwritten: where their rows are kept
  thread_local std::vector<char> kept_of_caller;
  std::vector<std::int64_t>& held = held_of_caller;
  std::vector<char>& kept = kept_of_caller;
  held.assign(pages, -1);
  kept.clear();
  for (std::int64_t m = 0; m < to.columns; ++m) held[to.at<std::int32_t>(0, m)] = 0;
  for (std::int64_t m = 0; m < from.columns; ++m) {
    std::int64_t& place = held[from.at<std::int32_t>(0, m)];
    if (place != 0) continue;  // read in place, or kept already
    place = static_cast<std::int64_t>(kept.size()) + 1;
    kept.resize(kept.size() + std::max<std::int64_t>(1, block_size * bytes));
    const Matrix copy{kept.data() + place - 1, block_size, cache.columns, bytes, item};
    for (std::int64_t i = 0; i < block_size; ++i) copy_row(copy, i, cache, from.at<std::int32_t>(0, m) * block_size + i, item);
  }
  parallel_for(from.columns * block_size, rows_per_chunk(bytes), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t m = row / block_size, i = row % block_size;
      const std::int64_t page = from.at<std::int32_t>(0, m), slot = to.at<std::int32_t>(0, m) * block_size + i;
      if (held[page] > 0)
        copy_row(cache, slot, {kept.data() + held[page] - 1, block_size, cache.columns, bytes, item}, i, item);
      else
        copy_row(cache, slot, cache, page * block_size + i, item);
    }
  });
}

}  // namespace

PORTHAL_OP(concat, "a b y", "y[T, A + B] = [a | b], of one dtype: float32, bfloat16, float16 or int32; y contiguous.")
PORTHAL_OP(take_rows, "x rows y", "y[M, H] = x[rows], zeros where a row is -1; rows int32 from -1 to T - 1; y contiguous.")
PORTHAL_OP(embedding, "ids table x", "x[T, H] = table[ids]; ids int32 from 0 to V - 1; x contiguous.")
PORTHAL_OP(select_rows, "indices length rows out out_length",
           "out[M, k] = indices[rows] and out_length[M] = length[rows]; all int32, rows from 0 to T - 1.")
PORTHAL_OP(kv_write, "field slots rows",
           "field[slots[t]] = rows[t] in place, for slots >= 0; field [slots, width] and rows [T, width] of one dtype and any\n"
           "strides, slots int64 [T] from -1 on.")
PORTHAL_OP(plan, "cu_q kv_len block_table block_size positions visible slots",
           "positions, visible int32 and slots int64 [T] of a batch, from its lengths.")
PORTHAL_OP(selected, "visible k length", "length[T] = min(visible[T], k), both int32.")
PORTHAL_OP(page_copy, "field source target block_size",
           "Page target[m] of field [slots, width] becomes what page source[m] was before the call; source and target int32.")

}  // namespace porthal
