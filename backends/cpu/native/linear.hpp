// linear and head_linear, for operators that are composed of them; what they do stands where they are bound to Python.
#pragma once

#include "array.hpp"
#include "packed.hpp"

namespace porthal {

void linear(const Array& x, const Packed& w, const Array& y);
void head_linear(const Array& x, const Packed& w, const Array& y);

}  // namespace porthal
