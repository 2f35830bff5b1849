#include "dispatch.hpp"

#include <atomic>

#if defined(PORTHAL_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace porthal {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};
  return names[static_cast<int>(isa)];
}

namespace {

#if defined(PORTHAL_AMX)
// Whether there are tiles of bf16 and int8, and Linux lets this process use them: their registers are saved only for those who ask.
bool tiles() {
  static const bool granted = [] {
    unsigned a, b, c, d = 0;
    constexpr unsigned kAll = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr long kAskPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
  }();
  return granted;
}
#endif

}  // namespace

std::vector<Isa> available() {
  std::vector<Isa> found{Isa::baseline};
#if defined(PORTHAL_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    found.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        found.push_back(Isa::avx512bf16);
#if defined(PORTHAL_AMX)
        if (tiles()) found.push_back(Isa::amx);
#endif
      }
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
