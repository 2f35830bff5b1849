"""torch_mlu_ops: the router, rows sorted by expert, their products and codes, and dense products."""

import math

import torch

from porthal.backends.cambricon.emulated.vectors import FLOATS, _swiglu, per_token
from porthal.backends.torch.emulation.stand_in import (
    garbage,
    highest,
    lengths,
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_HALVES = (torch.bfloat16, torch.float16)


def _topk(op, score, input, topk, normalize, groups, topk_group, mask, normed_by, route_scale, score_bias, weight, ids):
    need_dtype(op, "input", input, *FLOATS)
    need_dense(op, input=input)
    need_absent(op, "not in this stand-in", mask=mask)
    need_one_of(op, "normed_by", normed_by, "topk_logit")
    experts = input.shape[-1]
    need(0 < topk <= experts, op, "topk", topk, f"1 to {experts}")
    choice = score
    if score_bias is not None:
        need_dtype(op, "score_bias", score_bias, *FLOATS)
        need_shape(op, "score_bias", score_bias, [experts])
        choice = score + score_bias.float()
    choice = choice.nan_to_num(-math.inf)
    if groups > 1:
        need(experts % groups == 0, op, "num_expert_group", groups, f"a divisor of {experts}")
        need(0 < topk_group <= groups, op, "topk_group", topk_group, f"1 to {groups}")
        size = experts // groups
        need(topk <= topk_group * size, op, "topk", topk, f"at most {topk_group * size}")
        grouped = choice.unflatten(-1, (groups, size))
        pair = score_bias is not None and op == "moe_sigmoid_topk"
        best = grouped.topk(min(2, size) if pair else 1, -1).values.sum(-1)
        allowed = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, highest(best, topk_group), True)
        choice = grouped.masked_fill(~allowed[..., None], -math.inf).flatten(-2)
    chosen = highest(choice, topk)
    made = score.gather(-1, chosen)
    made = made / made.sum(-1, keepdim=True) if normalize else made
    results = []
    for name, given, value in (("reduce_weight", weight, made * route_scale), ("expert_id", ids, chosen.int())):
        if given is not None:
            need_dtype(op, name, given, value.dtype)
            need_shape(op, name, given, value.shape)
            value = given.copy_(value)
        results.append(value)
    return tuple(results)


def moe_sigmoid_topk(input, topk, normalize=False, num_expert_group=-1, topk_group=0, mask=None, normed_by="topk_logit",
                     route_scale=1.0, score_bias=None, reduce_weight=None, expert_id=None):
    """float32 weights [.., k] and int32 ids: the k largest sigmoid(input) + score_bias; weights without the bias.

    With groups only those topk_group count whose two largest with a bias, or largest without one, are most.
    """
    return _topk("moe_sigmoid_topk", torch.sigmoid(input.float()), input, topk, normalize, num_expert_group, topk_group, mask,
                 normed_by, route_scale, score_bias, reduce_weight, expert_id)


def moe_softmax_topk(input, topk, normalize=False, num_expert_group=-1, topk_group=0, mask=None, normed_by="topk_logit",
                     route_scale=1.0, reduce_weight=None, expert_id=None, score_bias=None):
    """The same of softmax(input); note where score_bias stands."""
    return _topk("moe_softmax_topk", torch.softmax(input.float(), -1), input, topk, normalize, num_expert_group, topk_group,
                 mask, normed_by, route_scale, score_bias, reduce_weight, expert_id)


