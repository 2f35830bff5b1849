#include "dispatch.hpp"

#include <atomic>

namespace porthal {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  return names[static_cast<int>(isa)];
}

std::vector<Isa> available() {
  std::vector<Isa> found{Isa::baseline};
#if defined(PORTHAL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512bf16);
    }
  }
#endif
  return found;
}

namespace {
std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{available().back()};
  return isa;
}
}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

void use(Isa isa) { current().store(isa); }

}  // namespace porthal
