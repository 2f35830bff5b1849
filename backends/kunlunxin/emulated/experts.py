"""kunlun_ops and xspeedgate_ops: the router, sorting rows by expert, products by expert, and their sum."""

import math
from itertools import pairwise

import torch

from porthal.backends.kunlunxin.emulated.vectors import FLOATS, HALVES, scaled
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    highest,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
)

PARTS = 12  # rows of block_statistic
SMALL = 768  # pairs that moe_pre_small takes; moe_pre_sorted takes more


def moe_sigmoid_group_topk_norm(*, x, norm_score, topk_index, block_static, bias, n_group, topk_group, scale):
    """The topk of sigmoid(x) + bias in the best groups; weights without bias, divided by their sum, times scale.

    A group's worth is the sum of its best two. What block_static holds afterwards is not published.
    """
    op = "moe_sigmoid_group_topk_norm"
    for name, tensor in (("x", x), ("norm_score", norm_score), ("bias", bias)):
        need_dtype(op, name, tensor, torch.float32)
    need_dtype(op, "topk_index", topk_index, torch.int32)
    need_dtype(op, "block_static", block_static, torch.int32)
    need_dense(op, x=x, norm_score=norm_score, topk_index=topk_index, bias=bias, block_static=block_static)
    need_rank(op, "x", x, 2)
    rows, experts = x.shape
    topk = topk_index.shape[-1]
    need_shape(op, "topk_index", topk_index, [rows, topk])
    need_shape(op, "norm_score", norm_score, [rows, topk])
    need_shape(op, "block_static", block_static, [PARTS, experts])
    need_shape(op, "bias", bias, [experts])
    need(n_group > 0 and experts % n_group == 0, op, "n_group", n_group, f"a divisor of {experts}")
    size = experts // n_group
    need(0 < topk_group <= n_group and topk <= topk_group * size, op, "topk_group", topk_group,
         f"1 to {n_group}, with {topk} experts in the groups kept")
    scores = x.sigmoid()
    ranked = scores + bias
    if n_group > 1:
        worth = ranked.view(rows, n_group, size).topk(min(2, size)).values.sum(-1)
        kept = torch.zeros(rows, n_group, dtype=torch.bool).scatter_(1, highest(worth, topk_group), True)
        ranked = ranked.masked_fill(~kept.repeat_interleave(size, 1), -math.inf)
    chosen = highest(ranked, topk)
    weights = scores.gather(1, chosen)
    topk_index.copy_(chosen)
    norm_score.copy_(weights / weights.sum(1, keepdim=True) * scale)
    block_static.copy_(garbage(block_static.shape, torch.int32))


def _statistic(ids, experts):
    """How often each expert is named in each of 12 parts of the pairs; ids below 0 count nowhere."""
    pairs = ids.flatten().long()
    part = torch.arange(len(pairs)) * PARTS // max(len(pairs), 1)
    named = pairs >= 0
    counted = torch.zeros(PARTS, experts, dtype=torch.int32)
    return counted.index_put_((part[named], pairs[named]), torch.tensor(1, dtype=torch.int32), accumulate=True)


def _ids(op, name, ids, experts, least):
    need_dtype(op, name, ids, torch.int32)
    need_rank(op, name, ids, 2)
    need_dense(op, **{name: ids})
    need(bool(((ids >= least) & (ids < experts)).all()), op, name, f"{int(ids.min())} to {int(ids.max())}",
         f"{least} to {experts - 1}")


def gen_block_statistic(topk_ids, block_statistic):
    """What moe_pre_sorted wants of these ids, [12, experts] int32; over its rows it sums to the count of each expert."""
    op = "gen_block_statistic"
    need_dtype(op, "block_statistic", block_statistic, torch.int32)
    need_rank(op, "block_statistic", block_statistic, 2)
    need_dense(op, block_statistic=block_statistic)
    experts = block_statistic.shape[1]
    need_shape(op, "block_statistic", block_statistic, [PARTS, experts])
    _ids(op, "topk_ids", topk_ids, experts, -1)
    block_statistic.copy_(_statistic(topk_ids, experts))


