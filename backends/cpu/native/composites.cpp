// Operators that are other ones in a row, without Python between them. Intermediate results are rounded to the input's dtype.
#include "bind.hpp"
#include "copies.hpp"
#include "layer_norm.hpp"
#include "linear.hpp"
#include "rms_norm.hpp"
#include "rope.hpp"

namespace porthal {
namespace {

// The last axis parted into heads of `size`, which lie one behind the other.
Array heads(Array a, std::int64_t size) {
  a.shape[2] = size;
  a.strides[2] = a.strides[1];
  a.shape[1] = size ? a.shape[1] / size : 0;
  a.strides[1] *= size;
  a.dims = 3;
  return a;
}

// Elements [begin, end) of the last axis.
Array part(Array a, std::int64_t begin, std::int64_t end) {
  const int last = a.dims - 1;
  a.data += begin * a.strides[last];
  a.shape[last] = end - begin;
  a.contiguous = false;
  return a;
}

// An intermediate result, in memory that grows and stays.
Array between(Scratch<char>& memory, const char* name, Kind kind, std::int64_t rows, std::int64_t columns) {
  const std::int64_t item = kind == Kind::f32 ? 4 : 2;
  Array a{};
  a.data = memory.at_least(rows * columns * item + 1);
  a.name = name;
  a.shape[0] = rows;
  a.shape[1] = columns;
  a.strides[0] = columns * item;
  a.strides[1] = item;
  a.dims = 2;
  a.kind = kind;
  a.contiguous = a.writable = true;
  return a;
}

// Whatever is read from Python has the dtype of h, so that no intermediate result is ever refused for its own.
void check(const Array& h, std::initializer_list<const Packed*> weights, std::initializer_list<const Array*> fields) {
  if (h.dims < 2) h.matrix();
  for (const Packed* w : weights) h.has(w->kind);
  for (const Array* field : fields) field->has(h.kind);
}

// h is what linear multiplies; for each token: qr, q_latent and q_rope, and two rows of the cache.
void mla_prolog(const Array& h, const Packed& q_a, const Array& q_norm, const Packed& q_b, const Packed& kv_a,
                const Array& kv_norm, const Packed& w_uk, const Array& c_field, const Array& kp_field, const Array& slots,
                const Array& positions, double theta, double eps, const Array& q_latent, const Array& q_rope,
                const Array& qr) {
  check(h, {&q_a, &q_b, &kv_a, &w_uk}, {&c_field, &kp_field});
  thread_local Scratch<char> memory[5];
  const std::int64_t tokens = h.shape[0], latent = w_uk.rows, nope = w_uk.columns, width = kv_a.rows - latent;
  if (width < 1 || q_b.rows != w_uk.experts * (nope + width))
    throw std::invalid_argument("q_b, kv_a and w_uk do not fit together: they have N * (D + R), C + R and N, C, D rows.");
  const Array raw = between(memory[0], "q_a", h.kind, tokens, q_a.rows), q = between(memory[1], "q", h.kind, tokens, q_b.rows);
  const Array a = between(memory[2], "kv_a", h.kind, tokens, kv_a.rows), c = between(memory[3], "c", h.kind, tokens, latent);
  const Array kp = between(memory[4], "kp", h.kind, tokens, width), by_head = heads(q, nope + width);
  linear(h, q_a, raw);
  linear(h, kv_a, a);
  rms_norm(raw, q_norm, qr, eps);
  linear(qr, q_b, q);
  head_linear(part(by_head, 0, nope), w_uk, q_latent);
  rope(part(by_head, nope, nope + width), positions, theta, true, 0, width, q_rope);
  rms_norm(part(a, 0, latent), kv_norm, c, eps);
  rope(heads(part(a, latent, latent + width), width), positions, theta, true, 0, width, heads(kp, width));
  kv_write(c_field, slots, c);
  kv_write(kp_field, slots, kp);
}

void index_prolog(const Array& qr, const Array& h, const Packed& wq_b, const Packed& wk, const Array& k_norm,
                  const Array& k_bias, const Packed& w_head, const Array& field, const Array& slots, const Array& positions,
                  double theta, std::int64_t width, double eps, const Array& iq, const Array& w) {
  check(qr, {&wq_b, &wk, &w_head}, {&h, &field});
  thread_local Scratch<char> memory[4];
  const std::int64_t tokens = h.shape[0], size = wk.rows;
  if (wq_b.rows % size) throw std::invalid_argument("wq_b and wk do not fit together: they have G * D and D rows.");
  const Array q = between(memory[0], "iq", h.kind, tokens, wq_b.rows), raw = between(memory[1], "k", h.kind, tokens, size);
  const Array normed = between(memory[2], "k", h.kind, tokens, size), k = between(memory[3], "k", h.kind, tokens, size);
  linear(qr, wq_b, q);
  rope(heads(q, size), positions, theta, true, 0, width, iq);
  linear(h, w_head, w);
  linear(h, wk, raw);
  layer_norm(raw, k_norm, k_bias, normed, eps);
  rope(heads(normed, size), positions, theta, true, 0, width, heads(k, size));
  kv_write(field, slots, k);
}

void mla_output(const Array& o, const Packed& w_uv, const Packed& w_o, const Array& y) {
  check(o, {&w_uv, &w_o}, {});
  thread_local Scratch<char> memory;
  const Array values = between(memory, "values", o.kind, o.shape[0], w_uv.experts * w_uv.rows);
  head_linear(o, w_uv, heads(values, w_uv.rows));
  linear(values, w_o, y);
}

void mtp_input(const Array& e, const Array& g, const Array& enorm, const Array& hnorm, const Packed& eh_proj, double eps,
               const Array& u) {
  check(e, {&eh_proj}, {&g});
  thread_local Scratch<char> memory[3];
  const std::int64_t tokens = e.shape[0], size = e.shape[1];
  const Array first = between(memory[0], "e", e.kind, tokens, size), second = between(memory[1], "g", e.kind, tokens, size);
  const Array both = between(memory[2], "normed", e.kind, tokens, 2 * size);
  rms_norm(e, enorm, first, eps);
  rms_norm(g, hnorm, second, eps);
  concat(first, second, both);
  linear(both, eh_proj, u);
}

}  // namespace

PORTHAL_OP(mla_prolog, "h q_a q_norm q_b kv_a kv_norm w_uk c_field kp_field slots positions theta eps q_latent q_rope qr",
           "qr = rms_norm(q_a h); [qn | qp] = q_b qr per head; q_latent = w_uk qn, q_rope = rope(qp); [c | kp] = kv_a h;\n"
           "c_field[slots] = rms_norm(c), kp_field[slots] = rope(kp).")
PORTHAL_OP(index_prolog, "qr h wq_b wk k_norm k_bias w_head field slots positions theta width eps iq w",
           "iq = rope(wq_b qr) per head; field[slots] = rope(layer_norm(wk h)); w = w_head h in float32.")
PORTHAL_OP(mla_output, "o w_uv w_o y", "y = w_o [w_uv[n] o[:, n] for every head n].")
PORTHAL_OP(mtp_input, "e g enorm hnorm eh_proj eps u", "u = eh_proj [rms_norm(e, enorm) | rms_norm(g, hnorm)].")

}  // namespace porthal
