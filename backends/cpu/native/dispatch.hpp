// Which instruction sets there are here, and which is in use.
#pragma once

#include <vector>

#include "isa.hpp"

namespace porthal {

const char* isa_name(Isa isa);
std::vector<Isa> available();  // best last
void use(Isa isa);

}  // namespace porthal
