// The inner loops that exist once per instruction set; everything around them is compiled once, for any CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace porthal {

struct bf16 {
  std::uint16_t bits;
};

// The loops of one element type of activations and weights.
template <class T>
struct Loops {
  // y = x / sqrt(mean(x^2) + eps) * weight for one row of n; statistics and products in fp32, one rounding.
  void (*rms_norm)(const T* x, const T* weight, T* y, std::int64_t n, float eps);
  void (*rms_norm_f32_weight)(const T* x, const float* weight, T* y, std::int64_t n, float eps);

  // Appends (key, index) of every score whose key is >= threshold, in index order, and returns how many.
  // keys and indices need kSlack elements of room beyond that.
  std::size_t (*collect)(const T* scores, std::size_t n, std::uint32_t threshold, std::uint32_t* keys,
                         std::uint32_t* indices);

  // sums[rows, panel] = a[rows][depth] . panel. Each sum runs over depth in one fixed order, whatever rows is.
  // `following` is the panel that this thread reads next, or null: its beginning is fetched meanwhile.
  void (*multiply)(const T* const* a, std::int64_t rows, const T* panel, std::int64_t depth, const T* following,
                   float* sums);
  // h[rows, panel/2] = silu(gate half of sums) * up half of sums, `columns` of them, rows `stride` elements apart.
  void (*gate)(const float* sums, std::int64_t rows, T* h, std::int64_t stride, std::int64_t columns);
  // y[columns] = sum over j ascending of weights[j] * sums[picks[j]], skipping picks[j] < 0.
  void (*combine)(const float* sums, const std::int32_t* picks, const float* weights, std::int64_t count, T* y,
                  std::int64_t columns);
};

struct Kernels {
  const char* isa;
  std::int64_t panel;  // output columns of one weight panel
  Loops<float> f32;
  Loops<bf16> b16;

  const Loops<float>& loops(const float*) const { return f32; }
  const Loops<bf16>& loops(const bf16*) const { return b16; }
};

constexpr std::size_t kSlack = 16;

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512, kernels_avx512bf16;  // the AVX ones on x86 only

// Depth elements that one panel row holds together: bf16 in pairs, as vdpbf16ps wants them.
template <class T>
constexpr std::int64_t kGroup = sizeof(T) == 2 ? 2 : 1;

}  // namespace porthal
