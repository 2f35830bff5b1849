"""Routing: which experts a row goes to, its copies sorted by expert, and their weighted sum."""

import torch

from porthal.backends.ascend.emulated.products import FLOATS, per_row_int8
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    need,
    need_absent,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_default_range: list[int] = []


def npu_moe_gating_top_k(x, k, *, bias=None, input_ids=None, tid2eid=None, k_group=1, group_count=1, group_select_mode=0,
                         renorm=0, norm_type=0, out_flag=False, routed_scaling_factor=1.0, eps=1e-20):
    """The k best experts by p + bias of the best groups, and p of these times the factor; p is softmax or sigmoid of x.

    Weights of the sigmoid are divided by their sum + eps. Weights are of x's dtype; p itself (float32, the third result)
    is there with out_flag only. Of equal scores the highest expert comes first; NaN is last, as in the page's NumPy code.
    Source: npu_moe_gating_top_k page.
    """
    op = "npu_moe_gating_top_k"
    need_rank(op, "x", x, 2)
    need_dtype(op, "x", x, *FLOATS)
    rows, experts = x.shape
    need(1 <= experts <= 2048, op, "x.shape[1]", experts, "1 to 2048 experts")
    if bias is not None:
        need_dtype(op, "bias", bias, x.dtype)
        need_shape(op, "bias", bias, [experts])
    need_absent(op, "documented without a formula", input_ids=input_ids, tid2eid=tid2eid)
    need_one_of(op, "group_select_mode", group_select_mode, 0, 1)
    need_one_of(op, "renorm", renorm, 0)
    need_one_of(op, "norm_type", norm_type, 0, 1)
    need(group_count > 0 and experts % group_count == 0, op, "group_count", group_count, f"a divisor of {experts}")
    size = experts // group_count
    need(size > 2 and -(-size // 32) * 32 * group_count <= 2048, op, "group_count", group_count,
         "groups of 3 experts or more, which rounded up to multiples of 32 have 2048 at most")
    need(1 <= k_group <= group_count, op, "k_group", k_group, f"1 to {group_count}")
    need(1 <= k <= size * k_group, op, "k", k, f"1 to {size * k_group}")

    wide = x.float()
    p = 1 / (1 + (-wide).exp()) if norm_type == 1 else (wide - wide.logsumexp(-1, keepdim=True)).exp()
    score = p if bias is None else p + bias.float()
    groups = score.reshape(rows, group_count, size)
    worth = groups.amax(-1) if group_select_mode == 0 else groups.topk(2, -1).values.sum(-1)
    open_ = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _best(worth, k_group), True)
    ids = _best(groups.masked_fill(~open_[..., None], -torch.inf).flatten(1), k)
    weights = p.gather(1, ids)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    shown = p if out_flag else garbage(p.shape, torch.float32)
    return (weights * routed_scaling_factor).to(x.dtype), ids.int(), shown


def _best(score, k):
    return score.shape[1] - 1 - (-score.flip(1)).argsort(dim=1, stable=True)[:, :k]


