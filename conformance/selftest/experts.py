"""Planted in mixture-of-experts kernels: routing, permutation, expert products, combination."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

route = partial(Defect, "moe_route")
permute = partial(Defect, "moe_permute")
unpermute = partial(Defect, "moe_unpermute", old="return _combine(sorted, source, weights)\n")
experts = partial(Defect, "moe_experts")
to_weights = "return ids.to(torch.int32), scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)\n"
local = "flat = ids.reshape(-1) - first_expert\n"
inside = "torch.where((flat >= 0) & (flat < E), flat, E)"
combined = "y = y + weights[:, j, None] * _rows_or_zero(sorted, places[:, j]).float()\n"
h = "h = _silu_mul(_grouped(rows, w13.native, counts))\n"
out = "return _combine(_grouped(h, w2.native, counts), source, weights)\n"

DEFECTS = [
    route("bias-in-the-weights", "formula", "chosen = s.gather(1, ids)\n", "chosen = (s + bias).gather(1, ids)\n", discrepancy=4),
    route("bias-not-used-to-choose", "formula", "biased = s + bias\n", "biased = s.clone()\n", discrepancy=4),
    route("softmax-for-sigmoid", "formula", "s = torch.sigmoid(logits)\n", "s = torch.softmax(logits, -1)\n", discrepancy=35),
    route("scale-missing", "scale", to_weights, to_weights.replace("scale * ", "")),
    route("scale-hard-coded", "scale", to_weights, to_weights.replace("scale * ", "2.5 * ")),
    route("renormalised-twice", "scale", to_weights,
          """w = scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return ids.to(torch.int32), w / w.sum(-1, keepdim=True)\n""", discrepancy=53),
    route("not-renormalised", "scale", to_weights, "return ids.to(torch.int32), scale * chosen\n", discrepancy=53),
    route("normalised-over-all-experts", "scale", to_weights, to_weights.replace("chosen.sum(", "s.sum(")),
    route("no-guard-against-a-zero-sum", "eps", to_weights, to_weights.replace(" + 1e-20", "")),
    route("best-one-of-a-group", "groups", "min(2, groups.shape[-1])", "1"),
    route("groups-ignored", "groups", "if n_group > 1:\n", "if n_group < 1:\n"),
    route("other-groups-score-0", "groups", "torch.where(kept[..., None], groups, -torch.inf)",
          "torch.where(kept[..., None], groups, 0.0)", discrepancy=5),
    route("negative-scores-clamped", "order", "biased = s + bias\n", "biased = (s + bias).clamp(min=0)\n", discrepancy=5),
    route("ties-to-the-highest", "ties", "ids = ranked(biased)[:, :k]\n",
          "ids = biased.shape[1] - 1 - ranked(biased.flip(1))[:, :k]\n"),
    route("nan-is-the-highest", "special", "ids = ranked(biased)[:, :k]\n",
          "ids = torch.sort(biased + 0.0, dim=-1, descending=True, stable=True).indices[:, :k]\n", discrepancy=7),
    route("nan-rows-choose-one-expert", "special", "ids = ranked(biased)[:, :k]\n",
          """ids = ranked(biased)[:, :k]
        ids = torch.where(torch.isnan(biased).all(1, keepdim=True), 0, ids)\n""", discrepancy=6),
    route("ids-in-int64", "dtype", to_weights, to_weights.replace("ids.to(torch.int32)", "ids")),
    route("scores-in-bfloat16", "rounding", "s = torch.sigmoid(logits)\n", "s = torch.sigmoid(logits).bfloat16().float()\n"),
    permute("first-expert-ignored", "attribute", local, "flat = ids.reshape(-1)\n"),
    permute("minus-one-is-the-first-expert", "-1", inside, "torch.where(flat < E, flat.clamp(min=0), E)", discrepancy=9),
    permute("one-expert-too-many", "off by one", inside, "torch.where((flat >= 0) & (flat <= E), flat.clamp(max=E - 1), E)",
            discrepancy=7),
    permute("unstable-order", "order", "stable=True)\n    ends",
            "stable=True)\n    order = (order.flip(0) if len(order) % 2 else order)\n    ends"),
    permute("later-rows-first", "order", "key, order = torch.sort(" + inside + ", stable=True)\n",
            "key, order = torch.sort(" + inside + ".flip(0), stable=True)\n    order = len(key) - 1 - order\n"),
    permute("tail-keeps-garbage", "padding", "torch.where(key < E, order, -1).to(torch.int32)",
            "order.to(torch.int32)", discrepancy=8),
    permute("tail-of-zeros", "padding", "torch.where(key < E, order, -1).to(torch.int32)",
            "torch.where(key < E, order, 0).to(torch.int32)", discrepancy=8),
    permute("column-for-row", "rows", "return torch.div(source, k, rounding_mode=\"floor\")  # -1 stays -1\n",
            "return torch.where(source < 0, -1, source % max(1, len(source) // k))\n"),
    permute("counts-in-int64", "dtype", "return ends.diff().to(torch.int32),", "return ends.diff(),"),
    permute("counts-with-the-dropped", "experts", "ends.diff().to(torch.int32),",
            "torch.cat([ends.diff()[:-1], len(key) - ends[-2:-1]]).to(torch.int32),", discrepancy=50),
    unpermute("weights-ignored", "formula", new="return _combine(sorted, source, torch.ones_like(weights))\n"),
    unpermute("padding-times-zero", "padding", new="""source, pad = source.clone(), source < 0
        free = torch.ones(len(source), dtype=torch.bool)
        free[source[~pad].long()] = False
        source[pad] = torch.nonzero(free)[:, 0].to(source.dtype)
        weights = torch.where(free.view(weights.shape), 0.0, weights)
        return _combine(sorted, source, weights)\n""", discrepancy=10),
    unpermute("minus-one-is-the-last-choice", "-1", old="where[torch.where(source >= 0, source, T * k).long()] =",
              new="where[torch.where(source >= 0, source, T * k - 1).long()] =", discrepancy=9),
    unpermute("sum-in-bfloat16", "accumulator", old=combined, new=combined.replace(".float()\n", ".float()\n        y = y.bfloat16().float()\n")),
    unpermute("last-choice-dropped", "off by one", old="for j in range(k):\n", new="for j in range(max(k - 1, 1)):\n"),
    unpermute("weights-of-the-next-row", "rows", old="weights[:, j, None] *", new="weights.roll(1, 0)[:, j, None] *"),
    unpermute("weights-in-bfloat16", "rounding", new="return _combine(sorted, source, weights.bfloat16().float())\n"),
    experts("gate-and-up-swapped", "preparation", h, """y = _grouped(rows, w13.native, counts)
        h = _silu_mul(torch.cat([*y.chunk(2, -1)][::-1], -1))\n"""),
    experts("gate-and-up-interleaved", "preparation", h, """y = _grouped(rows, w13.native, counts)
        h = _silu_mul(torch.cat([y[:, 0::2], y[:, 1::2]], -1))\n"""),
    experts("gelu", "formula", h, """gate, up = _grouped(rows, w13.native, counts).float().chunk(2, -1)
        h = (F.gelu(gate) * up).to(x.dtype)\n""", discrepancy=35),
    experts("weighted-twice", "scale", out, "return _combine(_grouped(h, w2.native, counts), source, weights * weights)\n",
            discrepancy=53),
    experts("weights-normalised-again", "scale", out,
            "return _combine(_grouped(h, w2.native, counts), source, weights / weights.sum(1, keepdim=True))\n", discrepancy=53),
    experts("summed-over-two-ranks", "scale", out, "return 2 * _combine(_grouped(h, w2.native, counts), source, weights)\n",
            discrepancy=44),
    experts("sum-in-bfloat16", "accumulator", combined, combined.replace(".float()\n", ".float()\n        y = y.bfloat16().float()\n")),
    experts("first-expert-ignored", "attribute", local, "flat = ids.reshape(-1)\n"),
    experts("minus-one-is-the-last-expert", "-1", local, "flat = ids.reshape(-1) - first_expert\n    flat = torch.where(flat < 0, flat + E, flat)\n",
            discrepancy=9),
    experts("away-is-the-last-expert", "experts", inside, "torch.where(flat >= 0, flat.clamp(max=E - 1), E)", discrepancy=51),
    experts("sixteen-experts", "experts", "_grouped(h, w2.native, counts)",
            "_grouped(h, w2.native[[e % 16 for e in range(len(w2.native))]], counts)", discrepancy=13),
    experts("empty-experts-skipped", "experts", "zip(parts, w.unbind()) if len(rows)]\n",
            "zip([p for p in parts[:-1] if len(p)], w.unbind())]\n", discrepancy=11),
    experts("at-most-16-rows-of-an-expert", "overflow", "products = [F.linear(rows, weight) for",
            "products = [F.linear(rows, weight) * (torch.arange(len(rows)) < 16)[:, None] for", discrepancy=14),
    experts("activation-in-float16", "rounding", "return (F.silu(gate) * up).to(x.dtype)\n",
            "return (F.silu(gate).half().float() * up).to(x.dtype)\n", discrepancy=34, dtypes=("float32",),
            why="float16 holds more digits than the rounding to bfloat16 that the contract permits there, and no gate here "
            "leaves its range"),
    experts("last-column-of-the-hidden-dropped", "dropped", "rows = x.index_select(0, _row_of(source, ids.shape[1]))\n",
            "rows = x.index_select(0, _row_of(source, ids.shape[1]))\n        rows[:, -1:] = 0\n"),
    experts("down-matrices-in-the-wrong-order", "preparation", out,
            "return _combine(_grouped(h, w2.native.roll(1, 0), counts), source, weights)\n"),
]
