"""Planted in the C++ kernels of the cpu backend where they read and make codes."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

TABLE, SHIFTS = "pairs of bfloat16 are read by a table", "float32 is read by shifts"
products = partial(Defect, "linear", source="coded.cpp")
packing = partial(Defect, "linear", source="packed.cpp")
codes = partial(Defect, source="codes.hpp")
streams = partial(Defect, "linear", source="coded.cpp", dtypes=("bfloat16",), why="float32 is read in blocks")
fours = partial(Defect, source="codes.hpp")
rows = partial(Defect, source="coded_rows.cpp")
experts = partial(Defect, "moe_experts")
keys = partial(Defect, source="indexer.cpp")
nibble = "(I)(w << (28 - code_shift(C, i))) >> 28"
scale_row = "&scales.at<char>(row / form().high, g), size"
key_scale = "scaled * load(keys.scales + k)"
query_scale = "if (one) of_heads[h] *= scale;"

DEFECTS = [
    packing("codes-not-raised-by-128", "format", "to.word(k) = word ^ more;", "to.word(k) = word;"),
    packing("last-codes-of-a-row-lost", "vector tail", "code && i < std::min(form().unit, columns - k)", "code && columns - k >= form().unit && i < form().unit"),
    packing("scales-of-whole-blocks-alone", "ragged", scale_row, "&scales.at<char>(std::min(row / form().high, std::max<std::int64_t>(rows / form().high - 1, 0)), g), size"),
    packing("scales-of-the-first-group", "scale", scale_row, "&scales.at<char>(row / form().high, 0), size"),
    experts("up-codes-are-those-of-gate", "preparation", "row < all ? up * all + row : -1", "row < all ? row : -1", source="packed.cpp"),
    products("what-128-add-is-left", "offset", "(I)(load_raw<U>(to) - static_cast<std::uint32_t>(more))", "(I)load_raw<U>(to)"),
    products("columns-of-the-first-group", "scale", "panel.scales(last, which, room)", "panel.scales(last - which * kGroup, 0, room)"),
    products("scales-of-the-first-row", "scale", "b.add(sums[m][j], b.scale_of(a[m]), load(b.columns + j * kLanes), to);", "b.add(sums[m][j], b.scale_of(a[0]), load(b.columns + j * kLanes), to);"),
    products("activations-not-rounded", "activations", "v = coded<Code>(v, scale);", "v = v / scale;"),
    products("sums-of-older-blocks-lost", "blocks", "(first ? F{} : load(to)) + sums", "sums"),
    Defect("grouped_gemm", "row-scales-in-bfloat16", "scale", "if (scale) std::memcpy(&found, row + scale, sizeof found);", "if (scale) std::memcpy(reinterpret_cast<char*>(&found) + 2, row + scale + 2, 2);", source="coded.cpp"),
    codes("linear", "e4m3-with-the-other-bias", "format", "_mm512_set1_epi16(0x3c00)", "_mm512_set1_epi16(0x3b80)"),
    codes("linear", "subnormal-codes-are-zero", "format", "_mm512_mask_mov_epi16((__m512i)said[i], small, low)", "_mm512_maskz_mov_epi16(~small, (__m512i)said[i])"),
    codes("linear", "nibbles-from-the-other-end", "format", "_mm512_srli_epi16((__m512i)w, 4 * i)", "_mm512_srli_epi16((__m512i)w, 12 - 4 * i)", dtypes=("bfloat16",), why=SHIFTS),
    codes("linear", "nibbles-without-their-sign", "format", nibble, f"(I)({nibble[3:]})", dtypes=("float32",), why=TABLE),
    codes("head_linear", "codes-cut-off", "rounding", "(at_least(F{} - 128.0f, at_most(F{} + 127.0f, x)) + kShift) - kShift", "number(__builtin_convertvector(at_most(F{} + 127.0f, x) + 0.0f * kShift, I))"),
    codes("quantize", "largest-code-is-240", "scale", "kTop = 448.0f;", "kTop = 240.0f;"),
    codes("quantize", "negative-numbers-not-counted", "scale", "const U size = (U)magnitude(some<X>(x, step, i, end));", "const U size = (U)at_least(F{}, some<X>(x, step, i, end));"),
    rows("kv_write", "one-scale-for-a-row", "scale", "*scales = scale_of<T, Code>(x, step, begin, end);", "*scales = scale_of<T, Code>(x, step, 0, n);"),
    rows("kv_write", "scales-of-the-first-slot", "paging", "const_cast<float*>(scales.row<float>(slot))", "const_cast<float*>(scales.row<float>(0))"),
    rows("dequantize", "codes-unscaled", "scale", "Code::number_of(wide(bytes)) * *scales;", "Code::number_of(wide(bytes));"),
    streams("streams-scaled-by-the-first-group", "scale", "panel.scales(end, g, j * kLanes)", "panel.scales(end - g * Code::kGroup, 0, j * kLanes)"),
    streams("streams-of-the-first-row", "rows", "a[m] + at * Pairs::kItem + 4 * i", "a[m / 2 * 2] + at * Pairs::kItem + 4 * i"),
    streams("rows-of-the-part-before", "blocks", "(a + begin, panel, depth, sums + begin * kPanel)", "(a + begin / 4 * 4, panel, depth, sums + begin * kPanel)"),
    fours("linear", "six-is-eight", "format", "0x40c0, 0x4080, 0x4040", "0x4100, 0x4080, 0x4040", dtypes=("bfloat16",), why=TABLE),
    fours("moe_experts", "one-and-a-half-below-zero-is-one", "format", "(short)0xbfc0, (short)0xbf80, (short)0xbf00", "(short)0xbf80, (short)0xbf80, (short)0xbf00", dtypes=("bfloat16",), why=TABLE),
    fours("linear", "a-half-is-zero", "format", "number((I)size) * 0.5f", "number((I)size) * 0.0f", dtypes=("float32",), why=SHIFTS),
    fours("head_linear", "fours-without-their-sign", "format", "((code & 8u) << 28)", "0u", dtypes=("float32",), why=SHIFTS),
    fours("grouped_gemm", "powers-of-four", "scale", "(__m128i)byte) << 23;", "(__m128i)byte) << 24;"),
    fours("grouped_gemm", "scales-of-e4m3-with-the-other-bias", "scale", "* 256.0f;", "* 128.0f;"),
    products("scale-of-the-whole-left", "scale", "kForm.of_column ? scale * load(columns_ + column) : scale", "scale"),
    experts("whole-of-the-first-columns", "scale", "scale * load(columns_ + column)", "scale * load(columns_)", source="coded.cpp"),
    experts("whole-of-the-first-row", "scale", "whole->at<float>(row)", "whole->at<float>(0)", source="packed.cpp"),
    Defect("sparse_mla", "latents-of-the-first-slot's-scale", "paging", "scales.row<float>(slot), dims.c", "scales.row<float>(0), dims.c", source="sparse_mla.hpp"),
    keys("indexer_scores", "queries-scales-forgotten", "scale", query_scale, ""),
    keys("indexer_scores", "first-key's-scale-for-all", "scale", key_scale, "scaled * keys.scales[0]"),
    keys("indexer_topk", "scales-of-the-next-block", "blocks", key_scale, key_scale.replace("keys.", "following.")),
    keys("indexer_scores", "one-scale-for-a-query-of-e4m3", "scale", "one ? d.width : Code::kGroup;", "d.width;"),
    keys("indexer_scores", "numbers-of-a-query-unscaled", "scale", "one ? v : v * scale", "v"),
    keys("indexer_topk", "keys-of-e4m3-read-as-int8", "format", "keys == Kind::i8 ? of_type.int8 : of_type.e4m3", "of_type.int8", source="indexer.hpp"),
    keys("indexer_scores", "scale-of-a-page's-first-key", "paging", "*scales_.row<float>(slot + i)", "*scales_.row<float>(slot)", source="indexer.hpp"),
    experts("hidden-row-of-the-pick-before", "rows", "reinterpret_cast<char*>(values + i * inner)", "reinterpret_cast<char*>(values + i / 2 * inner)", source="moe_experts.cpp"),
    experts("codes-of-another-token", "rows", "tokens[token - begin]", "tokens[(token - begin) / 2]", source="moe_experts.cpp"),
]
