"""torch_mlu_ops: norms, rotary embedding, activation."""

from itertools import pairwise

import torch

from porthal.backends.torch.emulation.stand_in import (
    lengths,
    need,
    need_absent,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _norm(op, mean, x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale, out, dynamic_quant,
          store_output_after_norm, quant_type, mx_quant):
    need_dtype(op, "x", x, *FLOATS)
    need(not mx_quant and not store_output_after_norm, op, "mx_quant or store_output_after_norm", True,
         "False (not in this stand-in)")
    width = x.shape[-1]
    for name, tensor, shape in (("residual", residual, x.shape), ("gamma", gamma, [width]), ("beta", beta, [width]),
                                ("bias", bias, [width])):
        if tensor is not None:
            need_dtype(op, name, tensor, x.dtype)
            need_shape(op, name, tensor, shape)
    before = x.float()
    for addend in (bias, residual):
        before = before if addend is None else before + addend.float()
    centred = before - before.mean(-1, keepdim=True) if mean else before
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if gamma is None else y * gamma.float()
    y = y if beta is None else y + beta.float()
    results = []
    if quant_scale is None:
        need(not dynamic_quant, op, "dynamic_quant", True, "False without quant_scale")
        results = [y.to(x.dtype)]
    else:
        need_dtype(op, "quant_scale", quant_scale, torch.float32)
        need_shape(op, "quant_scale", quant_scale, [width])
        need(dynamic_quant and quant_type == torch.int8, op, "quant_type", quant_type,
             "torch.int8 with dynamic_quant (no other is in this stand-in)")
        results = list(per_token(y * quant_scale, torch.int8))
    if out is not None:
        need_dtype(op, "out", out, results[0].dtype)
        need_shape(op, "out", out, x.shape)
        results[0] = out.copy_(results[0])
    if store_output_before_norm:
        results.insert(1, before.to(x.dtype))
    return tuple(results) if len(results) > 1 else results[0]


def per_token(x, dtype):
    """Codes and one scale for each row: its largest magnitude over 127, or 448 in float8. A row of zeros has scale 0."""
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = x.abs().amax(-1) / top
    codes = torch.where(scale[..., None] > 0, x / scale[..., None], -top)
    codes = codes.round().clamp(-128, 127) if dtype == torch.int8 else codes.clamp(-448, 448)
    return codes.to(dtype), scale


def fused_rms_norm(x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale=None, out=None,
                   dynamic_quant=False, store_output_after_norm=False, quant_type=torch.int8, scale_type=torch.float32,
                   mx_quant=False):
    """(x + bias + residual) / rms * gamma; with it the sum, if asked, and the scales of codes."""
    return _norm("fused_rms_norm", False, x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale, out,
                 dynamic_quant, store_output_after_norm, quant_type, mx_quant)


def fused_layer_norm(x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale=None, out=None,
                     dynamic_quant=False, store_output_after_norm=False, quant_type=torch.int8, gamma_add_coef=0.0,
                     scale_type=torch.float32, mx_quant=False):
    """The same about the mean, with beta added."""
    need(gamma_add_coef == 0, "fused_layer_norm", "gamma_add_coef", gamma_add_coef, "0 where gamma has one dimension")
    return _norm("fused_layer_norm", True, x, residual, gamma, beta, bias, eps, store_output_before_norm, quant_scale, out,
                 dynamic_quant, store_output_after_norm, quant_type, mx_quant)


def _positions(op, rows, position_ids, starts, discrete, longest):
    """The place of each row: its own id, or counted from its sequence's start."""
    if discrete:
        need(position_ids is not None, op, "position_ids", None, "a tensor with discrete")
        need_dtype(op, "position_ids", position_ids, torch.int32)
        need(position_ids.numel() == rows, op, "position_ids.shape", list(position_ids.shape), f"{rows} places")
        return position_ids.flatten().long()
    first = [0] * (len(starts) - 1) if position_ids is None else lengths(op, "position_ids", position_ids)
    need(len(first) == len(starts) - 1, op, "position_ids.shape", [len(first)], f"[{len(starts) - 1}], a place per sequence")
    return torch.cat([torch.arange(a, b) - a + f for a, b, f in zip(starts, starts[1:], first)] or [torch.empty(0).long()])


def apply_rotary(input, sin_cache, cos_cache, position_ids, cu_seqlens, interleaved, discrete, dynamic_ntk, max_seqlen,
                 output=None, is_inverse=False):
    """Rotate the first sin_cache.shape[-1] elements of input[batch, seq, head, size] or [total, head, size].

    Tables are [places, width] and hold each angle twice, as the layout wants it. The result is written into `input`,
    unless `output` is given, whose elements behind the width are left undefined.
    """
    op = "apply_rotary"
    need_dtype(op, "input", input, *FLOATS)
    need_rank(op, "input", input, 3, 4)
    need(not dynamic_ntk, op, "dynamic_ntk", dynamic_ntk, "False (not in this stand-in)")
    *_, heads, size = input.shape
    for name, table in (("sin_cache", sin_cache), ("cos_cache", cos_cache)):
        need_dtype(op, name, table, input.dtype)
        need_rank(op, name, table, 2)
    need_shape(op, "cos_cache", cos_cache, sin_cache.shape)
    width = sin_cache.shape[1]
    need(2 <= size <= 256, op, "input.shape[-1]", size, "2 to 256")
    need(2 <= width <= size and width % 2 == 0, op, "sin_cache.shape[-1]", width, f"an even number from 2 to {size}")
    rows = input.numel() // max(1, heads * size)
    if cu_seqlens is not None:
        need_rank(op, "input", input, 3)
        starts = lengths(op, "cu_seqlens", cu_seqlens)
        need(starts[0] == 0 and starts[-1] == rows and starts == sorted(starts), op, "cu_seqlens", starts,
             f"cumulative rows from 0 to {rows}")
        longest = max((b - a for a, b in pairwise(starts)), default=0)
        need(longest <= max_seqlen, op, "max_seqlen", max_seqlen, f"at least {longest}")
    else:
        seq = input.shape[1] if input.dim() == 4 else max_seqlen
        need(seq > 0 and rows % seq == 0 and seq == max_seqlen, op, "max_seqlen", max_seqlen, f"the rows of a sequence, {seq}")
        starts = list(range(0, rows + 1, seq))
    need(len(starts) - 1 <= 10240, op, "the number of sequences", len(starts) - 1, "10240 at most")
    place = _positions(op, rows, position_ids, starts, discrete, max_seqlen)
    need(bool(((place >= 0) & (place < len(sin_cache))).all()), op, "position_ids", place.tolist(),
         f"places 0 to {len(sin_cache) - 1} of the tables")
    sin, cos = (t[place].float().view(*input.shape[:-2], 1, width) for t in (sin_cache, cos_cache))
    x = input[..., :width].float()
    if interleaved:
        turned = torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)
    else:
        left, right = x.chunk(2, -1)
        turned = torch.cat([-right, left], -1)
    y = (x * cos + turned * (-sin if is_inverse else sin)).to(input.dtype)
    target = input
    if output is not None:
        need_dtype(op, "output", output, input.dtype)
        need_shape(op, "output", output, input.shape)
        target = output.fill_(float("nan"))
    target[..., :width] = y
    return target


