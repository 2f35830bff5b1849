"""kunlun_ops and xspeedgate_ops: norms, SwiGLU, rotary embedding, codes by row, products."""

import math

import torch

from porthal.backends.torch.emulation.stand_in import (
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_rank,
    need_shape,
)

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def _norm(op, total, x, weight, output, eps):
    need_dtype(op, "weight", weight, torch.float32, x.dtype)
    need_shape(op, "weight", weight, [x.shape[-1]])
    need_dense(op, weight=weight, output=output)
    need_dtype(op, "output", output, x.dtype)
    need_shape(op, "output", output, x.shape)
    output.copy_(total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * weight.float())


def rmsnorm(x, weight, output, eps):
    """output = x / rms(x) * weight."""
    need_dtype("rmsnorm", "x", x, *FLOATS)
    need_dense("rmsnorm", x=x)
    _norm("rmsnorm", x.float(), x, weight, output, eps)


def add_rmsnorm(x, y, *, residual_output, weight, eps, output):
    """residual_output = x + y, output = its norm; either may be an argument's own memory."""
    op = "add_rmsnorm"
    need_dtype(op, "x", x, *FLOATS)
    for name, tensor in (("y", y), ("residual_output", residual_output)):
        need_dtype(op, name, tensor, x.dtype)
        need_shape(op, name, tensor, x.shape)
    need_dense(op, x=x, y=y, residual_output=residual_output)
    total = x.float() + y.float()
    residual_output.copy_(total)
    _norm(op, total, x, weight, output, eps)


