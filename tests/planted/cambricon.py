"""Mistakes in the adapter of Cambricon."""

from tests.planted_adapters import Mistake

MISTAKES = (
    Mistake("add_rms_norm", "the residual left out", "(x, residual, weight", "(x, torch.zeros_like(x), weight"),
    Mistake("layer_norm", "no bias", "weight, bias, None", "weight, torch.zeros_like(bias), None"),
    Mistake("silu_mul", "another activation", 'TMO.active(x, "silu"', 'TMO.active(x, "gelu"'),
    Mistake("rope", "cosine before sine", "angle.sin(), angle.cos()", "angle.cos(), angle.sin()"),
    Mistake("rope", "pairs for halves", "None, pairs, True", "None, not pairs, True"),
    Mistake("rope", "one row of the table for all", "place, None, pairs, True", "torch.zeros_like(place), None, pairs, True"),
    Mistake("rope", "turned in place", "to(torch.float32, copy=True)", "to(torch.float32)", dtype="float32"),
    Mistake("moe_route", "divided by the op", "k, False, -1, 0", "k, True, -1, 0", dtype=""),
    Mistake("moe_route", "the scale left out", "scale * s /", "s /", dtype=""),
    Mistake("moe_route", "no bias", "score_bias=bias", "score_bias=None", dtype=""),
    Mistake(
        "grouped_gemm", "sums for counts", "_product(x, w, counts)\n", "_product(x, w, counts.cumsum(0, dtype=torch.int32))\n"
    ),
    Mistake("grouped_gemm", "weights the other way", "x.contiguous(), w.native,", "x.contiguous(), w.native.transpose(1, 2),"),
    Mistake("moe_unpermute", "weights left out", "rows, weights, combine", "rows, torch.ones_like(weights), combine"),
    Mistake("moe_unpermute", "the order of rows for their places", "combine[:-1], None", "source, None"),
    Mistake("moe_unpermute", "rows that stand for none left as they are", "torch.where(filled[:, None], sorted, 0)", "sorted"),
    Mistake("moe_experts", "ids of other ranks kept", "local = ids - first_expert", "local = ids + 0"),
    Mistake("moe_experts", "no expert behind the last", "(local < E), local, E)", "(local < E), local, E - 1)"),
    Mistake("moe_experts", "the other weight twice", "_product(h, w2, counts", "_product(h, w13, counts"),
    Mistake("moe_experts", "rows for places", "weights, combine, None, ends", "weights, expand, None, ends"),
    Mistake("kv_write", "all slots, in the order of rows", "native.int32_slots", "native.int32_slots.sort().values"),
    Mistake("kv_write", "padded rows written to slot 0", "native.int32_slots", "native.int32_slots.clamp(min=0)"),
    Mistake("kv_write", "the fields swapped", "torch.cat([first, second]", "torch.cat([second, first]"),
    Mistake("indexer_topk", "all keys of a request", "_lens=plan.visible", "_lens=plan.kv_len[plan.row_request]"),
    Mistake("indexer_topk", "another table for slots", "kv_cache_block_table=plan", "kv_cache_block_table=1 + plan"),
    Mistake("indexer_topk", "no weights", "weights=F.pad(w,", "weights=F.pad(torch.ones_like(w),"),
    Mistake("indexer_topk", "pages for their places", "(place.gather(1, found) *", "(slots // native.size *", "slots"),
    Mistake("sparse_mla", "all of the table", "into, slots, length,", "into, slots, torch.full_like(length, slots.shape[1]),"),
    Mistake("sparse_mla", "the scale left out", "-1, -1, scale, False", "-1, -1, 1.0, False"),
    Mistake(
        "sparse_mla", "rows without keys left as they are", "length[:, None, None] > 0, out", "length[:, None, None] >= -1, out"
    ),
    Mistake("sparse_mla", "positions for slots", "page * size + position % size, -1)", "position, -1)", "slots"),
)
