#include <atomic>

#include "native.hpp"

namespace porthal {

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found{&kernels_baseline};
#if defined(PORTHAL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(&kernels_avx512);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(&kernels_avx512bf16);
    }
  }
#endif
  return found;
}

namespace {
std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels{available_kernels().back()};
  return kernels;
}
}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void use_kernels(const Kernels& chosen) { current().store(&chosen); }

}  // namespace porthal
