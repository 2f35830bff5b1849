"""Planted in the C++ kernels of the cpu backend and the threads below them."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

PAIRS = "float32 is not read in pairs, so it has no padding"
norm = partial(Defect, "rms_norm", source="rms_norm.cpp")
loops = partial(Defect, "moe_experts", source="moe_experts.cpp")
experts = partial(Defect, "moe_experts", source="moe_experts.cpp")
tail = """    if (i < n) {
      const F v = load_some(x + i, n - i);
      squares[0] += v * v;
    }
"""
written = "if (i < n) store_some(y + i, load_some(x + i, n - i) * scale * load_some(weight + i, n - i), n - i);\n"
local = "return id >= 0 && e >= 0 && e < experts ? e : -1;\n"
products = partial(Defect, "linear", source="panel.cpp")
shares = "const std::int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;"

DEFECTS = [
    norm("squares-of-the-tail-missing", "vector tail", tail, ""),
    norm("tail-written-whole", "outside", written, written.replace("store_some(", "store(").replace("n - i), n - i)", "n - i))")),
    norm("bits-cut-off", "rounding", "inline void store(bf16* p, F v) {\n", "inline void store(bf16* p, F v) {\n  v = (F)((U)v & 0xffff0000u);\n", dtypes=("bfloat16",),
         why="nothing is stored in bfloat16 where x is float32", source="simd.hpp"),
    norm("partial-sums-in-bfloat16", "accumulator", "squares[j] += v * v;\n", "squares[j] = (F)((U)(squares[j] + v * v) & 0xffff0000u);\n"),
    norm("eps-forgotten", "eps", "__builtin_sqrtf(mean + eps)", "__builtin_sqrtf(mean)"),
    norm("copy-of-the-first-row-kept", "stale", "x.dense_row<X>(t, copy)", "copy.empty() ? x.dense_row<X>(t, copy) : copy.data()"),
    norm("last-chunk-dropped", "threads", "if (begin >= count) return;\n", "if (begin + chunk > count) return;\n", source="threads.cpp"),
    loops("first-blocks-of-the-depth-lost", "blocks", "begin ? load(out + m * kPanel + j * kLanes) : F{};", "F{};", source="panel.cpp"),
    loops("last-columns-written-whole", "outside", "store_some(at, add ? out[v] + load_some(at, some) : out[v], some);", "store(at, out[v]);"),
    loops("exponent-unbounded", "overflow", "at_most(F{} + 88.3f, x)", "x", source="simd.hpp"),
    experts("up-before-gate", "preparation", "gated ? i % 2 * all : 0", "gated ? (i + 1) % 2 * all : 0", source="packed.cpp"),
    experts("odd-column-not-packed", "preparation", "c * kWord < some; ++c)", "(c + 1) * kWord <= some; ++c)", source="panel.cpp",
            dtypes=("bfloat16",), why=PAIRS),
    experts("negative-ids-are-the-first-expert", "-1", local, "return e < experts ? std::max<std::int64_t>(e, 0) : -1;\n", discrepancy=9),
    experts("first-expert-not-subtracted", "attribute", "e = id - first_expert;", "e = id;"),
    experts("ids-compared-unsigned", "-1", local, "return static_cast<std::uint64_t>(e) < static_cast<std::uint64_t>(experts) ? e : -1;\n",
            equivalent="first_expert is never negative, so a negative id stays negative without it, and is huge when unsigned"),
    experts("second-round-over-the-first", "blocks", "y + t * model + p * width", "y + (t - begin) * model + p * width"),
    experts("rows-between-blocks-lost", "blocks", "count * (part + 1) / parts - first}", "count / parts}"),
    experts("sums-shared-by-threads", "threads", "float* const sums = sums_of_thread.at_least(w13.row_block * width * up.together);", "static Scratch<float> shared;\n      float* const sums = shared.at_least(w13.row_block * width * up.together);",
            discrepancy=42),
    products("strided-rows-in-place", "strides", "const bool dense = step == sizeof(T);", "const bool dense = true;", discrepancy=27),
    products("padding-of-the-input-stale", "stale", "for (i = n; i < depth; ++i) to[i] = Row<T>{};", "", dtypes=("bfloat16",), why=PAIRS),
    products("second-half-where-whole", "vector tail", "used > kHalf ? 2 : 1", "used == kPanel ? 2 : 1"),
    products("tail-written-whole", "outside", "store_some(y + i, load(sums + i), used - i);", "store(y + i, load(sums + i));"),
    products("five-rows-as-four", "blocks", "height == 5 ? tile<T, 5, 4>", "height == 5 ? tile<T, 4, 4>"),
    products("first-blocks-lost", "blocks", "begin ? load(out + m * kPanel + j * kLanes) : F{};", "F{};"),
    products("rows-between-blocks-lost", "blocks", shares, shares.replace("end = rows * (part + 1) / parts", "end = begin + rows / parts"), source="linear.cpp"),
    Defect("head_linear", "first-matrix-for-all", "heads", "append(works, w, n, n * tokens,", "append(works, w, 0, n * tokens,", source="linear.cpp"),
    Defect("head_linear", "head-of-the-neighbour", "heads", "i / tokens * x.strides[1]", "(i / tokens + 1) % heads * x.strides[1]", source="linear.cpp"),
    Defect("grouped_gemm", "experts-without-rows-not-counted", "-1", "append(works, w, e, first, count,", "append(works, w, works.size(), first, count,", source="linear.cpp"),
    Defect("add", "sum-of-the-tail-written-whole", "outside", "if (i < n) store_some(y + i, f(load_some(a + i, n - i), load_some(b + i, n - i)), n - i);", "if (i < n) store(y + i, f(load_some(a + i, n - i), load_some(b + i, n - i)));", source="elementwise.cpp"),
    Defect("add", "strided-rows-in-place", "strides", "right.dense_row<T>(t, other)", "right.row<T>(t)", source="elementwise.cpp"),
    Defect("silu_mul", "up-is-activated", "order", "loops.silu_mul(row, row + half,", "loops.silu_mul(row + half, row,", source="elementwise.cpp"),
    Defect("silu_mul", "sigmoid-alone", "formula", "return g * sigmoid(g) * u;", "return sigmoid(g) * u;", source="elementwise.cpp"),
    Defect("cast", "tail-not-cast", "vector tail", "if (i < n) store_some(y + i, f(load_some(a + i, n - i), load_some(b + i, n - i)), n - i);\n", "", source="elementwise.cpp"),
    Defect("layer_norm", "variance-of-what-is-not-centred", "cancellation", "return (v - mean) * (v - mean); })", "return v * v; })", source="layer_norm.cpp"),
    Defect("layer_norm", "padding-counts-in-the-variance", "vector tail", "sums[1] += load_some(lane, n - i);", "sums[1] += load(lane);", source="layer_norm.cpp"),
    Defect("layer_norm", "bias-of-another-dtype", "dtype", "a.kind == Kind::f32 ? static_cast<const void*>(m.dense_row<float>(0, wide)) : m.dense_row<T>(0, same)", "a.kind == Kind::f32 ? static_cast<const void*>(m.row<float>(0)) : m.dense_row<T>(0, same)", source="layer_norm.cpp"),
    Defect("add_rms_norm", "residual-not-added", "residual", "const F v = load(x + i) + load(residual + i);", "const F v = load(x + i);", source="rms_norm.cpp"),
    Defect("add_rms_norm", "sum-of-the-tail-lost", "vector tail", "store_some(r + i, v, n - i);", "store_some(r + i, v, 0);", source="rms_norm.cpp"),
    Defect("rope", "halves-exchanged", "layout", "const std::int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : n;", "const std::int64_t step = interleaved ? 1 : 2, apart = interleaved ? n : 1;", source="rope.cpp"),
    Defect("rope", "behind-the-slice-not-copied", "outside", "std::memcpy(to + start + width, row + start + width, (size - start - width) * sizeof(T));", "", source="rope.cpp"),
    Defect("rope", "quarters-by-one-bit", "quadrant", "static_cast<float>((turns + 1) & 2 ? -first : first);", "static_cast<float>(turns & 2 ? -first : first);", source="rope.cpp"),
    Defect("rope", "frequencies-of-the-first-call", "stale", "if (theta == new_theta && width == new_width) return;", "if (width == new_width) return;", source="rope.cpp"),
    Defect("concat", "second-part-first", "order", "copy_row(tail, t, right, t, item);", "copy_row(tail, t, left, t, item);", source="copies.cpp"),
    Defect("take_rows", "rows-of-minus-one-left", "-1", "std::memset(out + m * to.row_stride, 0, to.row_stride);", ";", source="copies.cpp"),
    Defect("kv_write", "slot-minus-one-written", "-1", "slot >= 0) copy_row(cache, slot, from, t, item);", "slot >= -1) copy_row(cache, slot < 0 ? 0 : slot, from, t, item);", source="copies.cpp"),
    Defect("page_copy", "sources-read-after-they-were-written", "order", "if (place != 0) continue;", "continue;", source="copies.cpp"),
    Defect("page_copy", "last-slot-of-a-page-lost", "blocks", "parallel_for(from.columns * block_size, rows", "parallel_for(from.columns * block_size - 1, rows", source="copies.cpp"),
    Defect("select_rows", "lengths-in-order", "order", "lengths.at<std::int32_t>(0, chosen.at<std::int32_t>(0, m));", "lengths.at<std::int32_t>(0, m % lengths.columns);", source="copies.cpp"),
    Defect("concat", "strides-of-the-first-row", "strides", "from.data + j * from.row_stride, from.column_stride,", "from.data + j * from.row_stride, item,", source="copies.cpp",
           dtypes=("float32",), why="such a layout is planned in float32: dtypes take turns"),
    Defect("moe_route", "native-bias-in-the-weights", "formula", "sum += space.s[ids[j]];", "sum += space.biased[ids[j]];", source="routing.cpp"),
    Defect("moe_route", "groups-by-their-best-alone", "groups", "size > 1 ? first + second : first;", "first;", source="routing.cpp"),
    Defect("moe_route", "last-of-equal-experts", "ties", "const std::int64_t at = loops.greatest(from.data(), (n + 15) / 16 * 16);", "std::int64_t at = loops.greatest(from.data(), (n + 15) / 16 * 16);\n        for (std::int64_t i = at; i < n; ++i) at = from[i] == from[at] ? i : at;", source="routing.cpp"),
    Defect("moe_route", "nan-is-the-best", "special", "(0xff800000u & nan)", "(0x7f800000u & nan)", source="routing.cpp"),
    Defect("moe_permute", "tail-not-cleared", "-1", "std::memset(static_cast<void*>(to), 0, n * sizeof(T));", ";", source="routing.cpp"),
    Defect("moe_permute", "first-expert-forgotten", "attribute", "(place / chosen.columns, place % chosen.columns) - first_expert;", "(place / chosen.columns, place % chosen.columns);", source="routing.cpp"),
    Defect("moe_unpermute", "padding-weighed", "-1", "of_choice[j] = m < 0 ? nullptr : rows", "of_choice[j] = m < 0 ? rows.dense_row<T>(0, copies[j]) : rows", source="routing.cpp"),
    Defect("moe_unpermute", "native-sum-in-bfloat16", "accumulator", "sums[v] += weights[j] * load(rows[j] + i + v * kLanes);", "sums[v] = (F)((U)(sums[v] + weights[j] * load(rows[j] + i + v * kLanes)) & 0xffff0000u);", source="mix.cpp"),
    Defect("argmax", "last-block-wins", "ties", "n - i < kBlock ? n - i : kBlock); top > best) {", "n - i < kBlock ? n - i : kBlock); top >= best) {", source="logits.cpp"),
    Defect("check_finite", "infinity-is-finite", "special", "bad |= ~(v < kInfinity);", "bad |= (v != v);", source="logits.cpp"),
    Defect("check_finite", "masked-rows-are-bad", "special", "return !any(bad) && greatest", "return !any(bad | (top == -kInfinity)) && greatest", source="logits.cpp"),
    Defect("log_softmax", "sum-not-rescaled", "blocks", "found.norm *= exp_down(F{} + (found.top - top))[0];", "", source="logits.cpp"),
    Defect("gather_logprob", "first-logit-of-all", "order", "loops.minus(row + chosen.at<std::int32_t>(0, t), 1,", "loops.minus(row, 1,", source="logits.cpp"),
    Defect("sample", "temperature-forgotten", "attribute", "scale = {top, 1.0f / temperature,", "scale = {top, 1.0f,", source="sample.hpp"),
    Defect("sample", "top-p-of-all-instead-of-top-k", "formula", "      sorted_ = true;\n", "      sorted_ = true;\n      mass = 1e30;\n", source="sample.hpp"),
    Defect("sample", "last-of-equal-candidates", "ties", "std::memcpy(&bits, &value, 4);", "std::memcpy(&bits, &value, 4);\n  index = ~index;", source="sample.hpp"),
    Defect("sample", "top-p-one-short", "off by one", "last = cut.at;\n      mass = cut.mass;", "mass = static_cast<double>(top_p) * mass;", source="sample.hpp"),
    Defect("sample", "masked-tokens-drawn", "special", "inline F without_nan(F v) { return v > -kInfinity ? v : F{} - kInfinity; }", "inline F without_nan(F v) { return v > -kInfinity ? v : F{}; }", source="sample.cpp"),
    Defect("speculative_verify", "rest-is-all-of-p", "formula", "        p[whole - begin] = 0;\n", "", source="sample.hpp"),
    Defect("speculative_verify", "draft-accepted-at-equality", "boundary", "(q ? q[d] : 1.0f) < p) {", "(q ? q[d] : 1.0f) <= p) {", source="sample.cpp"),
    Defect("speculative_verify", "random-number-of-the-first-row", "order", "drawn.draw_rest(settings.u.at<float>(r, n), q, whole)", "drawn.draw_rest(settings.u.at<float>(r, 0), q, whole)", source="sample.cpp"),
    Defect("speculative_verify", "native-draft-probabilities-ignored", "operand", "left -= some == kLanes ? load(q + i) : load_some(q + i, some);", "", source="sample.cpp"),
    Defect("mla_prolog", "rope-where-the-nope-is", "layout", "rope(part(by_head, nope, nope + width)", "rope(part(by_head, 0, width)", source="composites.cpp"),
    Defect("mla_prolog", "keys-cached-unrotated", "cache", "kv_write(kp_field, slots, kp);", "kv_write(kp_field, slots, part(a, latent, latent + width));", source="composites.cpp"),
    Defect("index_prolog", "eps-of-its-own", "eps", "layer_norm(raw, k_norm, k_bias, normed, eps);", "layer_norm(raw, k_norm, k_bias, normed, 1e-6);", source="composites.cpp"),
    Defect("mtp_input", "hidden-state-first", "order", "concat(first, second, both);", "concat(second, first, both);", source="composites.cpp"),
]
