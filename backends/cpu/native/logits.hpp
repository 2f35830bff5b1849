// What one pass over a row of logits finds.
#pragma once

#include "isa.hpp"

namespace porthal {

struct Norm {
  float top;    // the highest, NaN left aside
  double norm;  // the sum of exp(x - top)
};

template <class T>
struct LogitLoops {  // one row of n
  std::int64_t (*argmax)(const T* x, std::int64_t n);  // the first of the highest; NaN as -inf
  bool (*finite)(const T* x, std::int64_t n);          // neither NaN nor +inf is in it, and something besides -inf
  Norm (*norm)(const T* x, std::int64_t n);
  void (*minus)(const T* x, std::int64_t n, float top, float log_norm, float* y);  // y = (x - top) - log_norm
};

#if !defined(PORTHAL_ISA)
PORTHAL_TABLES(PerFloat<LogitLoops>, logit_loops)
#endif

}  // namespace porthal
