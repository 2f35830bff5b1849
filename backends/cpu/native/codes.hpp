// Codes of 8 and 4 bits: the numbers that they say, and how a row's numbers become such.
#pragma once

#include "coded.hpp"
#include "simd.hpp"

namespace porthal {
namespace {

typedef std::int8_t B __attribute__((vector_size(kLanes)));

inline B narrow(I v) {
#if defined(__AVX512F__)
  return (B)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, B);
#endif
}
inline I wide(B v) {
#if defined(__AVX512F__)
  return (I)_mm512_maskz_cvtepi8_epi32(0xffff, (__m128i)v);
#else
  return __builtin_convertvector(v, I);
#endif
}
inline F number(I v) {
#if defined(__AVX512F__)
  return (F)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)v);
#else
  return __builtin_convertvector(v, F);
#endif
}

// Each has the numbers that its words say: the i-th in float32 and, for pairs, the i-th two. And the rule by which it rounds.
struct Int8 {
  static constexpr Coding kCoding = Coding::int8_channel;
  static constexpr std::int64_t kGroup = 0;
  static constexpr float kTop = 127.0f;
  static F number_of(U w, int i) { return number((I)((w ^ 0x80808080u) << (24 - 8 * i)) >> 24); }
  static F rounded(F x) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
    return (at_least(F{} - 128.0f, at_most(F{} + 127.0f, x)) + kShift) - kShift;
  }
  static I code_of(F rounded) { return __builtin_convertvector(rounded, I); }
  static F number_of(I code) { return number(code); }
};

struct E4m3 {
  static constexpr Coding kCoding = Coding::fp8_block;
  static constexpr std::int64_t kGroup = 128;
  static constexpr float kTop = 448.0f;
  static F number_of(U w, int i) {
    const U byte = w >> code_shift(kCoding, i), size = byte & 0x7fu;
    const U small = (U)(size < 8u), nan = (U)(size == 0x7fu);
    const U normal = (size << 20) + (120u << 23), below = (U)(number((I)size) * 0x1p-9f);
    return (F)((small & below) | (~small & normal) | (nan & 0x7fc00000u) | ((byte & 0x80u) << 24));
  }
#if defined(__AVX512BF16__)
  static void pairs_of(U w, U (&said)[2]) {
    const __m512i words[] = {_mm512_slli_epi16((__m512i)w, 8), (__m512i)w};
    const __m512i sizes = _mm512_and_si512(words[1], _mm512_set1_epi8(0x7f));
    const __mmask64 usual = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(sizes, _mm512_set1_epi8(8)), _mm512_set1_epi8(0x77));
    for (int i = 0; i < 2; ++i)  // sign and size as they are, the exponent with another bias
      said[i] = (U)_mm512_add_epi16(_mm512_and_si512(_mm512_srai_epi16(words[i], 4), _mm512_set1_epi16((short)0x87f0)),
                                    _mm512_set1_epi16(0x3c00));
    if (__builtin_expect(~usual == 0, 1)) return;
    const __m512i below = _mm512_maskz_broadcast_i32x4(  // 0 to 7 times 2^-9, four times over
      0xffff, _mm_set_epi16(0x3c60, 0x3c40, 0x3c20, 0x3c00, 0x3bc0, 0x3b80, 0x3b00, 0));
    for (int i = 0; i < 2; ++i) {
      const __m512i size = _mm512_and_si512(_mm512_srli_epi16(words[i], 8), _mm512_set1_epi16(0x7f));
      const __m512i sign = _mm512_and_si512(words[i], _mm512_set1_epi16((short)0x8000));
      const __mmask32 small = _mm512_cmplt_epi16_mask(size, _mm512_set1_epi16(8));
      const __mmask32 nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
      const __m512i low = _mm512_or_si512(_mm512_permutexvar_epi16(size, below), sign);
      said[i] = (U)_mm512_mask_mov_epi16(_mm512_mask_mov_epi16((__m512i)said[i], small, low), nan, _mm512_set1_epi16(0x7fc0));
    }
  }
#endif
  static F rounded(F x) {
    x = at_least(F{} - kTop, at_most(F{} + kTop, x));
    constexpr float kShift = 24576.0f;  // 1.5 * 2^14, whose neighbours are 2^-9 apart
    const U u = (U)x, near = (u + 0x7ffffu + ((u >> 20) & 1u)) & 0xfff00000u, below = (U)((x + kShift) - kShift);
    const U small = (U)(magnitude(x) < 0x1p-6f);
    return (F)((small & below) | (~small & near));
  }
  static I code_of(F rounded) {
    const U size = (U)magnitude(rounded), small = (U)(size < (121u << 23));
    const U below = (U)__builtin_convertvector((F)size * 0x1p9f, I), normal = (size >> 20) - (120u << 3);
    return (I)((small & below) | (~small & normal) | (U)rounded >> 31 << 7);
  }
  static F number_of(I code) { return number_of((U)code & 0xffu, 0); }
  static F number_of(B byte) {
#if defined(__AVX512F__)
    const __m256i high = _mm256_slli_epi16(_mm256_cvtepi8_epi16((__m128i)byte), 7);
    const __m256i half = _mm256_and_si256(high, _mm256_set1_epi16((short)0xbf80));
    const __m128i size = _mm_and_si128((__m128i)byte, _mm_set1_epi8(0x7f));
    const __mmask16 nan = _mm_cmpeq_epi8_mask(size, _mm_set1_epi8(0x7f));
    const F v = (F)_mm512_maskz_cvtph_ps(0xffff, half) * 256.0f;  // the exponent of float16 has another bias
    return (F)_mm512_mask_mov_ps((__m512)v, nan, _mm512_set1_ps(__builtin_nanf("")));
#else
    return number_of(wide(byte));
#endif
  }
};

