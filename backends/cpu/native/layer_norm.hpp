// layer_norm, for operators that are composed of it; what it does stands where it is bound to Python.
#pragma once

#include "array.hpp"

namespace porthal {

void layer_norm(const Array& x, const Array& weight, const Array& bias, const Array& y, double eps);

}  // namespace porthal
