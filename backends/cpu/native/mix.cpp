#include "mix.hpp"

#include "simd.hpp"

namespace porthal {
namespace {

template <class T>
void mix(const T* const* rows, const float* weights, std::int64_t count, T* y, std::int64_t n) {
  constexpr int kWide = 4;
  std::int64_t i = 0;
  for (; i + kWide * kLanes <= n; i += kWide * kLanes) {
    F sums[kWide] = {};
    for (std::int64_t j = 0; j < count; ++j)
      if (rows[j])
        for (int v = 0; v < kWide; ++v) sums[v] += weights[j] * load(rows[j] + i + v * kLanes);
    for (int v = 0; v < kWide; ++v) store(y + i + v * kLanes, sums[v]);
  }
  for (; i < n; i += kLanes) {
    const std::int64_t some = n - i < kLanes ? n - i : kLanes;
    F sum = {};
    for (std::int64_t j = 0; j < count; ++j)
      if (rows[j]) sum += weights[j] * load_some(rows[j] + i, some);
    store_some(y + i, sum, some);
  }
}

}  // namespace

PORTHAL_LOOPS(PerFloat<MixLoops>, mix_loops) = {{mix<float>}, {mix<bf16>}, {mix<fp16>}};

}  // namespace porthal