#if defined(__AVX512BF16__)
// Of four bits by a table of bfloat16, twice over: of an index 5 bits count.
inline void pairs_of_nibbles(U w, __m256i numbers, U (&said)[4]) {
  const __m512i table = _mm512_maskz_broadcast_i64x4(0xff, numbers);
  for (int i = 0; i < 4; ++i) said[i] = (U)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)w, 4 * i), table);
}
#endif

template <Coding C>
struct Int4 {
  static constexpr Coding kCoding = C;
  static constexpr std::int64_t kGroup = form_of(C).group;
  static constexpr float kTop = 0.0f;  // the other operand stays as it is
  static F number_of(U w, int i) { return number((I)(w << (28 - code_shift(C, i))) >> 28); }
#if defined(__AVX512BF16__)
  static void pairs_of(U w, U (&said)[4]) {
    pairs_of_nibbles(w, _mm256_set_epi16(
      (short)0xbf80, (short)0xc000, (short)0xc040, (short)0xc080, (short)0xc0a0, (short)0xc0c0, (short)0xc0e0, (short)0xc100,
      0x40e0, 0x40c0, 0x40a0, 0x4080, 0x4040, 0x4000, 0x3f80, 0), said);  // 0 to 7 and -8 to -1
  }
#endif
};

// e2m1, with scales of a byte: e8m0 in MXFP4, e4m3 in NVFP4.
template <Coding C>
struct E2m1 {
  static constexpr Coding kCoding = C;
  static constexpr std::int64_t kGroup = form_of(C).group;
  static constexpr float kTop = 0.0f;
  static F number_of(U w, int i) {
    const U code = w >> code_shift(C, i), size = code & 7u, small = (U)(size < 2u);
    const U normal = (size << 22) + (126u << 23), below = (U)(number((I)size) * 0.5f);
    return (F)((small & below) | (~small & normal) | ((code & 8u) << 28));
  }
#if defined(__AVX512BF16__)
  static void pairs_of(U w, U (&said)[4]) {
    pairs_of_nibbles(w, _mm256_set_epi16(
      (short)0xc0c0, (short)0xc080, (short)0xc040, (short)0xc000, (short)0xbfc0, (short)0xbf80, (short)0xbf00, (short)0x8000,
      0x40c0, 0x4080, 0x4040, 0x4000, 0x3fc0, 0x3f80, 0x3f00, 0), said);  // 0, 0.5, 1, 1.5, 2, 3, 4, 6, and below zero
  }
#endif
  static F scale_of(B byte) {
    if constexpr (C == Coding::nvfp4) return E4m3::number_of(byte);
    constexpr std::uint32_t kEnd = 0x400000u;  // in 2^-127 and NaN, which have 0 and 255
#if defined(__AVX512F__)
    const __mmask16 ends = _mm_cmp_epu8_mask(_mm_add_epi8((__m128i)byte, _mm_set1_epi8(1)), _mm_set1_epi8(1), _MM_CMPINT_LE);
    const U power = (U)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)byte) << 23;
    return (F)_mm512_mask_or_epi32((__m512i)power, ends, (__m512i)power, _mm512_set1_epi32(kEnd));
#else
    const U power = (U)wide(byte) & 0xffu, ends = (U)(power == 0u) | (U)(power == 0xffu);
    return (F)((power << 23) | (ends & kEnd));
#endif
  }
};

// -- rows ---------------------------------------------------------------------------------------------------------------

template <class X>
inline F some(const char* x, std::ptrdiff_t step, std::int64_t i, std::int64_t n) {
  if (step == sizeof(X) && n - i >= kLanes) return load(reinterpret_cast<const X*>(x) + i);
  X part[kLanes] = {};
  for (std::int64_t j = 0; j < kLanes && j < n - i; ++j) std::memcpy(part + j, x + (i + j) * step, sizeof(X));
  return load(part);
}

// The scale of elements [begin, end): their largest magnitude / kTop, 1 where all are zero, NaN where one is not finite.
template <class X, class Code>
inline float scale_of(const char* x, std::ptrdiff_t step, std::int64_t begin, std::int64_t end) {
  U most = {};
  for (std::int64_t i = begin; i < end; i += kLanes) {
    const U size = (U)magnitude(some<X>(x, step, i, end));
    most = size > most ? size : most;  // what is not finite is above all
  }
  std::uint32_t highest = 0;
  for (int i = 0; i < kLanes; ++i) highest = most[i] > highest ? most[i] : highest;
  float amax;
  std::memcpy(&amax, &highest, sizeof amax);
  return highest >= 0x7f800000u ? __builtin_nanf("") : highest ? amax / Code::kTop : 1.0f;
}

// The numbers that codes say of v, before they are scaled.
template <class Code>
inline F coded(F v, F scale) {
  const F found = Code::rounded(v / scale);
  return found == found ? found : F{};  // of a scale that is none, or 0
}

}  // namespace
}  // namespace porthal
