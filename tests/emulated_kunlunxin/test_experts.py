"""Kunlunxin's router, rows sorted by expert, products by expert and their sum."""

import math

import pytest
import torch

from tests.emulated_kunlunxin.given import BF16, I8, I32, close, codes, ints, refused


def router(tokens, experts, topk, groups, kept, **changed):
    return {"x": torch.randn(tokens, experts), "norm_score": torch.empty(tokens, topk),
            "topk_index": torch.empty(tokens, topk, dtype=I32), "block_static": torch.zeros(12, experts, dtype=I32),
            "bias": torch.randn(experts), "n_group": groups, "topk_group": kept, "scale": 2.5, **changed}


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2)])
def test_router(kunlun_ops, groups, kept):
    given = router(9, 16, 3, groups, kept)
    kunlun_ops.moe_sigmoid_group_topk_norm(**given)
    score = given["x"].double().sigmoid()
    ranked = score + given["bias"].double()
    if groups > 1:
        best = ranked.view(9, groups, -1).topk(2).values.sum(-1).topk(kept).indices
        mask = torch.zeros(9, groups, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(16 // groups, 1)
        ranked = ranked.masked_fill(~mask, -math.inf)
    want = ranked.topk(3).indices
    chosen = given["topk_index"].long()
    assert torch.equal(chosen.sort(1).values, want.sort(1).values)
    weights = score.gather(1, chosen)
    close(given["norm_score"], weights / weights.sum(1, keepdim=True) * 2.5, 1e-5)
    assert given["block_static"].long().abs().sum(0).gt(9).all()  # nothing to rely on


def test_router_ties_and_refusals(kunlun_ops):
    given = router(2, 8, 3, 1, 1, x=torch.zeros(2, 8), bias=torch.zeros(8))
    kunlun_ops.moe_sigmoid_group_topk_norm(**given)
    assert given["topk_index"].sort(1).values.tolist() == [[5, 6, 7]] * 2
    for sentence, changed in (("x.dtype", {"x": torch.zeros(2, 8, dtype=BF16)}),
                              ("bias.dtype", {"bias": torch.zeros(8).half()}),
                              ("topk_index.dtype", {"topk_index": torch.zeros(2, 3, dtype=torch.int64)}),
                              ("block_static.shape", {"block_static": torch.zeros(8, 8, dtype=I32)}),
                              ("n_group", {"n_group": 3}), ("topk_group", {"topk_group": 2})):
        refused(sentence, kunlun_ops.moe_sigmoid_group_topk_norm, **router(2, 8, 3, 1, 1, **changed))
    with pytest.raises(TypeError):
        kunlun_ops.moe_sigmoid_group_topk_norm(**router(2, 8, 3, 1, 1), stable=True)


def prepared(kunlun_ops, xspeedgate_ops, x, ids, experts, negative=False):
    """Place of each pair, ends of the experts, rows by expert."""
    if ids.numel() <= 768:
        return xspeedgate_ops.moe_pre_small(ids, experts, index_have_neg=negative, sort_mode=True, x=x)
    statistic = torch.full((12, experts), 99, dtype=I32)
    kunlun_ops.gen_block_statistic(ids, statistic)
    counts = torch.bincount(ids[ids >= 0], minlength=experts)
    assert torch.equal(statistic.sum(0), counts)
    expand = torch.empty(ids.numel(), x.shape[1], dtype=x.dtype)
    index, m = torch.empty(ids.numel(), dtype=I32), torch.empty(experts, dtype=I32)
    lod = torch.empty(experts + 1, dtype=I32)
    kunlun_ops.moe_pre_sorted(x=x, topk_index=ids, block_statistic=statistic, moe_expand=expand, moe_index=index, expert_m=m,
                              sorted_tokens_num_lod=lod, index_have_neg=negative)
    assert torch.equal(m.long(), counts)
    return index, lod, expand


@pytest.mark.parametrize("tokens", [6, 400])
@pytest.mark.parametrize("kind", ["bf16", "int8", "some of no expert"])
def test_experts(kunlun_ops, xspeedgate_ops, tokens, kind):
    experts, topk, deep, wide = 5, 2, 16, 12
    x, w1, w2 = torch.randn(tokens, deep), torch.randn(experts, 2 * wide, deep), torch.randn(experts, deep, wide)
    x, w1, w2 = x.to(BF16), w1.to(BF16), w2.to(BF16)
    ids = torch.stack([torch.randperm(experts)[:topk] for _ in range(tokens)]).int()
    share = torch.rand(tokens, topk)
    if kind == "some of no expert":
        ids[::3, 0] = ids[1::5, 1] = -1
    index, lod, rows = prepared(kunlun_ops, xspeedgate_ops, x, ids, experts, kind == "some of no expert")
    named = ids.flatten() >= 0
    assert lod.tolist() == [0, *torch.bincount(ids[ids >= 0], minlength=experts).cumsum(0).tolist()]
    assert torch.equal(rows[index.long()].view(tokens, topk, deep)[ids >= 0], x[:, None].expand(-1, topk, -1)[ids >= 0])
    assert rows[index.long()][~named].isnan().all()

    def product(rows, weight, y):
        given = {"sorted_tokens_num_lod": lod, "sorted_tokens_idx": index, "moe_topk": topk, "y": y}
        if kind == "int8":
            q, top = torch.empty(rows.shape, dtype=I8), torch.empty(len(rows), 1)
            kunlun_ops.quant2d(rows.contiguous(), q, top, force_sdnn=True)
            w, w_top = torch.empty(weight.shape, dtype=I8), torch.empty(*weight.shape[:2], 1)
            kunlun_ops.quant2d(weight, w, w_top)
            kunlun_ops.moe_fc(x=q, x_perchannel_max=top, weight=w, w_perchannel_max=w_top, topk_ids=ids, act=None, **given)
        else:
            kunlun_ops.moe_fc(x=rows, weight=weight, **given)
        return y

    y = product(rows, w1, torch.zeros(tokens, topk, 2 * wide, dtype=BF16))
    inner = torch.empty(tokens, topk, wide, dtype=BF16)
    kunlun_ops.swiglu(x=y, y=inner)
    untouched = product(inner.view(-1, wide), w2, torch.full((tokens, topk, deep), 7.0, dtype=BF16))
    assert (untouched.view(-1, deep)[lod[-1] :] == 7).all()
    z = product(inner.view(-1, wide), w2, torch.zeros(tokens, topk, deep, dtype=BF16))
    out = torch.empty(tokens, deep, dtype=BF16)
    kunlun_ops.moe_post(z, index.view(tokens, topk), share, torch.ones(tokens, topk), out)
    hidden = torch.einsum("td,ekd->tek", x.double(), w1.double())
    hidden = torch.nn.functional.silu(hidden[..., :wide]) * hidden[..., wide:]
    each = torch.einsum("tek,edk->ted", hidden, w2.double())
    picked = each[torch.arange(tokens)[:, None], ids.clamp(min=0).long()] * ((ids >= 0) * share.double())[..., None]
    want = picked.sum(1)
    close(out, want, 2**-5, (0.05 if kind == "int8" else 0.015) * float(want.abs().max()))


def test_experts_refuse(kunlun_ops, xspeedgate_ops):
    x, ids = torch.randn(4, 16).to(BF16), ints([0, 1], [2, 1], [0, 2], [1, 0])
    index, lod, rows = xspeedgate_ops.moe_pre_small(ids, 3, False, True, x)
    for sentence, changed in (("topk_ids is -1", {"topk_ids": ids - 1}), ("topk_ids is 0 to 2", {"expert_num": 2}),
                              ("sort_mode", {"sort_mode": False}), ("topk_ids.dtype", {"topk_ids": ids.long()}),
                              ("up to 768", {"topk_ids": torch.zeros(400, 2, dtype=I32)})):
        refused(sentence, xspeedgate_ops.moe_pre_small,
                **{"topk_ids": ids, "expert_num": 3, "index_have_neg": False, "sort_mode": True, "x": x, **changed})
    fc = {"x": rows, "weight": torch.randn(3, 8, 16).to(BF16), "sorted_tokens_num_lod": lod, "sorted_tokens_idx": index,
          "moe_topk": 2, "y": torch.empty(4, 2, 8, dtype=BF16)}
    for sentence, changed in (("SWISH_GLU", {"act": "SWISH_GLU"}),
                              ("sorted_tokens_idx.shape", {"sorted_tokens_idx": index.view(4, 2)}),
                              ("y.shape", {"moe_topk": 1}), ("weight.dtype", {"weight": torch.zeros(3, 8, 16, dtype=I8)}),
                              ("bias", {"bias": torch.zeros(3, 8)}), ("sort_mode", {"sort_mode": False}),
                              ("x_perchannel_max", {"x": codes(8, 16), "weight": codes(3, 8, 16)})):
        refused(sentence, kunlun_ops.moe_fc, **{**fc, **changed})
    post = {"x": torch.zeros(4, 2, 16, dtype=BF16), "moe_index": index.view(4, 2), "normed_scale": torch.ones(4, 2),
            "dequant_scale": torch.ones(4, 2), "y": torch.empty(4, 16, dtype=BF16)}
    kunlun_ops.moe_post(**post)
    refused("moe_index", kunlun_ops.moe_post, **{**post, "moe_index": index.view(4, 2) - 1})
    refused("normed_scale.dtype", kunlun_ops.moe_post, **{**post, "normed_scale": torch.ones(4, 2, dtype=BF16)})
    many = torch.zeros(400, 2, dtype=I32)
    sort = {"x": torch.zeros(400, 16, dtype=BF16), "topk_index": many, "block_statistic": torch.zeros(12, 3, dtype=I32),
            "moe_expand": torch.zeros(800, 16, dtype=BF16), "moe_index": torch.zeros(800, dtype=I32),
            "expert_m": torch.zeros(3, dtype=I32), "sorted_tokens_num_lod": torch.zeros(4, dtype=I32)}
    refused("block_statistic is of other ids", kunlun_ops.moe_pre_sorted, **sort)
    refused("more than 768", kunlun_ops.moe_pre_sorted, **{**sort, "topk_index": ids, "x": x})
