// Rotation by position: angles in double, cosine and sine rounded to fp32, products in fp32, one rounding.
#include "isa.hpp"

namespace porthal {

struct AngleLoops {
  // cosines[i] and sines[i] of position * frequencies[i]; all three have room for a multiple of 16.
  void (*turn)(double position, const double* frequencies, std::int64_t n, float* cosines, float* sines);
};

template <class T>
struct RopeLoops {
  // y = x * c + partner * s, where the partner of j is j ^ 1 if interleaved, else j + width / 2 modulo width; for some heads,
  // whose rows lie x_step bytes apart, and y_step elements.
  void (*rotate[2])(const T* x, std::int64_t heads, std::ptrdiff_t x_step, const float* c, const float* s, T* y,
                    std::int64_t y_step, std::int64_t width);
};

}  // namespace porthal

#if defined(PORTHAL_ISA)
#include "simd.hpp"

namespace porthal {
namespace {

// Plain loops over 16 elements, of which the compiler makes vectors. Good to 1e-9 for angles up to 2^31 quarter turns.
void turn(double position, const double* frequencies, std::int64_t n, float* cosines, float* sines) {
  for (std::int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < 16; ++j) {
      const double angle = position * frequencies[i + j], shift = 6755399441055744.0;  // 1.5 * 2^52
      const double shifted = angle * 0.63661977236758134308 + shift, quarters = shifted - shift;
      const double r = (angle - quarters * 1.57079632673412561417) - quarters * 6.07710050650619224932e-11, r2 = r * r;
      const double sine = r + r * r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880))));
      const double cosine =
          1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 + r2 * (-1.0 / 3628800)))));
      std::int64_t turns;
      __builtin_memcpy(&turns, &shifted, 8);
      const double first = turns & 1 ? sine : cosine, second = turns & 1 ? cosine : sine;
      cosines[i + j] = static_cast<float>((turns + 1) & 2 ? -first : first);
      sines[i + j] = static_cast<float>(turns & 2 ? -second : second);
    }
}

#if defined(__AVX512F__)
inline F swapped(F v) { return (F)_mm512_maskz_permute_ps(0xffff, (__m512)v, 0xb1); }
#elif defined(__AVX2__)
inline F swapped(F v) { return (F)_mm256_permute_ps((__m256)v, 0xb1); }
#else
inline F swapped(F v) { return __builtin_shuffle(v, I{1, 0, 3, 2}); }
#endif

template <class T>
inline const T* at(const T* x, std::ptrdiff_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(x) + bytes);
}

template <class T>
void interleaved(const T* x, std::int64_t heads, std::ptrdiff_t x_step, const float* c, const float* s, T* y,
                 std::int64_t y_step, std::int64_t width) {
  for (std::int64_t j = 0; j < width; j += kLanes) {  // the factors of some elements stay while the heads pass
    const std::int64_t some = width - j < kLanes ? width - j : kLanes;
    const F cosine = load_some(c + j, some), sine = load_some(s + j, some);
    if (some == kLanes) {
      for (std::int64_t n = 0; n < heads; ++n) {
        const F v = load(at(x, n * x_step) + j);
        store(y + n * y_step + j, v * cosine + swapped(v) * sine);
      }
    } else {
      for (std::int64_t n = 0; n < heads; ++n) {
        const F v = load_some(at(x, n * x_step) + j, some);
        store_some(y + n * y_step + j, v * cosine + swapped(v) * sine, some);
      }
    }
  }
}

template <class T>
void half(const T* x, std::int64_t heads, std::ptrdiff_t x_step, const float* c, const float* s, T* y, std::int64_t y_step,
          std::int64_t width) {
  const std::int64_t m = width / 2;
  for (std::int64_t n = 0; n < heads; ++n, x = at(x, x_step), y += y_step)
    for (std::int64_t j = 0; j < m; j += kLanes) {
      const std::int64_t some = m - j < kLanes ? m - j : kLanes;
      const F u = load_some(x + j, some), v = load_some(x + m + j, some);
      store_some(y + j, u * load_some(c + j, some) + v * load_some(s + j, some), some);
      store_some(y + m + j, v * load_some(c + m + j, some) + u * load_some(s + m + j, some), some);
    }
}

}  // namespace

PORTHAL_LOOPS(AngleLoops, angle_loops) = {turn};
PORTHAL_LOOPS(PerFloat<RopeLoops>, rope_loops) = {
    {{half<float>, interleaved<float>}}, {{half<bf16>, interleaved<bf16>}}, {{half<fp16>, interleaved<fp16>}}};

}  // namespace porthal
#else
#include <algorithm>
#include <cmath>
#include <cstring>