def moe_gen_idx(expert_id, expert_num, return_token2expert_idx=False):
    """int32: the token of each sorted row, the sorted row of each (token, k), rows of each expert, and their sums from 0.

    Rows of one expert are in no order.
    """
    op = "moe_gen_idx"
    need_dtype(op, "expert_id", expert_id, torch.int32)
    need_rank(op, "expert_id", expert_id, 2)
    need_dense(op, expert_id=expert_id)
    ids = expert_id.flatten().long()
    need(bool(((ids >= 0) & (ids < expert_num)).all()), op, "expert_id", ids.tolist(), f"0 to {expert_num - 1}")
    order = len(ids) - 1 - ids.flip(0).argsort(stable=True)
    combine = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    count = torch.bincount(ids, minlength=expert_num)
    found = [order // expert_id.shape[1], combine, count, torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])]
    return [x.int() for x in (*found, *([order] if return_token2expert_idx else []))]


def _span(op, cusum_token_count, start_expert_id, expert_size):
    sums = lengths(op, "cusum_token_count", cusum_token_count)
    need(0 <= start_expert_id <= start_expert_id + expert_size < len(sums), op, "start_expert_id + expert_size",
         start_expert_id + expert_size, f"at most {len(sums) - 1}")
    return sums[start_expert_id], sums[start_expert_id + expert_size]


def moe_expand_input(input, gather_idx, cusum_token_count=None, start_expert_id=0, expert_size=0, output=None):
    """input[gather_idx], or the part of it that belongs to the experts at hand, first; the rows behind are undefined."""
    op = "moe_expand_input"
    need_dtype(op, "input", input, *FLOATS, torch.int8)
    need_rank(op, "input", input, 2)
    need_dtype(op, "gather_idx", gather_idx, torch.int32)
    need_rank(op, "gather_idx", gather_idx, 1)
    a, b = 0, len(gather_idx)
    if cusum_token_count is not None:
        a, b = _span(op, cusum_token_count, start_expert_id, expert_size)
    rows = gather_idx[a:b].long()
    need(bool(((rows >= 0) & (rows < len(input))).all()), op, "gather_idx", rows.tolist(), f"0 to {len(input) - 1}")
    made = garbage([len(gather_idx), input.shape[1]], input.dtype) if output is None else output
    need(made.dtype == input.dtype and made.shape[1] == input.shape[1] and len(made) >= len(rows), op, "output",
         (list(made.shape), made.dtype), f"{len(rows)} rows or more of {input.shape[1]} in {input.dtype}")
    made.copy_(garbage(made.shape, made.dtype))
    made[: len(rows)] = input[rows]
    return made


def moe_combine_result(input, reduce_weight, gather_ids, residual, cusum_token_count, start_expert_id, expert_size,
                       bias=None, output=None):
    """[T, H]: the sum over k of reduce_weight[T, k] input[gather_ids[T k]], and residual.

    With sums of counts `input` holds the rows of the experts at hand, first, and the others' add nothing.
    """
    op = "moe_combine_result"
    need_absent(op, "it is not supported yet", bias=bias)
    need_dtype(op, "input", input, *FLOATS)
    need_rank(op, "input", input, 2)
    need_dtype(op, "reduce_weight", reduce_weight, torch.float32)
    need_rank(op, "reduce_weight", reduce_weight, 2)
    tokens, topk = reduce_weight.shape
    need_dtype(op, "gather_ids", gather_ids, torch.int32)
    need_shape(op, "gather_ids", gather_ids, [tokens * topk])
    a, b = 0, len(input)
    if cusum_token_count is not None:
        a, b = _span(op, cusum_token_count, start_expert_id, expert_size)
    rows = gather_ids.long()
    here = (rows >= a) & (rows < b)
    need(cusum_token_count is not None or bool(here.all()), op, "gather_ids", rows.tolist(), f"0 to {b - 1}")
    need(b - a <= len(input), op, "input.shape[0]", len(input), f"at least {b - a}")
    picked = torch.where(here[:, None], input[torch.where(here, rows - a, 0)].float(), 0.0) if len(input) else torch.zeros(
        tokens * topk, input.shape[1])
    y = (picked.view(tokens, topk, -1) * reduce_weight[..., None]).sum(1)
    if residual is not None:
        need_dtype(op, "residual", residual, *FLOATS)
        need_shape(op, "residual", residual, y.shape)
        y = y + residual.float()
    if output is None:
        return y.to(input.dtype)
    need_dtype(op, "output", output, input.dtype)
    need_shape(op, "output", output, y.shape)
    return output.copy_(y)


def _grouped(op, a, b, counts, expand_idx, max_rows, d, dtype):
    """d[row] = b[expert of row] a[row] for rows sorted by expert; the rows behind them are left undefined."""
    need_dtype(op, "group_list", counts, torch.int32)
    need_shape(op, "group_list", counts, [len(b)])
    if expand_idx is not None:
        need_dtype(op, "expand_idx", expand_idx, torch.int32)
        need(bool(((expand_idx >= 0) & (expand_idx < len(a))).all()), op, "expand_idx", expand_idx.tolist(),
             f"0 to {len(a) - 1}")
        a = a[expand_idx.long()]
    sizes = counts.tolist()
    need(min(sizes, default=0) >= 0 and sum(sizes) <= len(a), op, "the sum of group_list", sum(sizes), f"at most {len(a)}")
    need(max(sizes, default=0) <= max_rows, op, "max_in_group_list", max_rows, f"at least {max(sizes, default=0)}")
    if d is None:
        d = torch.empty(len(a), b.shape[1], dtype=dtype)
    need_shape(op, "d", d, [len(a), b.shape[1]])
    first = 0
    for expert, count in enumerate(sizes):
        d[first : first + count] = (a[first : first + count] @ b[expert].T).to(d.dtype)
        first += count
    d[first:] = math.nan
    return d


def group_gemm(a, b, group_list, expand_idx, c, alpha, beta, max_in_group_list, bias=None, d=None, trans_a=False,
               trans_b=True, tile_config=None, idx_offset=None, output_dtype=None):
    """a[m, k] sorted by expert times b[E, n, k]^T, group_list rows of each; alpha and beta are tensors or None."""
    op = "group_gemm"
    need_absent(op, "not in this stand-in", c=c, alpha=alpha, beta=beta, bias=bias, tile_config=tile_config,
                idx_offset=idx_offset)
    need(not trans_a, op, "trans_a", trans_a, "False (not in this stand-in)")
    need_dtype(op, "a", a, *FLOATS)
    need_dtype(op, "b", b, a.dtype)
    need_rank(op, "a", a, 2)
    need_rank(op, "b", b, 3)
    wide = b if trans_b else b.transpose(1, 2)
    need(wide.shape[2] == a.shape[1], op, "b.shape", list(b.shape),
         f"k = {a.shape[1]}, {'last' if trans_b else 'second'}")
    dtype = output_dtype or a.dtype
    need_one_of(op, "output_dtype", dtype, *FLOATS)
    if d is not None:
        need_dtype(op, "d", d, a.dtype)
    return _grouped(op, a.float(), wide.float(), group_list, expand_idx, max_in_group_list, d, dtype)


def smooth_quant_group_gemm(a, b, m_list, expand_idx, c, alpha, beta, a_scale, b_scale, dtype, max_m, bias=None,
                            quant_flag=None, d=None, tile_config=None, a_calibration=None, b_calibration=None,
                            a_quant_bit_size=8, a_lora=None, b_lora=None, idx_offset=None, is_symmetric_quant=True):
    """The same of int8 codes: a_scale[m] of each row, b_scale[E, n] of each row of weights."""
    op = "smooth_quant_group_gemm"
    need_absent(op, "not in this stand-in", c=c, alpha=alpha, beta=beta, bias=bias, quant_flag=quant_flag,
                tile_config=tile_config, a_calibration=a_calibration, b_calibration=b_calibration, a_lora=a_lora,
                b_lora=b_lora, idx_offset=idx_offset, expand_idx=expand_idx)
    need(a_quant_bit_size == 8, op, "a_quant_bit_size", a_quant_bit_size, "8 (4 is not in this stand-in)")
    need_dtype(op, "a", a, torch.int8)
    need_dtype(op, "b", b, torch.int8)
    need_rank(op, "a", a, 2)
    need_shape(op, "b", b, [*b.shape[:2], a.shape[1]])
    need_dtype(op, "a_scale", a_scale, torch.float32)
    need_dtype(op, "b_scale", b_scale, torch.float32)
    need_shape(op, "a_scale", a_scale, [len(a)])
    need_shape(op, "b_scale", b_scale, b.shape[:2])
    need_one_of(op, "dtype", dtype, *_HALVES)
    if d is not None:
        need_dtype(op, "d", d, dtype)
    return _grouped(op, a.float() * a_scale[:, None], b.float() * b_scale[..., None], m_list, None, max_m, d, dtype)


def _quantised(op, x, scale, quant_type, act_mode, is_gated):
    need_dtype(op, "x", x, *FLOATS)
    need_one_of(op, "quant_type", quant_type, torch.int8, torch.float8_e4m3fn)
    y = x.float() if act_mode == "none" else _swiglu(op, x, act_mode, is_gated)
    return per_token(y if scale is None else y * scale, quant_type)


def scaled_quantize(x, scale=None, zero=None, scale_ub=None, quant_type=torch.int8, quant_mode="dynamic_per_token",
                    act_mode="none", active_coef=1.0, is_gated=False, quant_bit_size=8, scale_type=torch.float32,
                    need_output_scale_trans=False, output_reduced=None, group_size=1):
    """Codes [.., C] of x * scale and one float32 scale for each row; after silu and gate, if asked."""
    op = "scaled_quantize"
    need_absent(op, "it is not supported", zero=zero)
    need_absent(op, "not in this stand-in", scale_ub=scale_ub, output_reduced=output_reduced)
    need(quant_mode == "dynamic_per_token" and quant_bit_size == 8 and scale_type == torch.float32, op, "quant_mode",
         (quant_mode, quant_bit_size, scale_type), "dynamic_per_token, 8 bits, float32 (no other is in this stand-in)")
    width = x.shape[-1] // (1 + (is_gated and act_mode != "none"))
    if scale is not None:
        need_dtype(op, "scale", scale, torch.float32)
        need(list(scale.shape) in ([width], [1]), op, "scale.shape", list(scale.shape), f"[{width}] or [1]")
    return _quantised(op, x, scale, quant_type, act_mode, is_gated)


def moe_quantize(x, smooth, zero=None, token_count=None, gather_index=None, gather_index_start_position=None, output=None,
                 output_scale=None, dynamic_quant=True, act_mode="none", active_coef=1.0, is_gated=False,
                 quant_type=torch.int8, quant_bit_size=8, scale_type=torch.float32, need_output_scale_trans=False,
                 output_reduced=None, group_size=1):
    """The same for rows sorted by expert, gathered first if asked; smooth is [C], or [E, C] with token_count[E].

    Rows behind the sum of token_count are undefined.
    """
    op = "moe_quantize"
    need_absent(op, "it is not supported", zero=zero)
    need_absent(op, "not in this stand-in", output_reduced=output_reduced, output=output, output_scale=output_scale)
    need(dynamic_quant and quant_bit_size == 8 and scale_type == torch.float32, op, "dynamic_quant", dynamic_quant,
         "True with 8 bits and scales in float32 (no other is in this stand-in)")
    need_rank(op, "x", x, 2)
    need_dtype(op, "smooth", smooth, torch.float32)
    total = len(x) if gather_index is None else len(gather_index)
    sizes = [total] if token_count is None else lengths(op, "token_count", token_count)
    need(smooth.dim() == 1 or len(smooth) == len(sizes), op, "smooth.shape", list(smooth.shape), f"[C] or [{len(sizes)}, C]")
    if gather_index is not None:
        need_dtype(op, "gather_index", gather_index, torch.int32)
        first = 0 if gather_index_start_position is None else lengths(op, "gather_index_start_position",
                                                                      gather_index_start_position)[0]
        x = x[gather_index[first : first + sum(sizes)].long()]
    need(sum(sizes) <= len(x), op, "the sum of token_count", sum(sizes), f"at most {len(x)}")
    x = x[: sum(sizes)]
    by_row = smooth if smooth.dim() == 1 else smooth.repeat_interleave(torch.tensor(sizes), 0)
    codes, scale = _quantised(op, x, by_row, quant_type, act_mode, is_gated)
    tail = total - len(codes)
    spoilt = garbage([tail, codes.shape[1]], torch.int8).view(torch.int8).view(codes.dtype)
    return torch.cat([codes, spoilt]), torch.cat([scale, garbage([tail], torch.float32)])


def scaled_matmul(a, b, a_scale, b_scale, output_dtype, bias=None, c=None, act_mode="none", quant_bit_size=8, alpha=1.0,
                  beta=1.0, use_hp_active=False, a_quant_bit_size=-1, a_calib=None, b_calib=None, output=None,
                  tile_config=None):
    """a[M, K] b[N, K]^T in codes, a_scale[M] b_scale[N], and bias[N]. Codes of a want a_quant_bit_size 8."""
    op = "scaled_matmul"
    need_absent(op, "not in this stand-in", c=c, a_calib=a_calib, b_calib=b_calib, tile_config=tile_config)
    need(act_mode == "none" and alpha == 1, op, "act_mode and alpha", (act_mode, alpha), "none and 1 (not in this stand-in)")
    need_dtype(op, "a", a, torch.int8, torch.float8_e4m3fn)
    need_dtype(op, "b", b, a.dtype)
    need((a_quant_bit_size, quant_bit_size) == (8, 8), op, "a_quant_bit_size and quant_bit_size",
         (a_quant_bit_size, quant_bit_size), f"(8, 8) for {a.dtype}")
    need_rank(op, "a", a, 2)
    need_shape(op, "b", b, [len(b), a.shape[1]])
    need_one_of(op, "output_dtype", output_dtype, *_HALVES)
    need(a_scale is not None, op, "a_scale", None, "a tensor (one scale for all of a is not in this stand-in)")
    for name, scale, count in (("a_scale", a_scale, len(a)), ("b_scale", b_scale, len(b))):
        need_dtype(op, name, scale, torch.float32)
        need_shape(op, name, scale, [count])
    y = (a.float() @ b.float().T) * a_scale[:, None] * b_scale
    if bias is not None:
        need_dtype(op, "bias", bias, output_dtype)
        need_shape(op, "bias", bias, [len(b)])
        y = y + bias.float()
    if output is None:
        return y.to(output_dtype)
    need_dtype(op, "output", output, output_dtype)
    need_shape(op, "output", output, y.shape)
    return output.copy_(y)


def matmul(a, b, bias=None, c=None, act_mode="none", alpha=1.0, beta=0.0, fast_act=True, approximate=True, dtype=None,
           a_scale=None, b_scale=None, trans_a=False, trans_b=True, tile_config=None, output=None):
    """alpha a[m, k] b[n, k]^T + bias[n]; or [batch, m, k] and [batch, n, k]."""
    op = "matmul"
    need_absent(op, "not in this stand-in", c=c, a_scale=a_scale, b_scale=b_scale, tile_config=tile_config)
    need(act_mode == "none" and not trans_a, op, "act_mode and trans_a", (act_mode, trans_a), "none and False")
    need_dtype(op, "a", a, *FLOATS)
    need_dtype(op, "b", b, a.dtype)
    need_rank(op, "a", a, 2, 3)
    need_rank(op, "b", b, a.dim())
    wide = b.float().transpose(-1, -2) if trans_b else b.float()
    need(wide.shape[-2] == a.shape[-1], op, "b.shape", list(b.shape), f"k = {a.shape[-1]}")
    y = a.float() @ wide * alpha
    if bias is not None:
        need_dtype(op, "bias", bias, *FLOATS)
        need_shape(op, "bias", bias, [y.shape[-1]])
        y = y + bias.float()
    if output is None:
        return y.to(dtype or a.dtype)
    need_shape(op, "output", output, y.shape)
    return output.copy_(y)


def batch_matmul(a, b, c=None, alpha=1.0, beta=0.0, a_scale=None, b_scale=None, trans_a=False, trans_b=True, d=None,
                 bias=None, act_mode="none", dtype=None, use_hp_active=False, approximate=False):
    """alpha a[batch, m, k] b[batch, n, k]^T."""
    op = "batch_matmul"
    need_absent(op, "not in this stand-in", c=c, a_scale=a_scale, b_scale=b_scale, bias=bias)
    need(act_mode == "none" and not trans_a, op, "act_mode and trans_a", (act_mode, trans_a), "none and False")
    need_dtype(op, "a", a, *FLOATS)
    need_dtype(op, "b", b, a.dtype)
    need_rank(op, "a", a, 3)
    need_rank(op, "b", b, 3)
    wide = b.float().transpose(1, 2) if trans_b else b.float()
    need(wide.shape[1] == a.shape[2] and (len(a) == len(b) or 1 in (len(a), len(b))), op, "b.shape", list(b.shape),
         f"k = {a.shape[2]} and the batch of a, or 1")
    y = a.float() @ wide * alpha
    if d is None:
        return y.to(dtype or a.dtype)
    need_shape(op, "d", d, y.shape)
    return d.copy_(y)
