"""Mistakes in the adapter of Kunlunxin."""

from tests.planted_adapters import Mistake

MISTAKES = (
    Mistake("rms_norm", "another epsilon", "weight.contiguous(), y, eps)", "weight.contiguous(), y, 1e-6)"),
    Mistake("add_rms_norm", "the sum not kept", "residual_output=r, weight", "residual_output=torch.empty_like(r), weight"),
    Mistake("silu_mul", "the second half activated", "x=x.contiguous(), y=y", "x=x.roll(x.shape[1] // 2, 1), y=y"),
    Mistake("rope", "sine before cosine", "[angle.cos(), angle.sin()]", "[angle.sin(), angle.cos()]"),
    Mistake("rope", "pairs for halves", 'layout == "half"', 'layout != "half"'),
    Mistake("rope", "turned in place", "to(torch.float32, copy=True)", "to(torch.float32)", dtype="float32"),
    Mistake("moe_route", "the op's weights", "scale * s / (s.sum(-1, keepdim=True) + 1e-20)", "weights", dtype=""),
    Mistake("moe_experts", "ids of other ranks kept", "local = ids - first_expert", "local = ids + 0"),
    Mistake("moe_experts", "places of other ranks counted", "torch.where(counted[:, None], y, 0)", "y"),
    Mistake("moe_experts", "the other weight twice", "self.silu_mul(h), w2", "self.silu_mul(h), w13"),
    Mistake("moe_experts", "no weights", "weights.contiguous()", "kept.float()"),
    Mistake("kv_write", "the parts swapped", "k_pe=second.contiguous()", "k_pe=second.flip(-1).contiguous()"),
    Mistake("kv_write", "slots in order", "slot_mapping=plan.targets", "slot_mapping=plan.targets.sort().values"),
    Mistake("topk", "as many as there are", "length[:, None]\n        return", "length[:, None] - 1\n        return", dtype=""),
    Mistake("topk", "NaN left to the op", "score=_ordered(scores)", "score=scores.contiguous()", dtype=""),
    Mistake("sparse_mla", "positions for slots", "indices=slots[:, None]", "indices=rows.indices[:, None]"),
    Mistake(
        "sparse_mla", "the whole of a row", "kv_lod_xpu=rows.length", "kv_lod_xpu=torch.full_like(rows.length, sel.spec.k)",
    ),
    Mistake("sparse_mla", "the scale left out", "softmax_scale=scale", "softmax_scale=1.0"),
    Mistake(
        "sparse_mla", "rows without keys left as they are", "rows.length[:, None, None] > 0", "rows.length[:, None, None] >= 0",
    ),
)