def _swiglu(op, x, act_mode, is_gated):
    need_dtype(op, "input", x, *FLOATS)
    need_one_of(op, "act_mode", act_mode, "silu")
    if not is_gated:
        return x.float() * torch.sigmoid(x.float())
    need(x.shape[-1] % 2 == 0, op, "input.shape[-1]", x.shape[-1], "an even number")
    gate, up = x.float().chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def active(input, act_mode, is_gated, active_coef=1.0, high_precision=False, gelu_approximate="none"):
    """silu(input), or silu of the first half of the last axis times the second."""
    return _swiglu("active", input, act_mode, is_gated).to(input.dtype)


def moe_active(input, act_mode, is_gated, output=None, bias=None, cusum_token_count=None, start_expert_id=0, expert_size=0,
               high_precision=False, gelu_approximate="none", swiglu_limit=0, weight=None):
    """The same for rows sorted by expert; those behind the experts at hand are left undefined. `output` may be input's half."""
    op = "moe_active"
    need_absent(op, "not in this stand-in", bias=bias, weight=weight)
    need(swiglu_limit == 0, op, "swiglu_limit", swiglu_limit, "0 (not in this stand-in)")
    y = _swiglu(op, input, act_mode, is_gated).to(input.dtype)
    if cusum_token_count is not None:
        counts = lengths(op, "cusum_token_count", cusum_token_count)
        y[counts[start_expert_id + expert_size] - counts[start_expert_id] :] = float("nan")
    if output is None:
        return y
    need_dtype(op, "output", output, input.dtype)
    need_shape(op, "output", output, y.shape)
    return output.copy_(y)
