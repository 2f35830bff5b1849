// rope, for operators that are composed of it; what it does stands where it is bound to Python.
#pragma once

#include "array.hpp"

namespace porthal {

void rope(const Array& x, const Array& positions, double theta, bool interleaved, std::int64_t start, std::int64_t width,
          const Array& y);

}  // namespace porthal
