#include <algorithm>

#include "native.hpp"
#include "threads.hpp"

namespace porthal {
namespace {

void normalise(const Loops<float>& loops, const float* x, const float* w, float* y, std::int64_t n, float eps) {
  loops.rms_norm(x, w, y, n, eps);
}
void normalise(const Loops<bf16>& loops, const bf16* x, const bf16* w, bf16* y, std::int64_t n, float eps) {
  loops.rms_norm(x, w, y, n, eps);
}
void normalise(const Loops<bf16>& loops, const bf16* x, const float* w, bf16* y, std::int64_t n, float eps) {
  loops.rms_norm_f32_weight(x, w, y, n, eps);
}

}  // namespace

template <class X, class W>
void rms_norm(const Matrix& x, const Matrix& weight, X* y, float eps) {
  std::vector<W> space;
  const W* const w = weight.dense_row<W>(0, space);
  const Loops<X>& loops = kernels().loops(y);
  // Below about 64 KB a chunk is done before another thread has woken up.
  const std::int64_t chunk = std::max<std::int64_t>(1, 65536 / (x.columns * sizeof(X) + 1));
  parallel_for(x.rows, chunk, [&](std::int64_t begin, std::int64_t end) {
    std::vector<X> copy;
    for (std::int64_t t = begin; t < end; ++t)
      normalise(loops, x.dense_row<X>(t, copy), w, y + t * x.columns, x.columns, eps);
  });
}

template void rms_norm<float, float>(const Matrix&, const Matrix&, float*, float);
template void rms_norm<bf16, float>(const Matrix&, const Matrix&, bf16*, float);
template void rms_norm<bf16, bf16>(const Matrix&, const Matrix&, bf16*, float);

}  // namespace porthal
