"""Planted in sparse attention: the indexer, its top-k, and attention over what it chose."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

scores = partial(Defect, "indexer_scores")
top = partial(Defect, "topk", source="ranking")
chosen = partial(Defect, "indexer_topk")
mla = partial(Defect, "sparse_mla")
products = "products = torch.relu(query @ key.T).unflatten(0, iq.shape[:2])\n"
per_key = "return scale * torch.bmm(weight, products)[:, 0]\n"
hidden = "hidden = torch.arange(seen, device=iq.device) >= batch.native.visible[rows, None]\n"
blocks = "blocks, size = _blocks(keys, name), keys.spec.block_size\n"
slots = "slots = (pages * size + at % size).clamp_(min=0).flatten()\n"
pages = "pages = plan.block_table[plan.row_request[rows]].gather(1, at // size).long()\n"
by_rope = "logits = torch.bmm(q_rope[rows].float(), rope_keys.transpose(1, 2))\n"
by_latent = "logits = torch.baddbmm(logits, q_latent[rows].float(), keys.transpose(1, 2), beta=scale, alpha=scale)\n"
beyond = "beyond = (torch.arange(k, device=count.device) >= count.clamp(min=1))[:, None]\n"
sums = "o = torch.bmm(torch.softmax(logits.masked_fill(beyond, -torch.inf), dim=-1), keys)\n"
masked = "return torch.where(count[..., None] > 0, o, 0.0).to(q_latent.dtype)\n"
edge = "edge = torch.topk(values, k, dim=1, sorted=False).values.amin(1, keepdim=True)\n"
plain = "return torch.where(torch.isnan(x), -torch.inf, x + 0.0)\n"
picked = "chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))\n"
ended = "return torch.where(position[:k] < length[:, None], found, -1), length\n"

DEFECTS = [
    scores("relu-missing", "formula", products, products.replace("torch.relu(query @ key.T)", "(query @ key.T)")),
    scores("relu-after-the-weights", "order", products + "        " + per_key,
           "products = (query @ key.T).unflatten(0, iq.shape[:2])\n        return scale * torch.relu(torch.bmm(weight, products)[:, 0])\n"),
    scores("scale-missing", "scale", per_key, per_key.replace("scale * ", "")),
    scores("scale-hard-coded", "scale", per_key, per_key.replace("scale * ", "(32**-0.5 * 128**-0.5) * "), discrepancy=36),
    scores("weights-made-positive", "formula", "w.float()[:, None]", "w.float().abs()[:, None]", discrepancy=5),
    scores("weights-in-bfloat16", "rounding", "w.float()[:, None]", "w.bfloat16().float()[:, None]"),
    scores("products-in-bfloat16", "rounding", products, products.replace("query @ key.T", "query @ key.T).bfloat16().float(")
           .replace("torch.relu(query @ key.T).bfloat16().float()", "torch.relu((query @ key.T).bfloat16().float())")),
    scores("mask-off-by-one", "off by one", hidden, hidden.replace(">=", ">")),
    scores("own-position-hidden", "off by one", hidden, hidden.replace("[rows, None]", "[rows, None] - 1")),
    scores("mask-of-the-last-row", "off by one", hidden, hidden.replace("visible[rows, None]", "visible[rows].amax()")),
    scores("hidden-is-zero", "special", "per_key.masked_fill(hidden, -torch.inf)", "per_key.masked_fill(hidden, 0.0)", discrepancy=24),
    scores("tail-is-zero", "unwritten", "(0, batch.max_kv - seen), value=-torch.inf)", "(0, batch.max_kv - seen))"),
    scores("pages-of-64", "block size", "blocks, size = _blocks(keys, name), keys.spec.block_size\n",
           "blocks, size = keys[name].unflatten(0, (-1, 64)), 64\n"),
    scores("pages-in-order", "pages", "key = blocks.index_select(0, pages).flatten(0, 1).float()\n",
           "key = blocks[: len(pages)].flatten(0, 1).float()\n"),
    scores("table-of-the-first-request", "pages",
           "per_key = _indexer_scores(iq[rows], w[rows], keys, batch.native.block_table[request], seen, scale)\n            hidden",
           "per_key = _indexer_scores(iq[rows], w[rows], keys, batch.native.block_table[0].clamp(min=0), seen, scale)\n"
           "            per_key = F.pad(per_key, (0, seen - per_key.shape[1]))\n            hidden"),
    scores("last-head-dropped", "heads", per_key, "return scale * torch.bmm(weight[..., :-1], products[:, :-1])[:, 0]\n", discrepancy=18),
    scores("heads-reversed", "heads", per_key, "return scale * torch.bmm(weight.flip(-1), products)[:, 0]\n", discrepancy=18),
    scores("padded-rows-see-all", "padding", hidden, hidden + "            hidden &= batch.native.visible[rows, None] > 1\n", discrepancy=39),
    top("ties-to-the-highest", "ties", picked, "chosen = above | (level & (level.flip(1).cumsum(1, dtype=torch.int32).flip(1) <= room))\n"),
    top("too-many-ties", "ties", "chosen = above | (level & (level.cumsum(1, dtype=torch.int32) <= room))\n    ".replace("\n    ", "\n"),
        "chosen = above | level\n", discrepancy=1),
    top("nan-is-the-highest", "special", plain, "return x + 0.0\n"),
    top("negative-zero-is-lower", "ties", "values = comparable(scores).masked_fill_(hidden, -torch.inf)\n",
        """bits = torch.where(torch.isnan(scores), -torch.inf, scores).contiguous().view(torch.int32)
        values = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).double().masked_fill_(hidden, -torch.inf)\n"""),
    top("negative-bits-unflipped", "order", "values = comparable(scores).masked_fill_(hidden, -torch.inf)\n",
        """values = comparable(scores).contiguous().view(torch.int32).double().masked_fill_(hidden, -torch.inf)\n""", discrepancy=5),
    top("mask-off-by-one", "off by one", "hidden = position >= visible[:, None]\n", "hidden = position > visible[:, None]\n"),
    top("mask-missing", "padding", "hidden = position >= visible[:, None]\n", "hidden = torch.zeros_like(scores, dtype=torch.bool)\n"),
    top("length-unclamped", "off by one", "length = visible.clamp(max=k)\n", "length = visible.clone()\n"),
    top("tail-of-zeros", "padding", ended, ended.replace("found, -1)", "found, 0)"), discrepancy=8),
    top("tail-unwritten", "unwritten", ended, "return found.contiguous(), length\n", discrepancy=8),
    top("one-too-few", "off by one", "length = visible.clamp(max=k)\n", "length = visible.clamp(max=k - 1)\n"),
    top("keys-in-bfloat16", "rounding", "values = comparable(scores).masked_fill_", "values = comparable(scores.bfloat16()).masked_fill_"),
    top("columns-in-int8", "overflow", "scatter_(1, place, position.expand(rows, n))", "scatter_(1, place, position.expand(rows, n) % 256)",
        discrepancy=20),
    chosen("relu-missing", "formula", products, products.replace("torch.relu(query @ key.T)", "(query @ key.T)")),
    chosen("weights-made-positive", "formula", "w.float()[:, None]", "w.float().abs()[:, None]", discrepancy=5),
    chosen("scale-missing", "scale", per_key, per_key.replace("scale * ", ""),
           equivalent="scale is positive and the same for every key of a row, so the order of the scores is the same without it"),
    chosen("scores-in-bfloat16", "rounding", per_key, "return (scale * torch.bmm(weight, products)[:, 0]).bfloat16().float()\n"),
    chosen("pages-of-64", "block size", blocks, "blocks, size = keys[name].unflatten(0, (-1, 64)), 64\n"),
    chosen("pages-in-order", "pages", "key = blocks.index_select(0, pages).flatten(0, 1).float()\n",
           "key = blocks[: len(pages)].flatten(0, 1).float()\n"),
    chosen("all-keys-taken-when-one-more-than-k", "off by one", "if seen > k:\n", "if seen > k + 1:\n"),
    chosen("visibility-of-the-chunk's-last-row", "off by one", "highest(scores, batch.native.visible[rows], k)",
           "highest(scores, batch.native.visible[rows].amax().expand(len(scores)).contiguous(), k)"),
    chosen("first-2048-keys", "dropped", "return torch.cat(parts, dim=1)[:, :seen]",
           "return F.pad(torch.cat(parts, dim=1)[:, :2048], (0, max(0, seen - 2048)), value=-torch.inf)[:, :seen]"),
    chosen("last-head-dropped", "heads", per_key, "return scale * torch.bmm(weight[..., :-1], products[:, :-1])[:, 0]\n", discrepancy=18),
    mla("scale-missing", "scale", by_latent, by_latent.replace("beta=scale, alpha=scale", "beta=1.0, alpha=1.0")),
    mla("scale-hard-coded", "scale", by_latent, by_latent.replace("beta=scale, alpha=scale", "beta=0.0625, alpha=0.0625"), discrepancy=36),
    mla("rope-part-unscaled", "scale", by_latent, by_latent.replace("beta=scale", "beta=1.0")),
    mla("rope-part-missing", "formula", by_latent, by_latent.replace("beta=scale", "beta=0.0")),
    mla("lengths-ignored", "padding", beyond, "beyond = torch.zeros_like(at, dtype=torch.bool)[:, None]\n", discrepancy=38),
    mla("last-key-dropped", "off by one", beyond, beyond.replace("count.clamp(min=1)", "(count - 1).clamp(min=1)")),
    mla("empty-rows-are-nan", "special", beyond, beyond.replace("count.clamp(min=1)", "count"), discrepancy=24,
        equivalent="a row without keys is set to 0 afterwards, whatever the softmax made of it"),
    mla("empty-rows-attend", "special", masked, "return o.to(q_latent.dtype)\n", discrepancy=24),
    mla("pages-of-64", "block size", slots, "slots = (pages * 64 + at % 64).clamp_(min=0).flatten()\n"),
    mla("page-of-the-slot", "pages", pages, "pages = at // size\n"),
    mla("table-of-the-first-request", "pages", pages, pages.replace("plan.row_request[rows]", "torch.zeros_like(plan.row_request[rows])")),
    mla("rows-as-requests", "rows", pages,
        pages.replace("plan.row_request[rows]", "torch.arange(rows.start, rows.stop) % len(plan.block_table)")),
    mla("heads-of-the-next-row", "heads", by_rope, by_rope.replace("q_rope[rows]", "q_rope[rows].roll(1, 1)"), discrepancy=18),
    mla("scores-in-bfloat16", "rounding", sums, sums.replace("logits.masked_fill", "logits.bfloat16().float().masked_fill")),
    mla("scores-in-float16", "overflow", sums, sums.replace("logits.masked_fill", "logits.half().float().masked_fill"), discrepancy=26),
    mla("no-maximum-taken", "overflow", sums, """p = torch.exp(logits.masked_fill(beyond, -torch.inf))
            o = torch.bmm(p / p.sum(-1, keepdim=True), keys)\n""", discrepancy=25),
    mla("normalised-over-all-k", "formula", sums, """p = torch.softmax(logits, dim=-1).masked_fill(beyond, 0.0)
            o = torch.bmm(p, keys)\n"""),
    mla("sum-in-bfloat16", "accumulator", sums, """p = torch.softmax(logits.masked_fill(beyond, -torch.inf), dim=-1)
            o = 0
            for a, b in zip(p.split(16, 2), keys.split(16, 1)):
                o = (o + torch.bmm(a, b)).bfloat16().float()\n"""),
    mla("positions-in-int8", "overflow", "at = at.clamp(min=0).long()\n", "at = (at.clamp(min=0) % 256).long()\n", discrepancy=22),
]
