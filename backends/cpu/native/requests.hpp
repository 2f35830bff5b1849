// A batch as kernels read it: which request a row belongs to, and where in the cache a position of it lies.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "array.hpp"

namespace porthal {

class Requests {
 public:
  // cu_q [R + 1], block_table [R, B], both int32; slots is how many the cache has.
  Requests(const Array& cu_q, const Array& table, std::int64_t block_size, std::int64_t rows, std::int64_t slots)
      : cu_q_((cu_q.has(Kind::i32), cu_q.vector())),
        table_((table.has(Kind::i32), table.matrix(cu_q_.columns - 1))),
        size_(block_size),
        pages_(block_size > 0 ? slots / block_size : 0) {
    if (block_size < 1 || block_size > INT32_MAX) refuse("block_size", "is " + std::to_string(block_size), "1 to 2147483647");
    std::int32_t before = 0;
    for (std::int64_t r = 0; r <= count(); ++r) {
      const std::int32_t now = cu_q_.at<std::int32_t>(0, r);
      if (now < before || (r == 0 && now != 0)) refuse("cu_q", "has " + std::to_string(now), "rising counts from 0");
      before = now;
    }
    if (before != rows) refuse("cu_q", "ends with " + std::to_string(before), "the number of rows, " + std::to_string(rows));
  }

  std::int64_t count() const { return table_.rows; }
  std::int64_t first_row(std::int64_t request) const { return cu_q_.at<std::int32_t>(0, request); }

  std::int64_t of_row(std::int64_t t) const {
    std::int64_t low = 0, high = count();  // first_row(low) <= t < first_row(high)
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (first_row(middle) <= t ? low : high) = middle;
    }
    return low;
  }

  // Where a page of a request begins, in slots.
  std::int64_t page_slot(std::int64_t request, std::int64_t page) const {
    const std::int32_t id = page < table_.columns ? table_.at<std::int32_t>(request, page) : -1;
    if (id < 0 || id >= pages_)
      refuse("block_table", "has page " + std::to_string(id) + " at [" + std::to_string(request) + ", " + std::to_string(page) + "]",
             "0 to " + std::to_string(pages_ - 1));
    return id * size_;
  }

  std::int64_t slot(std::int64_t request, std::int32_t position) const {
    if (position < 0) refuse("position", "is " + std::to_string(position), "at least 0");
    const std::uint32_t page = static_cast<std::uint32_t>(position) / static_cast<std::uint32_t>(size_);
    return page_slot(request, page) + position - page * size_;
  }

  std::int64_t block_size() const { return size_; }

 private:
  Matrix cu_q_, table_;
  std::int64_t size_, pages_;
};

}  // namespace porthal
