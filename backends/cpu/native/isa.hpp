// Element types, instruction sets, and how one operator's loops exist once in each of them.
//
// A file `op.cpp` is compiled once without PORTHAL_ISA, as what is bound to Python, and once per instruction set with it, as
// loops. The two halves meet in a struct of function pointers:
//
//   struct OpLoops { void (*row)(...); };
//   #if defined(PORTHAL_ISA)
//   PORTHAL_LOOPS(OpLoops, op_loops) = {row};
//   #else
//   PORTHAL_TABLES(OpLoops, op_loops)         // then op_loops(isa()).row(...)
//   #endif
#pragma once

#include <cstddef>
#include <cstdint>

namespace porthal {

struct bf16 {
  std::uint16_t bits;
};
struct fp16 {
  std::uint16_t bits;
};

// avx512bf16 has products of int8 as well (VNNI); amx is that, and products of both in tiles.
enum class Isa : int { baseline, avx2, avx512, avx512bf16, amx };

// The one in use: the best that this CPU runs unless it was chosen.
Isa isa();

// One table per element type.
template <template <class> class Loops>
struct PerFloat {
  Loops<float> f32;
  Loops<bf16> b16;
  Loops<fp16> f16;

  const Loops<float>& of(const float*) const { return f32; }
  const Loops<bf16>& of(const bf16*) const { return b16; }
  const Loops<fp16>& of(const fp16*) const { return f16; }
};

// And more of bfloat16: for rows of whole pairs, and of whole cache lines.
template <template <class> class Loops>
struct FloatsAndPairs {
  PerFloat<Loops> each;
  Loops<bf16> pairs, lines;

  // `width` is that of a row, or of several, joined by |.
  template <class T>
  const Loops<T>& of(const T* type, std::int64_t) const { return each.of(type); }
  const Loops<bf16>& of(const bf16*, std::int64_t width) const {
    return width % 2 ? each.b16 : width % 32 ? pairs : lines;
  }
};

#define PORTHAL_JOIN_(a, b) a##b
#define PORTHAL_JOIN(a, b) PORTHAL_JOIN_(a, b)

#define PORTHAL_LOOPS(Type, name)                       \
  extern const Type PORTHAL_JOIN(name##_, PORTHAL_ISA); \
  const Type PORTHAL_JOIN(name##_, PORTHAL_ISA)

#if defined(PORTHAL_X86)
#define PORTHAL_TABLES_OF(Type, name, best)                                                                       \
  extern const Type name##_baseline, name##_avx2, name##_avx512, name##_avx512bf16, best;                         \
  inline const Type& name(Isa isa) {                                                                              \
    static const Type* const all[] = {&name##_baseline, &name##_avx2, &name##_avx512, &name##_avx512bf16, &best}; \
    return *all[static_cast<int>(isa)];                                                                           \
  }
#else
#define PORTHAL_TABLES_OF(Type, name, best) \
  extern const Type name##_baseline;        \
  inline const Type& name(Isa) { return name##_baseline; }
#endif
#define PORTHAL_TABLES(Type, name) PORTHAL_TABLES_OF(Type, name, name##_avx512bf16)
// Of files that have loops with tiles, where the compiler can make them.
#if defined(PORTHAL_AMX)
#define PORTHAL_TABLES_WITH_TILES(Type, name) PORTHAL_TABLES_OF(Type, name, name##_amx)
#else
#define PORTHAL_TABLES_WITH_TILES(Type, name) PORTHAL_TABLES(Type, name)
#endif

}  // namespace porthal
