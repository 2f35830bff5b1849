"""Norms, rotations and activations."""

import torch

from porthal.backends.ascend.emulated.products import FLOATS, HALVES, normed, rotated_halves, swiglu
from porthal.backends.torch.emulation.stand_in import (
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

# Which dimensions of a table of cosines are those of the input (the others are 1), and which are the input's B and N.
_HALF = (  # BNSD, BSND, SBND
    ((0, 0, 1), 0, 1), ((1, 0, 1), 0, 1), ((1, 1, 1), 0, 1),
    ((0, 1, 0), 0, 2), ((1, 1, 0), 0, 2), ((1, 1, 1), 0, 2),
    ((1, 0, 0), 1, 2), ((1, 1, 0), 1, 2), ((1, 1, 1), 1, 2),
)  # fmt: skip
_INTERLEAVE = (((0, 0, 1), 0, 1), ((0, 1, 0), 0, 2), ((1, 0, 0), 1, 2))


def _need_gamma(op, name, x, gamma):
    kept = x.dim() - gamma.dim()
    need(0 <= kept < x.dim() and gamma.shape == x.shape[kept:], op, "gamma.shape", list(gamma.shape),
         f"the last dimensions of {name}'s {list(x.shape)}")


def _need_filled(op, **tensors):
    for name, tensor in tensors.items():
        need(tensor.numel() > 0, op, f"{name}.shape", list(tensor.shape), "no empty tensor")


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """y = input / sqrt(mean(input^2) + epsilon) * gamma over gamma's dimensions, and the reciprocal root in float32.

    Source: npu_rms_norm page; the second result's shape: aclnnRmsNorm page.
    """
    op = "npu_rms_norm"
    need_dtype(op, "input", input, *FLOATS)
    need(gamma.dtype in (input.dtype, torch.float32), op, "gamma.dtype", gamma.dtype,
         f"input's {input.dtype} or torch.float32")
    need(2 <= input.dim() <= 8, op, "input.dim()", input.dim(), "2 to 8")
    _need_gamma(op, "input", input, gamma)
    y, rstd = normed(input.float(), gamma, epsilon)
    return y.to(input.dtype), rstd


def npu_add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    """x = x1 + x2; x / sqrt(mean(x^2) + epsilon) * gamma over gamma's dimensions, the reciprocal root, and x.

    Source: npu_add_rms_norm page.
    """
    op = "npu_add_rms_norm"
    need_dtype(op, "x1", x1, *FLOATS)
    need_dtype(op, "x2", x2, x1.dtype)
    need_dtype(op, "gamma", gamma, x1.dtype)
    need(1 <= x1.dim() <= 8, op, "x1.dim()", x1.dim(), "1 to 8")
    need_shape(op, "x2", x2, x1.shape)
    _need_gamma(op, "x1", x1, gamma)
    _need_filled(op, x1=x1)
    x = x1.float() + x2.float()
    y, rstd = normed(x, gamma, epsilon)
    return y.to(x1.dtype), rstd, x.to(x1.dtype)


def npu_rotary_mul(input, r1, r2, rotary_mode="half", rotate=None):
    """input * r1 + turned(input) * r2: halves (-second, first), or in the mode interleave each pair (-second, first).

    Source: npu_rotary_mul page, the case jit_compile=False. Tables of another dtype than the input are not documented.
    """
    op = "npu_rotary_mul"
    need_one_of(op, "rotary_mode", rotary_mode, "half", "interleave")
    need_absent(op, "documented, but this stand-in has the two modes only", rotate=rotate)
    need_dtype(op, "input", input, *FLOATS)
    need_rank(op, "input", input, 3, 4)
    *sizes, width = input.shape
    need(width % 2 == 0 and width < 896, op, "input.shape[-1]", width, "an even number below 896")
    for name, table in (("r1", r1), ("r2", r2)):
        need_dtype(op, name, table, input.dtype)
        need_shape(op, name, table, r1.shape)
        need(not bool((table.abs() > 1).any()), op, name, "beyond 1", "numbers from -1 to 1")
    need(r1.dim() == input.dim() and r1.shape[-1] == width and _fits(sizes, r1.shape[:-1], rotary_mode), op, "r1.shape",
         list(r1.shape), f"for the mode {rotary_mode} one of the page's layouts for an input of {list(input.shape)}")
    x = input.float()
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


def _fits(sizes, table, mode):
    if len(sizes) == 3:
        return any(
            all(t == (s if same else 1) for s, t, same in zip(sizes, table, mask))
            and (sizes[b] * sizes[n] < 1000 if mode == "interleave" else max(sizes[b], sizes[n]) < 1000)
            for mask, b, n in (_HALF if mode == "half" else _INTERLEAVE)
        )
    tokens, heads = sizes
    return heads < 1000 and table[0] == tokens and (table[1] == 1 or (mode == "half" and table[1] == heads))


def npu_interleave_rope(x, cos, sin):
    """Pairs (0, 1), (2, 3) ... are rotated; the result has the first numbers of all pairs, then the second ones.

    Source: npu_interleave_rope page.
    """
    op = "npu_interleave_rope"
    need_dtype(op, "x", x, *HALVES)
    need_rank(op, "x", x, 4)
    need(x.shape[3] == 64, op, "x.shape[3]", x.shape[3], "64")
    need_dense(op, x=x, cos=cos, sin=sin)
    for name, table in (("cos", cos), ("sin", sin)):
        need_dtype(op, name, table, x.dtype)
        need_rank(op, name, table, 4)
        need_shape(op, name, table, [x.shape[0], 1, 1 if table.shape[2] == 1 else x.shape[2], 64])
    need_shape(op, "sin", sin, cos.shape)
    return rotated_halves(x, cos, sin).to(x.dtype)


def npu_swiglu(input, dim=-1):
    """a * sigmoid(a) * b, where a and b are the first and the second half of the input along dim.

    Source: npu_swiglu page.
    """
    op = "npu_swiglu"
    need_dtype(op, "input", input, *FLOATS)
    need(1 <= input.dim() <= 8, op, "input.dim()", input.dim(), "1 to 8")
    need(-input.dim() <= dim < input.dim(), op, "dim", dim, f"{-input.dim()} to {input.dim() - 1}")
    need(input.shape[dim] % 2 == 0, op, f"input.shape[{dim}]", input.shape[dim], "an even number")
    need_dense(op, input=input)
    _need_filled(op, input=input)
    return swiglu(*input.float().chunk(2, dim)).to(input.dtype)
