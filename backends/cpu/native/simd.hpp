// Vectors of the instruction set that the including file is compiled for (PORTHAL_ISA names it). Everything is internal
// and no standard template is instantiated here, so that no AVX code can replace an inline function of the baseline.
#pragma once

#include <cstring>

#include "isa.hpp"

#if !defined(PORTHAL_ISA)
#error "simd.hpp is for loops that are compiled once per instruction set"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace porthal {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t I __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t S __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
inline V load_raw(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Written out where GCC would split a __builtin_convertvector into halves; masked, as the plain ones warn in GCC 12.
inline U widen(S s) {
#if defined(__AVX512F__)
  return (U)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)s);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)s);
#else
  return __builtin_convertvector(s, U);
#endif
}
inline S narrow(U u) {
#if defined(__AVX512F__)
  return (S)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
#else
  return __builtin_convertvector(u, S);
#endif
}

inline F load(const float* p) { return load_raw<F>(p); }
inline F load(const bf16* p) { return (F)(widen(load_raw<S>(p)) << 16); }
inline void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }
// Round to nearest even; a NaN stays a (quiet) NaN. vcvtneps2bf16 flushes subnormals, so it is left to vectors without.
inline void store(bf16* p, F v) {
#if defined(__AVX512BF16__)
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)v, 0x20) == 0, 1)) {
    const __m256bh s = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &s, sizeof s);
    return;
  }
#endif
  const U u = (U)v, nan = (U)(v != v);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16, quiet = (u >> 16) | 0x40u;
  const S s = narrow((rounded & ~nan) | (quiet & nan));
  std::memcpy(p, &s, sizeof s);
}

// Half precision: by instruction where there is one, else by its bits.
inline F load(const fp16* p) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const U u = widen(load_raw<S>(p)), size = u & 0x7fffu;
  const U finite = (U)((F)(size << 13) * 0x1p112f), special = (size << 13) | 0x7f800000u, is_special = (U)(size >= 0x7c00u);
  return (F)((special & is_special) | (finite & ~is_special) | ((u & 0x8000u) << 16));
#endif
}
inline void store(fp16* p, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  const U u = (U)v, size = u & 0x7fffffffu, half = U{} + 0x3f000000u;
  const U subnormal = (U)((F)size + (F)half) - half;
  const U normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  const U is_small = (U)(size < 0x38800000u), is_large = (U)(size >= 0x47800000u), nan = (U)(size > 0x7f800000u);
  const U finite = (subnormal & is_small) | (normal & ~is_small), large = (U{} + 0x7c00u) | (nan & 0x200u) | (nan & (size >> 13));
  const S s = narrow((finite & ~is_large) | (large & is_large) | ((u >> 16) & 0x8000u));
  std::memcpy(p, &s, sizeof s);
#endif
}

template <class T>
inline F load_some(const T* p, std::int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
inline void store_some(T* p, F v, std::int64_t n) {
  T padded[kLanes];
  store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}

// Whether a lane of a comparison is true.
inline bool any(I lanes) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  std::uint64_t half[2];
  std::memcpy(half, &lanes, sizeof half);
  return (half[0] | half[1]) != 0;
#endif
}

inline float total(F v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// The greater and the smaller of two; where x is NaN, x. In one instruction where GCC would compare and choose.
inline F at_least(F low, F x) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)low, (__m256)x);
#else
  return x < low ? low : x;
#endif
}
inline F at_most(F high, F x) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)high, (__m256)x);
#else
  return x > high ? high : x;
#endif
}

// exp with about 1 ulp of error between the clamps; NaN passes through.
inline F exp(F x) {
  x = at_least(F{} - 87.3f, at_most(F{} + 88.3f, x));
  const F shift = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = x * 1.44269504f + shift, n = shifted - shift;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (F)(((U)shifted + (127u - 0x4b400000u)) << 23);
}

// exp for x <= 0, with an end: 0 far down; NaN passes through.
inline F exp_down(F x) {
#if defined(__AVX512F__)
  x = at_least(F{} - 200.0f, x);
  const F n = (F)_mm512_maskz_roundscale_ps(0xffff, (__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (F)_mm512_maskz_scalef_ps(0xffff, (__m512)(p * (r * r) + r + 1.0f), (__m512)n);
#else
  const F e = exp(x);
  return x < -87.3f ? F{} : e;
#endif
}

// 1 / x for x of 1 to 2, to the last bit or the one before.
inline F inverse(F x) {
#if defined(__AVX512F__)
  const F guess = (F)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return guess + guess * (1.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

inline F magnitude(F x) { return (F)((U)x & 0x7fffffffu); }

// 1 / (1 + exp(-x)), right for any x; NaN passes through.
inline F sigmoid(F x) {
  const F e = exp_down(-magnitude(x));
  return (x < 0.0f ? e : F{} + 1.0f) * inverse(1.0f + e);
}

}  // namespace
}  // namespace porthal
