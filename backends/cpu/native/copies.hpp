// concat and kv_write, for operators that are composed of them; what they do stands where they are bound to Python.
#pragma once

#include "array.hpp"

namespace porthal {

void concat(const Array& a, const Array& b, const Array& y);
void kv_write(const Array& field, const Array& slots, const Array& rows);

}  // namespace porthal