def _sorted(ids, experts, x):
    """Pairs by expert, in no order within one: place of each pair, ends of the experts, rows of x in that order.

    Pairs of no expert come last, and their rows are garbage.
    """
    pairs = ids.flatten().long()
    order = torch.where(pairs < 0, experts, pairs).flip(0).argsort(stable=True)
    order = len(pairs) - 1 - order
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    counts = torch.bincount(pairs[pairs >= 0], minlength=experts)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    expanded = x[order // ids.shape[1]].clone()
    expanded[int(ends[-1]) :] = math.nan
    return place.int(), ends.int(), expanded, counts.int()


def moe_pre_sorted(x, topk_index, block_statistic, moe_expand, moe_index, expert_m, sorted_tokens_num_lod,
                   index_have_neg=False):
    """Rows of x once for each pair, by expert: moe_expand [pairs, width], moe_index [pairs] the place of each pair."""
    op = "moe_pre_sorted"
    need_dtype(op, "x", x, *HALVES)
    need_rank(op, "x", x, 2)
    experts = len(expert_m)
    _ids(op, "topk_index", topk_index, experts, -1 if index_have_neg else 0)
    pairs = topk_index.numel()
    need(pairs > SMALL, op, "topk_index.numel()", pairs, f"more than {SMALL}, or moe_pre_small")
    need_dtype(op, "moe_expand", moe_expand, x.dtype)
    need_shape(op, "moe_expand", moe_expand, [pairs, x.shape[1]])
    made = {"moe_index": (moe_index, [pairs]), "expert_m": (expert_m, [experts]),
            "sorted_tokens_num_lod": (sorted_tokens_num_lod, [experts + 1]),
            "block_statistic": (block_statistic, [PARTS, experts])}
    for name, (tensor, shape) in made.items():
        need_dtype(op, name, tensor, torch.int32)
        need_shape(op, name, tensor, shape)
        need_dense(op, **{name: tensor})
    need_dense(op, x=x, moe_expand=moe_expand)
    need(len(x) == len(topk_index), op, "topk_index.shape[0]", len(topk_index), str(len(x)))
    need(torch.equal(block_statistic, _statistic(topk_index, experts)), op, "block_statistic", "of other ids",
         "what gen_block_statistic makes of topk_index")
    for tensor, value in zip((moe_index, sorted_tokens_num_lod, moe_expand, expert_m), _sorted(topk_index, experts, x)):
        tensor.copy_(value)


def moe_pre_small(topk_ids, expert_num, index_have_neg, sort_mode, x):
    """The same for up to 768 pairs: (place of each pair [pairs], ends of the experts [experts + 1], rows [pairs, width])."""
    op = "moe_pre_small"
    need_dtype(op, "x", x, *HALVES)
    need_rank(op, "x", x, 2)
    need_dense(op, x=x)
    _ids(op, "topk_ids", topk_ids, expert_num, -1 if index_have_neg else 0)
    need(topk_ids.numel() <= SMALL, op, "topk_ids.numel()", topk_ids.numel(), f"up to {SMALL}, or moe_pre_sorted")
    need(sort_mode, op, "sort_mode", sort_mode, "True (not in this stand-in)")
    need(len(x) == len(topk_ids), op, "topk_ids.shape[0]", len(topk_ids), str(len(x)))
    return _sorted(topk_ids, expert_num, x)[:3]


def moe_fc(*, x, weight, sorted_tokens_num_lod, sorted_tokens_idx, moe_topk, y, act=None, x_perchannel_max=None,
           w_perchannel_max=None, topk_ids=None, topk_w=None, bias=None, tgemm_type=None, tweight_type=None, scale_n=0,
           scale_k=0, use_pack_int4=False, sort_mode=True):
    """y [tokens, topk, N], seen as rows = rows of x by the weight [N, K] of their expert; rows of no expert are not written."""
    op = "moe_fc"
    need_absent(op, "SWISH_GLU is not right yet, says the caller", act=act)
    need_absent(op, "not in this stand-in", topk_w=topk_w, bias=bias, tgemm_type=tgemm_type, tweight_type=tweight_type)
    need((scale_n, scale_k, use_pack_int4, sort_mode) == (0, 0, False, True), op,
         "scale_n, scale_k, use_pack_int4, sort_mode", (scale_n, scale_k, use_pack_int4, sort_mode),
         "(0, 0, False, True): no other is in this stand-in")
    codes = x.dtype == torch.int8
    need_dtype(op, "x", x, *HALVES, torch.int8)
    need_dtype(op, "weight", weight, x.dtype)
    need_dtype(op, "y", y, *(HALVES if codes else (x.dtype,)))
    need_rank(op, "y", y, 3)
    need_rank(op, "weight", weight, 3)
    need_rank(op, "x", x, 2)
    experts, wide, deep = weight.shape
    pairs = y.shape[0] * y.shape[1]
    need_shape(op, "x", x, [pairs, deep])
    need_shape(op, "y", y, [y.shape[0], moe_topk, wide])
    need_shape(op, "sorted_tokens_idx", sorted_tokens_idx, [pairs])
    need_shape(op, "sorted_tokens_num_lod", sorted_tokens_num_lod, [experts + 1])
    need_dtype(op, "sorted_tokens_idx", sorted_tokens_idx, torch.int32)
    need_dtype(op, "sorted_tokens_num_lod", sorted_tokens_num_lod, torch.int32)
    need_dense(op, x=x, weight=weight, y=y, sorted_tokens_num_lod=sorted_tokens_num_lod, sorted_tokens_idx=sorted_tokens_idx)
    ends = sorted_tokens_num_lod.tolist()
    need(ends[0] == 0 and ends == sorted(ends) and ends[-1] <= pairs, op, "sorted_tokens_num_lod", ends,
         f"ascending numbers from 0 to {pairs} at most")
    need(torch.equal(sorted_tokens_idx.long().sort().values, torch.arange(pairs)), op, "sorted_tokens_idx", "repeated",
         f"each of 0 to {pairs - 1} once")
    if topk_ids is not None:
        need_shape(op, "topk_ids", topk_ids, y.shape[:2])
    if codes:
        need(x_perchannel_max is not None and x_perchannel_max.numel() == pairs, op, "x_perchannel_max", "missing or short",
             f"{pairs} numbers beside codes")
        need(w_perchannel_max is not None and w_perchannel_max.numel() == experts * wide, op, "w_perchannel_max",
             "missing or short", f"{experts * wide} numbers beside codes")
        x_tops, w_tops = x_perchannel_max.view(-1), w_perchannel_max.view(experts, wide)
    else:
        need_absent(op, "codes have it, floats do not", x_perchannel_max=x_perchannel_max, w_perchannel_max=w_perchannel_max)
    rows = y.view(pairs, wide)
    for expert, (start, end) in enumerate(pairwise(ends)):
        made = x[start:end].float() @ weight[expert].float().T
        rows[start:end] = (scaled(op, made, x_tops[start:end], w_tops[expert]) if codes else made).to(y.dtype)


def moe_post(x, moe_index, normed_scale, dequant_scale, y):
    """y [tokens, width] = sum over a token's pairs of normed_scale * dequant_scale * the row of x at moe_index."""
    op = "moe_post"
    need_dtype(op, "x", x, *FLOATS)
    need_rank(op, "x", x, 3)
    tokens, topk, width = x.shape
    need_dtype(op, "moe_index", moe_index, torch.int32)
    need_shape(op, "moe_index", moe_index, [tokens, topk])
    for name, tensor in (("normed_scale", normed_scale), ("dequant_scale", dequant_scale)):
        need_dtype(op, name, tensor, torch.float32)
        need_shape(op, name, tensor, [tokens, topk])
    need_dtype(op, "y", y, x.dtype)
    need_shape(op, "y", y, [tokens, width])
    need_dense(op, x=x, moe_index=moe_index, normed_scale=normed_scale, dequant_scale=dequant_scale, y=y)
    need(bool(((moe_index >= 0) & (moe_index < tokens * topk)).all()), op, "moe_index", "out of range",
         f"0 to {tokens * topk - 1}")
    rows = x.view(tokens * topk, width)[moe_index.long()].float()
    y.copy_((rows * (normed_scale * dequant_scale)[..., None]).sum(1))
