"""Planted in the C++ kernels of the cpu backend: rms_norm, moe_experts and the threads below them."""

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
    norm("bits-cut-off", "rounding", "rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "rounded = u >> 16", dtypes=("bfloat16",),
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
    experts("sums-shared-by-threads", "threads", "alignas(64) float sums[kRowBlock * kMostColumns];", "alignas(64) static float sums[kRowBlock * kMostColumns];",
            discrepancy=42),
    products("strided-rows-in-place", "strides", "const bool dense = step == sizeof(T);", "const bool dense = true;", discrepancy=27),
    products("padding-of-the-input-stale", "stale", "for (i = n; i < depth; ++i) to[i] = Row<T>{};", "", dtypes=("bfloat16",), why=PAIRS),
    products("second-half-where-whole", "vector tail", "used > kHalf ? 2 : 1", "used == kPanel ? 2 : 1"),
    products("tail-written-whole", "outside", "store_some(y + i, load(sums + i), used - i);", "store(y + i, load(sums + i));"),
    products("five-rows-as-four", "blocks", "height == 5 ? tile<T, 5, 4>", "height == 5 ? tile<T, 4, 4>"),
    products("first-blocks-lost", "blocks", "begin ? load(out + m * kPanel + j * kLanes) : F{};", "F{};"),
    products("rows-between-blocks-lost", "blocks", shares, shares.replace("end = rows * (part + 1) / parts", "end = begin + rows / parts"), source="linear.cpp"),
    Defect("head_linear", "first-matrix-for-all", "heads", "append(works, n, n * tokens,", "append(works, 0, n * tokens,", source="linear.cpp"),
    Defect("head_linear", "head-of-the-neighbour", "heads", "i / tokens * x.strides[1]", "(i / tokens + 1) % heads * x.strides[1]", source="linear.cpp"),
    Defect("grouped_gemm", "experts-without-rows-not-counted", "-1", "append(works, e, first, count,", "append(works, works.size(), first, count,", source="linear.cpp"),
    Defect("grouped_gemm", "rows-of-the-first-expert-again", "offset", "    first += count;\n", "    first += e ? count : 0;\n", source="linear.cpp"),
    Defect("mla_prolog", "rope-where-the-nope-is", "layout", "rope(part(by_head, nope, nope + width)", "rope(part(by_head, 0, width)", source="composites.cpp"),
    Defect("mla_prolog", "keys-cached-unrotated", "cache", "kv_write(kp_field, slots, kp);", "kv_write(kp_field, slots, part(a, latent, latent + width));", source="composites.cpp"),
    Defect("index_prolog", "eps-of-its-own", "eps", "layer_norm(raw, k_norm, k_bias, normed, eps);", "layer_norm(raw, k_norm, k_bias, normed, 1e-6);", source="composites.cpp"),
    Defect("mtp_input", "hidden-state-first", "order", "concat(first, second, both);", "concat(second, first, both);", source="composites.cpp"),
]