def npu_moe_init_routing_v2(x, expert_idx, *, scale=None, offset=None, active_num=-1, expert_capacity=-1, expert_num=-1,
                            drop_pad_mode=0, expert_tokens_num_type=0, expert_tokens_num_flag=False, quant_mode=-1,
                            active_expert_range=[], row_idx_type=0, x_dtype=None):  # noqa: B006
    """Copies of x's rows sorted by expert, then by position; where each copy went or came from; rows per expert; scales.

    Copies for experts outside the range are undefined, at the tail. Positions (type 0: of the copy per choice, -1 for
    none; type 1: of the choice per copy, undefined at the tail); counts (type 0 cumulated, 1 plain, 2 pairs of expert and
    count, without the flag undefined). Without active_expert_range the whole process has the range of the first such
    call: the vendor keeps it in a static variable. Source: npu_moe_init_routing_v2 page, its equivalent code for the
    order; MoeInitRoutingV2KernelNpuOpApi.cpp for the static range.
    """
    op = "npu_moe_init_routing_v2"
    need_rank(op, "x", x, 2)
    need_dtype(op, "x", x, *FLOATS, torch.int8)
    need_dtype(op, "expert_idx", expert_idx, torch.int32)
    rows, width = x.shape
    k = expert_idx.shape[-1]
    need_shape(op, "expert_idx", expert_idx, [rows, k])
    need_one_of(op, "drop_pad_mode", drop_pad_mode, 0)
    need_one_of(op, "expert_tokens_num_type", expert_tokens_num_type, 0, 1, 2)
    need_one_of(op, "row_idx_type", row_idx_type, 0, 1)
    need_one_of(op, "quant_mode", quant_mode, -1, 1)
    need_absent(op, "only the static mode of quantisation has it, which is not here", offset=offset)
    need_absent(op, "not documented", x_dtype=x_dtype)
    most = 5120 if expert_tokens_num_type == 2 else 10240
    need(0 <= expert_num <= most, op, "expert_num", expert_num, f"0 to {most}")
    need(active_num >= -1, op, "active_num", active_num, "-1 or more")
    if not _default_range and not active_expert_range:
        _default_range.extend([0, expert_num])
    first, end = active_expert_range or _default_range
    if active_expert_range:
        need(0 <= first <= end <= expert_num, op, "active_expert_range", [first, end], f"within 0 to {expert_num}")
    flat = expert_idx.flatten().long()
    need(not bool((flat >= expert_num).any()), op, "expert_idx", int(flat.max()) if len(flat) else None,
         f"experts below {expert_num}")
    if scale is not None:
        need_dtype(op, "scale", scale, torch.float32)
        if quant_mode == -1:
            need_shape(op, "scale", scale, [rows])
        else:
            need_rank(op, "scale", scale, 2)
            need_shape(op, "scale", scale, [1 if scale.shape[0] == 1 else end - first, width])

    order = flat.argsort(stable=True)
    order = order[(flat[order] >= first) & (flat[order] < end)]
    kept = len(order)
    if row_idx_type == 0:
        places = torch.full([rows * k], -1, dtype=torch.int32)
        places[order] = torch.arange(kept, dtype=torch.int32)
    else:
        places = garbage([rows * k], torch.int32)
        places[:kept] = order.int()
    length = rows * k if active_num <= 0 else min(active_num, rows * k)
    shown = order[:length]
    copies = garbage([length, width], torch.int8 if quant_mode == 1 else x.dtype)
    scales = garbage([length], torch.float32)
    if quant_mode == -1:
        copies[: len(shown)] = x[shown // k]
        if scale is not None:
            scales[: len(shown)] = scale[shown // k]
    elif x.dtype != torch.int8:
        smooth = 1.0 if scale is None else scale[(flat[shown] - first) % len(scale)]
        copies[: len(shown)], scales[: len(shown)] = per_row_int8(x[shown // k].float() * smooth)
    return copies, places, _counts(flat[order], first, end, expert_num, expert_tokens_num_type, expert_tokens_num_flag), scales


def _counts(experts, first, end, expert_num, kind, given):
    counts = torch.bincount(experts - first, minlength=end - first)
    if not given:
        return garbage([end - first], torch.int64)
    if kind == 1:
        return counts
    if kind == 0:
        return counts.cumsum(0)
    pairs = garbage([expert_num, 2], torch.int64)
    present = counts.nonzero()[:, 0]
    pairs[: len(present)] = torch.stack([present + first, counts[present]], 1)
    pairs[len(present) : len(present) + 1] = 0
    return pairs


def npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs=None, padded_mode=False, restore_shape=None):
    """y[i] = sum over j of probs[i, j] * permuted_tokens[sorted_indices[i * k + j]]; k is 1 without probs.

    Source: aclnnMoeTokenUnpermute page; MoeTokenUnpermuteKernelNpuOpApi.cpp.
    """
    op = "npu_moe_token_unpermute"
    need_rank(op, "permuted_tokens", permuted_tokens, 2)
    need_dtype(op, "permuted_tokens", permuted_tokens, *FLOATS)
    need_dtype(op, "sorted_indices", sorted_indices, torch.int32)
    need(not padded_mode, op, "padded_mode", padded_mode, "False")
    need_absent(op, "only the padded mode has it", restore_shape=restore_shape)
    rows, k = (len(permuted_tokens), 1) if probs is None else (probs.shape[0], probs.shape[-1])
    if probs is not None:
        need_rank(op, "probs", probs, 2)
        need_dtype(op, "probs", probs, *FLOATS)
        need(1 <= k <= 512, op, "probs.shape[1]", k, "1 to 512")
    need_shape(op, "sorted_indices", sorted_indices, [rows * k])
    need(len(permuted_tokens) == rows * k, op, "permuted_tokens.shape[0]", len(permuted_tokens), str(rows * k))
    at = sorted_indices.long()
    need(bool(((at >= 0) & (at < rows * k)).all()), op, "sorted_indices",
         f"from {int(at.min())} to {int(at.max())}" if len(at) else [], f"0 to {rows * k - 1}")
    parts = permuted_tokens.float()[at].reshape(rows, k, -1)
    if probs is not None:
        parts = parts * probs.float()[..., None]
    return parts.sum(1).to(permuted_tokens.dtype)


def npu_moe_finalize_routing(expanded_permuted_rows, skip1, skip2, bias, scales, expanded_src_to_dst_row,
                             export_for_source_row, drop_pad_mode=0, k=1):
    """y[i] = skip1[i] + skip2[i] + sum over j of scales[i, j] * (row of choice (i, j) + bias[its expert]).

    Where the row of a choice stands: expanded_src_to_dst_row[j * rows + i] in the modes 0 and 1, [i * k + j] in 2 and 3.
    -1 is a choice without a row in the modes 1 and 3; in mode 2, where it is not documented, the chip reads beside the
    tensor. Source: npu_moe_finalize_routing page; sglang#40705 for -1 in mode 2.
    """
    op = "npu_moe_finalize_routing"
    need_one_of(op, "drop_pad_mode", drop_pad_mode, 0, 1, 2, 3)
    padded, by_row = drop_pad_mode in (1, 3), drop_pad_mode in (2, 3)
    need_dtype(op, "expanded_permuted_rows", expanded_permuted_rows, *FLOATS)
    need_rank(op, "expanded_permuted_rows", expanded_permuted_rows, 3 if padded else 2)
    width = expanded_permuted_rows.shape[-1]
    need_rank(op, "expanded_src_to_dst_row", expanded_src_to_dst_row, 1)
    need_dtype(op, "expanded_src_to_dst_row", expanded_src_to_dst_row, torch.int32)
    if scales is not None:
        need_rank(op, "scales", scales, 2)
        k = scales.shape[1]
    choices = len(expanded_src_to_dst_row)
    need(k > 0 and choices % k == 0, op, "expanded_src_to_dst_row.shape", [choices], f"a multiple of k, which is {k}")
    rows = choices // k
    shapes = {"scales": (scales, [rows, k]), "skip1": (skip1, [rows, width]), "skip2": (skip2, [rows, width])}
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            need_dtype(op, name, tensor, expanded_permuted_rows.dtype)
            need_shape(op, name, tensor, shape)
    need(skip1 is not None or skip2 is None, op, "skip1", None, "a tensor where skip2 is one")
    if bias is not None:
        need_dtype(op, "bias", bias, expanded_permuted_rows.dtype)
        need_shape(op, "bias", bias, [bias.shape[0], width])
        need(export_for_source_row is not None, op, "export_for_source_row", None, "the expert of each choice of the bias")
        need_dtype(op, "export_for_source_row", export_for_source_row, torch.int32)
        need_shape(op, "export_for_source_row", export_for_source_row, [rows, k])
    held = expanded_permuted_rows.reshape(-1, width).float()
    need(padded or len(held) == choices, op, "expanded_permuted_rows.shape[0]", len(held), str(choices))
    at = expanded_src_to_dst_row.long()
    at = at.reshape(rows, k) if by_row else at.reshape(k, rows).T
    lowest = 0 if drop_pad_mode == 0 else -1
    need(bool(((at >= lowest) & (at < len(held))).all()), op, "expanded_src_to_dst_row", at.tolist(),
         f"{lowest} to {len(held) - 1}")
    beside = torch.zeros(1, width) if padded else garbage([1, width], torch.float32)
    parts = torch.cat([held, beside])[at]
    if bias is not None:
        parts = parts + bias.float()[export_for_source_row.long()]
    if scales is not None:
        parts = parts * scales.float()[..., None]
    y = parts.sum(1)
    for skip in (skip1, skip2):
        y = y if skip is None else y + skip.float()
    return y.to(expanded_permuted_rows.dtype)
