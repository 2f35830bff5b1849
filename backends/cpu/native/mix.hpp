// A weighted sum of rows that lie anywhere: of experts' results, and of what ranks give.
#pragma once

#include "isa.hpp"

namespace porthal {

template <class T>
struct MixLoops {
  // y[n] = the sum over j of weights[j] * rows[j], in the order of j, without rows that are null.
  void (*mix)(const T* const* rows, const float* weights, std::int64_t count, T* y, std::int64_t n);
};

#if !defined(PORTHAL_ISA)
PORTHAL_TABLES(PerFloat<MixLoops>, mix_loops)
#endif

}  // namespace porthal
