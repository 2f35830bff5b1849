"""Planted in the C++ kernels of the cpu backend: sparse attention, the indexer and the choice of the greatest scores."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

mla = partial(Defect, "sparse_mla", source="sparse_mla.cpp")
dots = partial(Defect, "sparse_mla", source="attention.hpp")
where = partial(Defect, "sparse_mla", source="requests.hpp")
scores = partial(Defect, "indexer_scores", source="indexer.cpp")
rows = partial(Defect, "indexer_scores", source="indexer.hpp")
fused = partial(Defect, "indexer_topk", source="indexer_topk.cpp")
top = partial(Defect, "topk", source="selection.cpp")
best = partial(Defect, "topk", source="selection.hpp")
key = "const U u = (((U)v & ~nan) | (0xff800000u & nan)) & ~zero;\n"
ties = "equal &= ~(1u << (31 - __builtin_clz(equal)));"

DEFECTS = [
    mla("sum-of-older-blocks-not-rescaled", "online softmax", "load(joint_sum) * x + load(sum) * y", "load(joint_sum) + load(sum) * y"),
    mla("values-of-older-blocks-not-rescaled", "online softmax", "return old * before + now * added;", "return before + now * added;"),
    mla("rope-part-forgotten", "dropped", "    dots<M, Keys, V>(kp + k, panel + words * V * kLanes, d.r / M::kPer, sums, Fetch<Keys>{next_kp + k, bytes});\n", ""),
    mla("rows-that-select-nothing-not-written", "empty", "      std::fill_n(to, dims.heads * dims.c, T{});\n", "      (void)to;\n", source="sparse_mla.hpp"),
    mla("request-of-the-first-row", "requests", "const std::int64_t request = requests.of_row(t);", "const std::int64_t request = requests.of_row(0);", source="sparse_mla.hpp"),
    mla("not-divided-by-the-sum", "softmax", "1.0f / state.sum[n]", "1.0f"),
    dots("last-key-of-a-tile-lost", "tiles", "for (int m = 0; m < Keys; ++m) {\n        Word x;", "for (int m = 0; m < Keys - 1; ++m) {\n        Word x;"),
    dots("first-vector-of-heads-for-all", "heads", "sums[m][j] = M::add(sums[m][j], x, q[j]);", "sums[m][j] = M::add(sums[m][j], x, q[0]);"),
    where("first-slot-of-a-page", "paging", "position - page * size_", "0 * page"),
    where("last-row-of-the-request-before", "requests", "(first_row(middle) <= t ? low : high) = middle;", "(first_row(middle) < t ? low : high) = middle;"),
    scores("negative-products-kept", "relu", "at_least(F{}, sums[m][j]) *", "sums[m][j] *"),
    scores("scale-forgotten", "attribute", "load(sums + k) * d.scale", "load(sums + k)"),
    scores("padded-heads-may-be-nan", "special", "(F)((U)product & last)", "product",
           equivalent="keys and queries are finite, and so is what heads that are not there add: zero times zero"),
    rows("hidden-positions-are-zero", "mask", "-std::numeric_limits<float>::infinity()", "0.0f"),
    rows("first-rows-see-as-much-as-the-last", "mask", "sees[i] = std::min(visible(group.first + i), end) - at;", "sees[i] = std::min(visible(group.first + group.rows - 1), end) - at;"),
    rows("queries-of-the-group-before", "stale", "if (fresh) pack(group, wide, packed);", "if (fresh && group.first % 2 == 0) pack(group, wide, packed);"),
    fused("hidden-positions-chosen", "mask", "std::min(scorer.visible(group.first + i), stop) - at", "stop - at"),
    fused("positions-of-the-chunk", "chunks", "candidates[i].add(scores + i * kIndexerChunk, sees, at);", "candidates[i].add(scores + i * kIndexerChunk, sees, 0);"),
    fused("scores-of-the-first-row", "rows", "candidates[i].add(scores + i * kIndexerChunk,", "candidates[i].add(scores + 0 * kIndexerChunk,"),
    top("negative-zero-below-zero", "ties", key, key.replace(" & ~zero", "")),
    top("nan-is-infinite", "special", key, key.replace("0xff800000u", "0x7f800000u")),
    top("lanes-behind-the-row", "vector tail", "reaches(v, least)) & first_lanes(n - i)", "reaches(v, least)) & first_lanes(kLanes)"),
    top("last-of-equal-keys", "ties", ties, "equal &= equal - 1;"),
    best("highest-of-the-last-bin", "radix", "low = some[k - 1];", "low = some[0];"),
]