def _swiglu(op, x, y):
    need_dtype(op, "x", x, *FLOATS)
    need_dense(op, x=x, y=y)
    need_shape(op, "y", y, [*x.shape[:-1], x.shape[-1] // 2])
    need_dtype(op, "y", y, x.dtype)
    gate, up = x.float().chunk(2, -1)
    y.copy_(gate * gate.sigmoid() * up)


def swiglu(*, x, y):
    """y = silu(first half of x) * second half."""
    _swiglu("swiglu", x, y)


def silu_and_mul(x, *, axis, turn, out):
    """The same by its older name."""
    need(axis == -1, "silu_and_mul", "axis", axis, "-1")
    need(turn is True, "silu_and_mul", "turn", turn, "True (what False means is not published)")
    _swiglu("silu_and_mul", x, out)


def _turned(x, angles, neox):
    """The leading places of x [tokens, heads, size] turned by [tokens, 2 * n] cosines and sines; neox pairs halves."""
    n = angles.shape[-1] // 2
    cos, sin = angles.float()[:, None].chunk(2, -1)
    x = x.float()
    places = (slice(0, n), slice(n, 2 * n)) if neox else (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
    u, v = x[..., places[0]], x[..., places[1]]
    out = x.clone()
    out[..., places[0]], out[..., places[1]] = u * cos - v * sin, v * cos + u * sin
    return out


def _angles(op, positions, cos_sin_cache, head_size):
    need_dtype(op, "positions", positions, torch.int64)
    need_rank(op, "positions", positions, 1)
    need_rank(op, "cos_sin_cache", cos_sin_cache, 2)
    most, width = cos_sin_cache.shape
    need(width % 2 == 0 and width <= head_size, op, "cos_sin_cache.shape[1]", width, f"an even number up to {head_size}")
    need(bool(((positions >= 0) & (positions < most)).all()), op, "positions", positions.tolist(), f"0 to {most - 1}")
    return cos_sin_cache[positions]


def rotary_embedding(*, positions, query, key, head_size, cos_sin_cache, is_neox):
    """query and key, [tokens, heads * head_size] or [tokens, heads, head_size], turned in place."""
    op = "rotary_embedding"
    angles = _angles(op, positions, cos_sin_cache, head_size)
    for name, tensor in (("query", query), ("key", key)):
        need_dtype(op, name, tensor, *FLOATS)
        need_dtype(op, "cos_sin_cache", cos_sin_cache, tensor.dtype)
        need_dense(op, **{name: tensor})
        need(len(tensor) == len(positions) and tensor[:1].numel() % head_size == 0, op, f"{name}.shape",
             list(tensor.shape), f"{len(positions)} rows of heads of {head_size}")
        heads = tensor.view(len(positions), -1, head_size)
        heads.copy_(_turned(heads, angles, is_neox))


def flashinfer_rotary_embedding(*, positions, rotary_dim, head_size, cos_sin_cache, is_neox_style, query, key, offsets):
    """query and key of [tokens, heads, head_size] turned. Whether it writes its arguments is not published: NaN there."""
    op = "flashinfer_rotary_embedding"
    need_absent(op, "not in this stand-in", offsets=offsets)
    need(key is not None, op, "key", None, "a tensor")
    angles = _angles(op, positions, cos_sin_cache, head_size)
    need(rotary_dim == angles.shape[1], op, "rotary_dim", rotary_dim, f"{angles.shape[1]}, the width of cos_sin_cache")
    made = []
    for name, tensor in (("query", query), ("key", key)):
        need_dtype(op, name, tensor, *FLOATS)
        need_dtype(op, "cos_sin_cache", cos_sin_cache, torch.float32, tensor.dtype)
        need_rank(op, name, tensor, 3)
        need_shape(op, name, tensor, [len(positions), tensor.shape[1], head_size])
        made.append(_turned(tensor, angles, is_neox_style).to(tensor.dtype))
    query.fill_(math.nan)
    key.fill_(math.nan)
    return tuple(made)


def quant2d(x, y, max, force_sdnn=False):
    """max = the largest magnitude of each row, not a scale; y = x * 127 / max in int8."""
    op = "quant2d"
    need_dtype(op, "x", x, *FLOATS)
    need_dtype(op, "y", y, torch.int8)
    need_dtype(op, "max", max, torch.float32)
    need_shape(op, "y", y, x.shape)
    need_dense(op, x=x, y=y, max=max)
    rows = x.numel() // x.shape[-1]
    need(max.numel() == rows, op, "max.shape", list(max.shape), f"{rows} numbers, one a row")
    top = x.float().abs().amax(-1)
    max.copy_(top.view(max.shape))
    y.copy_((x.float() * 127 / top.clamp(min=1e-30)[..., None]).round())


def matmul(*, x, w, out, x_trans, w_trans, alpha, beta, bias=None, x_max=None, w_max=None, x_pc_max=None, w_pc_max=None):
    """out = x @ w.T + bias; codes of int8 with the largest magnitude of each row of x and of w."""
    op = "matmul"
    need(not x_trans and w_trans, op, "x_trans, w_trans", (x_trans, w_trans), "(False, True): no other is published")
    need((alpha, beta) == (1.0, 0.0), op, "alpha, beta", (alpha, beta), "(1.0, 0.0): no other is published")
    need_absent(op, "not in this stand-in", x_max=x_max, w_max=w_max)
    need_dense(op, x=x, w=w, out=out)
    need_dtype(op, "x", x, *FLOATS, torch.int8)
    need_dtype(op, "w", w, x.dtype)
    need_rank(op, "x", x, 2)
    need_shape(op, "w", w, [len(w), x.shape[1]])
    need_shape(op, "out", out, [len(x), len(w)])
    need_dtype(op, "out", out, *(HALVES if x.dtype == torch.int8 else (x.dtype,)))
    y = x.float() @ w.float().T
    if x.dtype == torch.int8:
        y = scaled(op, y, x_pc_max, w_pc_max)
    else:
        need_absent(op, "codes have it, floats do not", x_pc_max=x_pc_max, w_pc_max=w_pc_max)
    if bias is not None:
        need_dtype(op, "bias", bias, torch.float32)
        need_shape(op, "bias", bias, [len(w)])
        y = y + bias
    out.copy_(y)


def scaled(op, y, x_max, w_max):
    """Products of codes as numbers, from the largest magnitudes of rows of x and of rows of w."""
    for name, tensor, count in (("x's maxima", x_max, y.shape[0]), ("w's maxima", w_max, y.shape[1])):
        need(tensor is not None, op, name, None, "a tensor beside codes")
        need_dtype(op, name, tensor, torch.float32)
        need(tensor.numel() == count, op, f"{name}, shape", list(tensor.shape), f"{count} numbers")
    return y * (x_max.reshape(-1, 1) / 127) * (w_max.reshape(1, -1) / 127)
