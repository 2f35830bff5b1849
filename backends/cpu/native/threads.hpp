// A small thread pool: the caller works too, chunks are handed out dynamically, idle workers soon sleep.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace porthal {

int num_threads();

// Takes effect at the next parallel_for; throws std::invalid_argument for count < 1.
void set_num_threads(int count);

namespace detail {
using Body = void (*)(void* context, std::int64_t begin, std::int64_t end);
void parallel_for(std::int64_t count, std::int64_t chunk, Body body, void* context);
}  // namespace detail

// Calls f(begin, end) over disjoint ranges of at most `chunk` that cover [0, count); rethrows an exception of f.
// A second thread that calls while the pool is busy runs its loop alone. A forked child starts with fresh workers.
template <class F>
void parallel_for(std::int64_t count, std::int64_t chunk, F&& f) {
  using Function = std::remove_reference_t<F>;
  detail::parallel_for(
      count, chunk,
      [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Function*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(std::addressof(f))));
}

// Rows of which each moves so many bytes, as a chunk: below about 64 KB it is done before another thread has woken up.
inline std::int64_t rows_per_chunk(std::int64_t bytes) { return bytes < 65536 ? 65536 / (bytes + 1) : 1; }

}  // namespace porthal
