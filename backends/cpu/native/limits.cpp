// What this machine can do at most, one short burst at a time: arithmetic from registers, reads and copies of memory.
// The inner loops are assembly, so that they need no compiler flags and no register is spilled.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <string>

#include "isa.hpp"
#include "threads.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace porthal {
namespace {

constexpr std::int64_t kTurns = 20000;  // of an arithmetic loop in one chunk: about 70 microseconds
constexpr std::int64_t kChunks = 16;    // for each thread
constexpr std::int64_t kLine = 64;

#if defined(PORTHAL_X86)
// Twelve chains hide the latency of every instruction that is measured here.
#define TWELVE(X) X("0") X("1") X("2") X("3") X("4") X("5") X("6") X("7") X("8") X("9") X("10") X("11")
#define BURST(name, before, one)                                                                                      \
  void name() {                                                                                                       \
    std::int64_t n = kTurns;                                                                                          \
    asm volatile(before "1:\n\t" TWELVE(one) "dec %0\n\tjnz 1b\n\tvzeroupper"                                         \
                 : "+r"(n)                                                                                            \
                 :                                                                                                    \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",  \
                   "xmm14", "xmm15", "cc");                                                                           \
  }
#define YMM "vxorps %%ymm14, %%ymm14, %%ymm14\n\tvxorps %%ymm15, %%ymm15, %%ymm15\n\t"
#define ZMM "vpxorq %%zmm14, %%zmm14, %%zmm14\n\tvpxorq %%zmm15, %%zmm15, %%zmm15\n\t"
#define FMA256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" i "\n\t"
#define FMA512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" i "\n\t"
#define DPBF16(i) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" i "\n\t"
#define DPBUSD(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" i "\n\t"
BURST(fma256, YMM, FMA256)
BURST(fma512, ZMM, FMA512)
BURST(dpbf16, ZMM, DPBF16)
BURST(dpbusd, ZMM, DPBUSD)

#if defined(PORTHAL_AMX)
// Tiles of 16 rows in four chains: sums in registers 0 to 3. A sixteenth of the turns takes as long.
void tdpbf16() {
  struct {
    std::uint8_t palette = 1, none[15] = {};
    std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } const layout;
  std::int64_t n = kTurns / 16;
#define TDPBF16(i) "tdpbf16ps %%tmm5, %%tmm4, %%tmm" i "\n\t"
#define FOUR TDPBF16("0") TDPBF16("1") TDPBF16("2") TDPBF16("3")
  asm volatile("ldtilecfg %1\n\t1:\n\t" FOUR FOUR FOUR "dec %0\n\tjnz 1b\n\ttilerelease" : "+r"(n) : "m"(layout) : "cc");
}
#endif

#define READ(name, type, a, b, c, d)                                                                         \
  void name(const char* p, std::int64_t bytes) {                                                             \
    const char* const end = p + bytes;                                                                       \
    asm volatile("1:\n\t" type " (%0), " a "\n\t" type " 64(%0), " b "\n\t" type " 128(%0), " c "\n\t" type  \
                 " 192(%0), " d "\n\tadd $256, %0\n\tcmp %1, %0\n\tjb 1b\n\tvzeroupper"                      \
                 : "+r"(p)                                                                                   \
                 : "r"(end)                                                                                  \
                 : "xmm0", "xmm1", "xmm2", "xmm3", "cc", "memory");                                          \
  }
READ(read512, "vmovdqa64", "%%zmm0", "%%zmm1", "%%zmm2", "%%zmm3")
void read256(const char* p, std::int64_t bytes) {
  const char* const end = p + bytes;
  asm volatile(
      "1:\n\tvmovdqa (%0), %%ymm0\n\tvmovdqa 32(%0), %%ymm1\n\tvmovdqa 64(%0), %%ymm2\n\tvmovdqa 96(%0), %%ymm3\n\t"
      "add $128, %0\n\tcmp %1, %0\n\tjb 1b\n\tvzeroupper"
      : "+r"(p)
      : "r"(end)
      : "xmm0", "xmm1", "xmm2", "xmm3", "cc", "memory");
}
// Stores that pass the caches by: they do not read what they overwrite.
void copy256(char* to, const char* from, std::int64_t bytes) {
  const char* const end = from + bytes;
  asm volatile(
      "1:\n\tvmovdqa (%1), %%ymm0\n\tvmovdqa 32(%1), %%ymm1\n\tvmovntdq %%ymm0, (%0)\n\tvmovntdq %%ymm1, 32(%0)\n\t"
      "add $64, %0\n\tadd $64, %1\n\tcmp %2, %1\n\tjb 1b\n\tsfence\n\tvzeroupper"
      : "+r"(to), "+r"(from)
      : "r"(end)
      : "xmm0", "xmm1", "cc", "memory");
}
#endif

// -- for any processor -------------------------------------------------------------------------------------------------

typedef float F4 __attribute__((vector_size(16)));
typedef std::uint64_t U2 __attribute__((vector_size(16)));

void multiply_add() {
  F4 sums[12] = {};
  F4 a = {}, b = {};
  for (std::int64_t n = 0; n < kTurns; ++n) {
    asm volatile("" : : : "memory");
    for (F4& sum : sums) sum += a * b;
  }
  asm volatile("" : : "g"(&sums) : "memory");
}

void read_plain(const char* p, std::int64_t bytes) {
  U2 sums[4] = {};
  for (std::int64_t i = 0; i < bytes; i += kLine)
    for (int j = 0; j < 4; ++j) sums[j] |= *reinterpret_cast<const U2*>(p + i + 16 * j);
  asm volatile("" : : "g"(&sums) : "memory");
}

void copy_plain(char* to, const char* from, std::int64_t bytes) { std::memcpy(to, from, bytes); }

// -- which of them this processor has ----------------------------------------------------------------------------------

struct Burst {
  void (*run)();
  double operations;  // in one turn of kTurns: twelve instructions, a multiplication and an addition in each lane
};

struct Means {
  std::map<std::string, Burst> bursts;
  void (*read)(const char*, std::int64_t);
  void (*copy)(char*, const char*, std::int64_t);
};

Means means() {
#if defined(PORTHAL_X86)
  if (isa() != Isa::baseline) {
    const bool wide = isa() != Isa::avx2;
    Means found{{{"fp32", wide ? Burst{fma512, 12 * 32} : Burst{fma256, 12 * 16}}}, wide ? read512 : read256, copy256};
    found.bursts["bf16"] = isa() < Isa::avx512bf16 ? found.bursts["fp32"] : Burst{dpbf16, 12 * 64};  // widened first
#if defined(PORTHAL_AMX)
    if (isa() == Isa::amx) found.bursts["bf16"] = {tdpbf16, 12 * 16 * 16 * 64 / 16};
#endif
    if (wide && __builtin_cpu_supports("avx512vnni")) found.bursts["int8"] = {dpbusd, 12 * 128};
    return found;
  }
#endif
  return {{{"fp32", {multiply_add, 12 * 8}}, {"bf16", {multiply_add, 12 * 8}}}, read_plain, copy_plain};
}

// Memory on large pages, kept from call to call.
char* memory(std::int64_t bytes) {
  static char* held = nullptr;
  static std::int64_t size = 0;
  if (bytes > size) {
    if (held) munmap(held, size);
    void* const fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    held = nullptr, size = 0;
    if (fresh == MAP_FAILED) throw std::bad_alloc();
    madvise(fresh, bytes, MADV_HUGEPAGE);
    std::memset(fresh, 1, bytes);
    held = static_cast<char*>(fresh), size = bytes;
  }
  return held;
}

double compute(const std::string& dtype) {
  const auto known = means().bursts;
  const auto burst = known.find(dtype);
  if (burst == known.end()) throw py::value_error("dtype is '" + dtype + "', for which this processor has no arithmetic.");
  py::gil_scoped_release release;
  const std::int64_t chunks = kChunks * num_threads();
  parallel_for(chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (; begin < end; ++begin) burst->second.run();
  });
  return burst->second.operations * kTurns * chunks;
}

void check_bytes(std::int64_t held, std::int64_t bytes, std::int64_t chunk, std::int64_t passes) {
  const bool whole = chunk > 0 && chunk % 256 == 0 && bytes >= chunk && bytes % chunk == 0;
  if (!whole || passes < 1 || held < bytes || held > (std::int64_t{1} << 36))
    throw py::value_error("bytes must be a multiple of chunk, and chunk of 256, in at most 64 GiB that are held.");
}

// Reads `bytes` from a place in `held` bytes that moves with each call, in chunks, each `passes` times.
double read(std::int64_t held, std::int64_t bytes, std::int64_t chunk, std::int64_t passes) {
  check_bytes(held, bytes, chunk, passes);
  static std::int64_t turn = 0;
  const char* const from = memory(held) + turn++ % (held / bytes) * bytes;
  const auto use = means().read;
  py::gil_scoped_release release;
  parallel_for(bytes / chunk, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      for (std::int64_t pass = 0; pass < passes; ++pass) use(from + i * chunk, chunk);
  });
  return static_cast<double>(bytes) * passes;
}

// Copies the first half of `bytes` to the second; what is read and what is written both count.
double copy(std::int64_t held, std::int64_t bytes, std::int64_t chunk) {
  check_bytes(held, bytes, 2 * chunk, 1);
  static std::int64_t turn = 0;
  char* const from = memory(held) + turn++ % (held / bytes) * bytes;
  const auto use = means().copy;
  py::gil_scoped_release release;
  parallel_for(bytes / 2 / chunk, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) use(from + bytes / 2 + i * chunk, from + i * chunk, chunk);
  });
  return static_cast<double>(bytes);
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def(
      "arithmetic",
      [] {
        py::list names;
        for (const auto& [name, burst] : means().bursts) names.append(name);
        return names;
      },
      "The dtypes that `compute` knows here.");
  m.def("compute", &compute, "dtype"_a, "Multiply and add as fast as all threads can, for about a ms: operations done.");
  m.def("read", &read, "held"_a, "bytes"_a, "chunk"_a, "passes"_a = 1, "Read memory: bytes read.");
  m.def("copy", &copy, "held"_a, "bytes"_a, "chunk"_a, "Copy memory: bytes read and written.");
}

}  // namespace porthal
