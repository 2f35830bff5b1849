"""DeepGEMM as MATE ships it for Moore Threads: products of rows sorted by expert, in bfloat16 and in float8."""

import math

import torch

from porthal.backends.torch.emulation.stand_in import (
    need,
    need_absent,
    need_dense,
    need_dtype,
    need_one_of,
    need_rank,
    need_shape,
)

_HALVES = (torch.bfloat16, torch.float16)
_EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)


def get_mk_alignment_for_contiguous_layout():
    """256. The contiguous products themselves take 128 too, which is their default."""
    return 256


def _need_last(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        need(tensor.stride(-1) == 1, op, f"{name}.stride(-1)", tensor.stride(-1), "1")


def _need_int32(op: str, name: str, tensor: torch.Tensor, length: int) -> None:
    need_dtype(op, name, tensor, torch.int32)
    need_shape(op, name, tensor, [length])
    need_dense(op, **{name: tensor})


def _contiguous(op: str, a, b, d, m_indices, alignment_m: int) -> None:
    """d[r] = b[m_indices[r]] a[r]; a tile of alignment_m rows has one expert, and its rows of -1 are left undefined."""
    need_one_of(op, "alignment_m", alignment_m, 128, 256)
    rows, experts = len(a), len(b)
    need(rows % alignment_m == 0, op, "a.shape[0]", rows, f"a multiple of alignment_m, {alignment_m}")
    for first in range(0, rows, alignment_m):
        tile = m_indices[first : first + alignment_m].long()
        here = tile >= 0
        need(bool((tile < experts).all()), op, "m_indices", int(tile.max()), f"-1 to {experts - 1}")
        need(bool((tile[here] == tile[0]).all()), op, "m_indices", sorted(set(tile.tolist())),
             f"one expert in rows {first} to {first + alignment_m - 1}, which start at its first row")
        if here.any():
            y = a[first : first + alignment_m] @ b[tile[0]].T
            d[first : first + alignment_m] = torch.where(here[:, None], y, math.nan).to(d.dtype)


def _masked(op: str, a, b, d, masked_m) -> None:
    """d[e, :masked_m[e]] = a[e] b[e]^T; the rows behind are left undefined."""
    for e, count in enumerate(masked_m.tolist()):
        need(0 <= count <= a.shape[1], op, f"masked_m[{e}]", count, f"0 to {a.shape[1]}")
        d[e, :count] = (a[e, :count] @ b[e].T).to(d.dtype)
        d[e, count:] = math.nan


def _need_16bit(op: str, a, b, d, rank: int) -> None:
    for name, tensor, dims in (("a", a, rank), ("b", b, 3), ("d", d, rank)):
        need_rank(op, name, tensor, dims)
    need_dtype(op, "a", a, *_HALVES)
    need_dtype(op, "b", b, a.dtype)
    need_dtype(op, "d", d, a.dtype)
    _need_last(op, a=a, b=b)
    need_dense(op, d=d)
    need_shape(op, "b", b, [*b.shape[:2], a.shape[-1]])
    need_shape(op, "d", d, [*a.shape[:-1], b.shape[1]])


def m_grouped_bf16_gemm_nt_contiguous(a, b, d, m_indices, alignment_m=128):
    """d[M, n] of a[M, k], b[E, n, k] and the expert of each row, -1 in padding."""
    op = "m_grouped_bf16_gemm_nt_contiguous"
    _need_16bit(op, a, b, d, 2)
    _need_int32(op, "m_indices", m_indices, len(a))
    _contiguous(op, a.float(), b.float(), d, m_indices, alignment_m)


def m_grouped_bf16_gemm_nt_masked(a, b, d, masked_m, expected_m, compiled_dims="nk", enable_overlap=False, signal=None):
    """d[E, m, n] of a[E, m, k] and b[E, n, k], the first masked_m[e] rows of each expert."""
    op = "m_grouped_bf16_gemm_nt_masked"
    _need_16bit(op, a, b, d, 3)
    need(len(b) == len(a), op, "b.shape[0]", len(b), str(len(a)))
    _need_int32(op, "masked_m", masked_m, len(a))
    _need_no_overlap(op, enable_overlap, signal)
    _masked(op, a.float(), b.float(), d, masked_m)


def _need_no_overlap(op: str, enable_overlap: bool, signal: torch.Tensor | None) -> None:
    need(not enable_overlap, op, "enable_overlap", enable_overlap, "False (this stand-in signals nothing)")
    need_absent(op, "without enable_overlap it is not read", signal=signal)


def _scaled(op: str, name: str, pair, tall: int):
    """float32 of codes [..., r, k] and scales [..., ceil(r / tall), ceil(k / 128)]."""
    need(isinstance(pair, tuple) and len(pair) == 2, op, name, type(pair).__name__, "codes and scales, a tuple of two")
    codes, scales = pair
    need_dtype(op, f"{name}[0]", codes, *_EIGHTS)
    need_dtype(op, f"{name}[1]", scales, torch.float32)
    _need_last(op, **{f"{name}[0]": codes})
    need_dense(op, **{f"{name}[1]": scales})
    *lead, rows, width = codes.shape
    need_shape(op, f"{name}[1]", scales, [*lead, -(-rows // tall), -(-width // 128)])
    spread = scales.repeat_interleave(tall, -2)[..., :rows, :].repeat_interleave(128, -1)[..., :width]
    return codes.float() * spread


def _need_8bit(op: str, a, b, d, recipe, disable_ue8m0_cast: bool, rank: int):
    need(recipe in (None, (1, 128, 128)), op, "recipe", recipe, "None or (1, 128, 128)")
    need(disable_ue8m0_cast, op, "disable_ue8m0_cast", disable_ue8m0_cast, "True: the cast is not supported")
    wide_a, wide_b = _scaled(op, "a", a, 1), _scaled(op, "b", b, 128)
    need_rank(op, "a[0]", wide_a, rank)
    need_rank(op, "d", d, rank)
    need_dtype(op, "d", d, *_HALVES)
    need(wide_b.shape[-1] == wide_a.shape[-1], op, "b[0].shape[-1]", wide_b.shape[-1], str(wide_a.shape[-1]))
    need_shape(op, "d", d, [*wide_a.shape[:-1], wide_b.shape[-2]])
    need_dense(op, d=d)
    return wide_a, wide_b


def m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices, recipe=None, compiled_dims="nk", disable_ue8m0_cast=True,
                                     alignment_m=128):
    """The same in float8: a scale for 128 of a row of `a`, and for 128 x 128 of `b`."""
    op = "m_grouped_fp8_gemm_nt_contiguous"
    wide_a, wide_b = _need_8bit(op, a, b, d, recipe, disable_ue8m0_cast, 2)
    need_rank(op, "b[0]", wide_b, 3)
    _need_int32(op, "m_indices", m_indices, len(wide_a))
    _contiguous(op, wide_a, wide_b, d, m_indices, alignment_m)


def m_grouped_fp8_gemm_nt_masked(a, b, d, masked_m, expected_m, recipe=None, compiled_dims="nk", disable_ue8m0_cast=True,
                                 enable_overlap=False, signal=None):
    op = "m_grouped_fp8_gemm_nt_masked"
    wide_a, wide_b = _need_8bit(op, a, b, d, recipe, disable_ue8m0_cast, 3)
    need_rank(op, "b[0]", wide_b, 3)
    need(len(wide_b) == len(wide_a), op, "b[0].shape[0]", len(wide_b), str(len(wide_a)))
    _need_int32(op, "masked_m", masked_m, len(wide_a))
    _need_no_overlap(op, enable_overlap, signal)
    _masked(op, wide_a, wide_b, d, masked_m)


def fp8_gemm_nt(a, b, d, c=None, recipe=None, compiled_dims="nk", disable_ue8m0_cast=True):
    """d[m, n] = a[m, k] b[n, k]^T in float8, with the scales of the grouped ones."""
    op = "fp8_gemm_nt"
    need_absent(op, "a product cannot be added to", c=c)
    wide_a, wide_b = _need_8bit(op, a, b, d, recipe, disable_ue8m0_cast, 2)
    need_rank(op, "b[0]", wide_b, 2)
    d.copy_(wide_a @ wide_b.T)
    return d


def bf16_gemm_nt(a, b, d, c=None, compiled_dims="nk"):
    """d[m, n] = a[m, k] b[n, k]^T + c, where c and d are float32, or d alone is bfloat16."""
    op = "bf16_gemm_nt"
    for name, tensor in (("a", a), ("b", b), ("d", d)):
        need_rank(op, name, tensor, 2)
    need_dtype(op, "a", a, torch.bfloat16)
    need_dtype(op, "b", b, torch.bfloat16)
    need_dtype(op, "d", d, torch.bfloat16, torch.float32)
    need_shape(op, "b", b, [len(b), a.shape[1]])
    need_shape(op, "d", d, [len(a), len(b)])
    y = a.float() @ b.float().T
    if c is not None:
        need_dtype(op, "c", c, torch.float32)
        need_dtype(op, "d", d, torch.float32)
        need_shape(op, "c", c, list(d.shape))
        y = y + c
    d.copy_(y)