#include "bind.hpp"
#include "rope.hpp"
#include "threads.hpp"

namespace porthal {

PORTHAL_TABLES(AngleLoops, angle_loops)
PORTHAL_TABLES(PerFloat<RopeLoops>, rope_loops)

namespace {

// theta^(-2i / width) for pair i, and zeros up to a multiple of 16.
struct Frequencies {
  double theta = 0;
  std::int64_t width = 0;
  std::vector<double> of_pair;

  void make(double new_theta, std::int64_t new_width) {
    if (theta == new_theta && width == new_width) return;
    of_pair.assign((new_width / 2 + 15) / 16 * 16, 0.0);
    for (std::int64_t i = 0; i < new_width / 2; ++i) of_pair[i] = std::pow(new_theta, -2.0 * i / new_width);
    theta = new_theta;
    width = new_width;
  }
};

// The factors of each element of one rotated slice, see RopeLoops.
struct Factors {
  std::vector<float> cosines, sines, c, s;

  void make(const Frequencies& frequencies, double position, bool interleaved) {
    const std::int64_t width = frequencies.width, n = width / 2, room = frequencies.of_pair.size();
    cosines.resize(room);
    sines.resize(room);
    c.resize(width);
    s.resize(width);
    angle_loops(isa()).turn(position, frequencies.of_pair.data(), room, cosines.data(), sines.data());
    const std::int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : n;
    for (std::int64_t i = 0; i < n; ++i) {
      c[i * step] = c[i * step + apart] = cosines[i];
      s[i * step] = -sines[i];
      s[i * step + apart] = sines[i];
    }
  }
};

template <class T>
void run(const Array& x, const Matrix& positions, const Frequencies& frequencies, bool interleaved, std::int64_t start,
         T* y) {
  const auto rotate = rope_loops(isa()).of(y).rotate[interleaved];
  const std::int64_t heads = x.shape[1], size = x.shape[2], width = frequencies.width;
  parallel_for(x.shape[0], rows_per_chunk(heads * size * sizeof(T)), [&](std::int64_t begin, std::int64_t end) {
    thread_local Factors factors;
    thread_local std::vector<T> copy;
    for (std::int64_t t = begin; t < end; ++t) {
      factors.make(frequencies, positions.at<std::int32_t>(0, t), interleaved);
      const Matrix rows{x.data + t * x.strides[0], heads, size, x.strides[1], x.strides[2]};
      const float *const c = factors.c.data(), *const s = factors.s.data();
      T* const out = y + t * heads * size;
      for (std::int64_t n = 0; n < heads && (width < size || !rows.packed<T>()); ++n) {
        const T* const row = rows.dense_row<T>(n, copy);
        T* const to = out + n * size;
        std::memcpy(to, row, start * sizeof(T));
        std::memcpy(to + start + width, row + start + width, (size - start - width) * sizeof(T));
        if (!rows.packed<T>()) rotate(row + start, 1, 0, c, s, to + start, size, width);
      }
      if (rows.packed<T>()) rotate(rows.row<T>(0) + start, heads, rows.row_stride, c, s, out + start, size, width);
    }
  });
}

}  // namespace

void rope(const Array& x, const Array& positions, double theta, bool interleaved, std::int64_t start, std::int64_t width,
          const Array& y) {
  x.is_float();
  y.has(x.kind);
  positions.has(Kind::i32);
  x.is_shape({kAny, kAny, kAny});
  const Matrix rows = positions.vector(x.shape[0]);
  void* const out = y.output({x.shape[0], x.shape[1], x.shape[2]});
  if (width < 2 || width % 2 || width > x.shape[2] || start < 0 || start > x.shape[2] - width)
    refuse("start and width", "are " + std::to_string(start) + " and " + std::to_string(width),
           "an even slice of " + std::to_string(x.shape[2]));
  if (!(theta > 0)) refuse("theta", "is " + std::to_string(theta), "more than 0");
  thread_local Frequencies frequencies;
  frequencies.make(theta, width);
  const Frequencies& made = frequencies;
  with_float(x.kind, [&](auto tag) {
    run(x, rows, made, interleaved, start, static_cast<decltype(tag)*>(out));
  });
}

PORTHAL_OP(rope, "x positions theta interleaved start width y",
           "y[T, N, D] = x with x[t, n, start : start + width] rotated: pair i, elements (2i, 2i + 1) if interleaved else\n"
           "(i, i + width / 2), by positions[t] * theta^(-2i / width). x float32, bfloat16 or float16 of any strides;\n"
           "positions [T] int32; y contiguous, of x's dtype.")

}  // namespace porthal
#endif
