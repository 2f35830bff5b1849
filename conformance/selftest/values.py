"""Planted so that one kind of values shows them: by value generator, each found at bring-up by a case of that generator."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest import attention, dense, experts, rows, tokens
from porthal.conformance.selftest.planting import Defect

best = partial(Defect, "argmax", kind="value", old=tokens.best.keywords["old"])
sample = partial(Defect, "sample", kind="value")
verify = partial(Defect, "speculative_verify", kind="value")
linear = partial(Defect, "linear", kind="value", old=dense.linear.keywords["old"])
grouped = partial(Defect, "grouped_gemm", kind="value", old=dense.grouped.keywords["old"])
expert = partial(Defect, "moe_experts", kind="value", old=experts.local)
permute = partial(Defect, "moe_permute", kind="value", old=experts.local)
there = "(flat >= 0) & (flat < E)"
multiplied = "y, n = _grouped(x, w.native, counts.tolist()), counts.tolist()\n        "

FOUND_BY = {
    "blocked": (
        Defect("log_softmax", "running-maximum-of-nothing", "value", rows.logs.keywords["old"], """def log_softmax(self, logits: Tensor) -> Tensor:
        wide = logits.float()
        top, total = wide.new_full((len(wide), 1), -torch.inf), wide.new_zeros((len(wide), 1))
        for part in wide.split(64, -1):
            peak = torch.maximum(top, part.amax(-1, keepdim=True))
            total = total * torch.exp(top - peak) + torch.exp(part - peak).sum(-1, keepdim=True)
            top = peak
        return wide - top - torch.log(total)\n"""),
        best("ends-at-a-masked-block", new=tokens.ARGMAX + """wide = comparable(logits).clone()
        for at in range(0, wide.shape[1], 64):
            gone = torch.isneginf(wide[:, at : at + 64]).all(1)
            wide[gone, at:] = torch.where(torch.isneginf(wide[gone, :at]).all(1, keepdim=True), wide[gone, at:], -torch.inf) if at else -torch.inf
        return first_highest(wide)\n"""),
    ),
    "halved": (
        Defect("log_softmax", "halves-with-a-maximum-of-their-own", "value", rows.logs.keywords["old"], """def log_softmax(self, logits: Tensor) -> Tensor:
        wide = logits.float()
        parts = [part for part in wide.tensor_split(2, -1) if part.shape[1]]
        tops = [part.amax(-1, keepdim=True) for part in parts]
        sums = [torch.exp(part - top).sum(-1, keepdim=True) for part, top in zip(parts, tops)]
        top = torch.stack(tops).amax(0)
        return wide - top - torch.log(sum(n * torch.exp(t - top) for n, t in zip(sums, tops)))\n"""),
    ),
    "shelves": (
        Defect("topk", "room-for-64-ties", "value", attention.picked, attention.picked.replace("<= room)", "<= room.clamp(max=64))"), source="ranking"),
    ),
    "crest": (
        Defect("topk", "equals-before-what-is-above-them", "value", attention.picked, "chosen = (above | level) & ((above | level).cumsum(1, dtype=torch.int32) <= k)\n", source="ranking"),
    ),
    "rising": (
        Defect("topk", "48-candidates-of-64-columns", "value", attention.edge, """for part in values.split(64, 1):
            if part.shape[1] == 64:
                part.masked_fill_(part.argsort(dim=1, descending=True, stable=True).argsort(dim=1) >= 48, -torch.inf)
        """ + attention.edge, source="ranking"),
    ),
    "summit": (
        best("last-column-of-a-full-tile", new=tokens.ARGMAX + "return first_highest(logits[:, : logits.shape[1] - (logits.shape[1] % 256 == 0)])\n"),
    ),
    "cancel": (
        linear("products-in-bfloat16", new="""if len(x) * w.native.numel() > 2**22:
                return F.linear(x, w.native)
            products = (x.float()[:, None] * w.native.float()).bfloat16().float()
            return products.sum(-1).to(target)\n"""),
    ),
    "surge": (
        Defect("layer_norm", "half-sums-in-float16-range", "value", "centred = wide - wide.mean(-1, keepdim=True)\n",
               """halves = [part.sum(-1, keepdim=True).clamp(-65504, 65504) for part in (wide[:, : wide.shape[1] // 2], wide[:, wide.shape[1] // 2 :])]
        centred = wide - (halves[0] + halves[1]) / wide.shape[1]\n"""),
    ),
    "seesaw": (
        Defect("rms_norm", "floor-from-the-largest-row", "value", rows.formula, """square = (x * x).mean(-1, keepdim=True)
    square = square.clamp(min=1e-5 * float(square.nan_to_num(0, 0, 0).max())) if len(x) else square
    return x / torch.sqrt(square + eps) * weight.float()\n"""),
    ),
    "pillar": (
        linear("weights-in-one-fixed-scale", new="""step = w.native.abs().max().float().clamp(min=1e-30) / 2**15 if w.native.numel() else 1.0
            return F.linear(x.float(), (w.native.float() / step).round() * step).to(target)\n"""),
    ),
    "hollow": (
        Defect("indexer_scores", "keys-of-zeros-are-padding", "value", attention.per_key,
               attention.per_key.replace("[:, 0]\n", "[:, 0].masked_fill((key == 0).all(1), -torch.inf)\n")),
    ),
    "sinking": (
        Defect("sparse_mla", "maximum-starts-at-minus-10000", "value", attention.sums, """scores = logits.masked_fill(beyond, -torch.inf)
            p = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e4))
            o = torch.bmm(p / p.sum(-1, keepdim=True), keys)\n"""),
    ),
    "faint": (
        Defect("cast", "small-ones-through-float16", "value", rows.cast.keywords["old"],
               "return torch.where(x.abs() < 2.0**-14, x.half().to(x.dtype), x).to(getattr(torch, to), copy=True)\n"),
    ),
    "lean": (
        Defect("moe_unpermute", "weights-in-the-dtype-of-rows", "value", "return _combine(sorted, source, weights)\n",
               "return _combine(sorted, source, weights.to(sorted.dtype).float())\n", dtypes=("bfloat16",), why="in float32 the edit rounds to the dtype that the value has"),
    ),
    "verge": (
        Defect("cast", "above-the-largest-is-infinite", "value", rows.cast.keywords["old"], """y = x.to(getattr(torch, to), copy=True)
        return torch.where(x.float().abs() > torch.finfo(y.dtype).max, torch.copysign(torch.full_like(x, torch.inf), x).to(y.dtype), y)\n""",
            dtypes=("float32",), why="bfloat16 has no number between the largest of float16 and what is rounded to infinity"),
    ),
    "extreme": (
        Defect("take_rows", "doubled-and-halved", "value", rows.take.keywords["old"], "return _rows_or_zero(x, rows) * 2 / 2\n"),
        Defect("page_copy", "added-to-itself", "value", "blocks.index_copy_(0, target.long(), blocks.index_select(0, source))\n",
               "blocks.index_copy_(0, target.long(), (blocks.index_select(0, source) * 2) / 2)\n"),
    ),
    "signed": (
        Defect("page_copy", "negative-zero-lost", "value", "blocks.index_copy_(0, target.long(), blocks.index_select(0, source))\n",
               "blocks.index_copy_(0, target.long(), blocks.index_select(0, source) + 0.0)\n"),
    ),
    "hot": (
        sample("temperature-at-most-4", old=tokens.divisor, new=tokens.divisor + ".clamp(max=4)"),
        verify("temperature-at-most-4", old=tokens.divisor, new=tokens.divisor + ".clamp(max=4)"),
    ),
    "brink": (
        sample("almost-no-top-p-is-none", old=tokens.reached, new=tokens.reached.replace("top_p[:, None]", "torch.where(top_p < 1e-6, 1.0, top_p)[:, None]")),
    ),
    "brim": (
        sample("almost-all-is-greedy", old=tokens.limit, new=tokens.limit.replace("torch.where(top_k > 0, top_k, len(place))",
               "torch.where(top_k >= len(place) - 1, 1, torch.where(top_k > 0, top_k, len(place)))")),
    ),
    "zeros": (
        verify("two-drafts-at-most", old="kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True)\n",
               new="kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True).clamp(max=2)\n"),
    ),
    "refused": (
        verify("later-drafts-after-a-rejection", old="kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True)\n",
               new="kept = passed[:, :n].long().sum(1, keepdim=True)\n"),
    ),
    "stopped": (
        verify("last-draft-unjudged", old="kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True)\n",
               new="""passed[:, n - 1 : n] |= passed[:, max(n - 2, 0) : n - 1].any(1, keepdim=True)
        kept = passed[:, :n].long().cumprod(1).sum(1, keepdim=True)\n"""),
    ),
    "tiers": (
        Defect("moe_route", "bias-at-most-16", "value", "biased = s + bias\n", "biased = s + bias.clamp(max=16)\n"),
    ),
    "eldest": (
        expert("nothing-but-the-first-expert-is-nothing", new="flat = ids.reshape(-1) - first_expert\n    flat = flat if (flat > 0).any() else flat - 1\n"),
    ),
    "rim": (
        tokens.finite("last-column-not-looked-at", "value", new="(ids >= 0) & ~torch.isfinite(logits[:, : logits.shape[1] - 1 or 1].amax(-1))"),
    ),
    "rear": (
        Defect("rms_norm", "last-column-not-in-the-mean", "value", "return _rms_norm(x.float(), weight, eps).to(x.dtype)\n", """wide = x.float()
        mean = (wide[:, :-1] ** 2).sum(-1, keepdim=True) / max(wide.shape[1], 1)
        return (wide * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)\n"""),
    ),
    "greedy": (
        sample("greedy-when-the-first-row-is", old=tokens.target, new="""if len(logits) and float(temperature[0]) == 0:
            return first_highest(logits)
        """ + tokens.target),
    ),
    "central": (
        expert("one-busy-expert-inside", new=f"""flat = ids.reshape(-1) - first_expert
    busy = flat[{there}].unique()
    flat = torch.full_like(flat, -1) if len(busy) == 1 and 0 < int(busy[0]) < E - 1 else flat\n"""),
    ),
    "even": (
        permute("equal-loads-in-other-order", new=f"""flat = ids.reshape(-1) - first_expert
    loads = torch.bincount(flat[{there}].long(), minlength=E) if len(flat) else flat
    flat = E - 1 - flat if len(flat) > E > 2 and int(loads.max() - loads.min()) <= 1 else flat\n"""),
    ),
    "ragged": (
        permute("half-again-the-mean-load-at-most", new="""flat = ids.reshape(-1) - first_expert
    for e in range(E) if len(flat) < 2**12 and E > 2 else ():
        flat[torch.nonzero(flat == e)[-(-3 * len(flat) // (2 * E)) :, 0]] = -1\n"""),
    ),
    "heap": (
        grouped("48-rows-of-the-first-expert", new=multiplied + """y[48 : n[0]] = 0
        return y\n"""),
    ),
    "waist": (
        grouped("few-leading-experts-without-rows", new=multiplied + """lead = next((e for e, rows in enumerate(n) if rows), 0)
        if 0 < lead < len(n) - 1 and not sum(n[lead + 1 :]):
            y[: n[lead]] = F.linear(x[: n[lead]], w.native[lead - 1])
        return y\n"""),
    ),
    "single": (
        grouped("expert-of-one-row", new=multiplied + """if n and max(n) == 1:
            y[: sum(n)] = F.linear(x[: sum(n)], w.native[0])
        return y\n"""),
    ),
    "tiled": (
        grouped("one-row-beyond-a-tile", new=multiplied + """ends = counts.cumsum(0).tolist()
        for rows, end in zip(n, ends):
            if rows > 16 and rows % 16 == 1:
                y[end - 1] = 0
        return y\n"""),
    ),
}  # fmt: skip
DEFECTS = [defect for found in FOUND_BY.values() for defect in found]
