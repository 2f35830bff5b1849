"""Codes and scales as tensors: numbers in float32, where they are used."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.hal import ANY_SCHEME, Pages, Quantised, QuantisedSpec, Scheme, Weight, limits, scheme_of
from porthal.hal.scheme import TOP


class Coded(NamedTuple):
    """Rows of numbers under a scheme; `index_select` gives those asked for, in float32."""

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    whole: Tensor | None = None

    @classmethod
    def cached(cls, pages: Pages) -> Coded:
        """The quantised field of a cache."""
        assert pages.spec.quantised
        name, scheme = pages.spec.quantised
        return cls(scheme, pages[name], pages[f"{name}_scale"])

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def index_select(self, axis: int, at: Tensor) -> Tensor:
        return Coded(self.scheme, *(x.index_select(axis, at) for x in (self.codes, self.scale))).numbers()

    def view(self, *sizes: int) -> Coded:
        return Coded(self.scheme, *(x.view(*sizes, -1) for x in (self.codes, self.scale)))

    def numbers(self) -> Tensor:
        scale = _said(self.scheme.scale, self.scale)
        if self.whole is not None:
            scale = scale * self.whole[..., None]
        return _said(self.scheme.codes, self.codes) * _spread(self.scheme, scale, self.codes.shape)


def _said(kind: str, codes: Tensor) -> Tensor:
    """float32 of what a logical form holds."""
    if kind == "float8_e4m3fn":
        return codes.view(torch.float8_e4m3fn).float()
    if kind == "float8_e8m0fnu":
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - 127)
    if kind == "float4_e2m1fn":
        exponent, odd = codes.int() >> 1 & 3, (codes & 1).float()
        size = torch.where(exponent == 0, odd / 2, torch.ldexp(1 + odd / 2, exponent - 1))
        return torch.where(codes > 7, -size, size)
    return codes.float()


def _spread(scheme: Scheme, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale for each number, or what broadcasts to it."""
    for axis, size in zip((-2, -1), scheme.block):
        if size > 1:
            scale = scale.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return scale


# -- products --------------------------------------------------------------------------------------------------------


def product(x: Tensor, w: Weight, dtype: torch.dtype, room: int) -> Tensor:
    """x times a weight [out, in], whose numbers take about so many bytes at a time."""
    scheme, held = scheme_of(w.spec.scheme), w.native
    high = scheme.block[0] or 1
    wide, step = taken(scheme, x), max(1, room // (4 * w.spec.shape[1] * high)) * high
    found = []
    for start in range(0, w.spec.shape[0], step):
        scale = held["scale"][start // high : (start + step) // high]
        whole = held["whole"][start : start + step] if "whole" in held else None
        part = Coded(scheme, held["codes"][start : start + step], scale, whole)
        found.append(F.linear(wide, part.numbers()).to(dtype))
    return torch.cat(found, dim=-1)


def by_head(x: Tensor, w: Weight) -> Tensor:
    """x [rows, heads, in] times the numbers of w[head], in the dtype of x."""
    heads = taken(scheme_of(w.spec.scheme), x).unbind(1)
    return torch.stack([F.linear(head, _matrix(w, n)) for n, head in enumerate(heads)], dim=1).to(x.dtype)


def _matrix(w: Weight, e: int) -> Tensor:
    """float32 numbers of one matrix of a weight [E, out, in]."""
    return Coded(scheme_of(w.spec.scheme), **{name: part[e] for name, part in w.native.items()}).numbers()


def by_expert(x: Tensor, w: Weight, counts: list[int]) -> Tensor:
    """Rows by expert times the numbers of w[e], in the dtype of x; rows behind the last expert's are zero."""
    rows = taken(scheme_of(w.spec.scheme), x).split([*counts, x.shape[0] - sum(counts)])
    made = [F.linear(part, _matrix(w, e)) for e, part in enumerate(rows[:-1]) if len(part)]
    return torch.cat([*made, x.new_zeros((len(rows[-1]), w.spec.shape[1]), dtype=torch.float32)]).to(x.dtype)


def taken(scheme: Scheme, x: Tensor) -> Tensor:
    """What a product with an operand under this scheme takes of x, float32."""
    if not scheme.other:
        return x.float()
    other = scheme_of(scheme.other)
    return Coded(other, **quantised(other, x)).numbers()


# -- quantising ------------------------------------------------------------------------------------------------------


def quantised(scheme: Scheme, x: Tensor) -> dict[str, Tensor]:
    """Codes and scales of rows, each by itself."""
    wide, columns = x.float(), scheme.block[1] or max(x.shape[-1], 1)
    blocks = F.pad(wide, (0, -wide.shape[-1] % columns)).unflatten(-1, (-1, columns))
    amax, top = blocks.abs().amax(-1), TOP[scheme.codes]
    if scheme.scale == "float8_e8m0fnu":
        held = (torch.frexp(amax).exponent - 1 - 2 + 127).clamp(0, 254).where(amax > 0, torch.zeros_like(amax)).to(torch.uint8)
        scale = _said(scheme.scale, held)
    else:
        scale = torch.where(amax > 0, amax / top, 1.0)
        held = scale = scale.half() if scheme.scale == "float16" else scale
    ratio = (blocks / scale.float()[..., None]).flatten(-2)[..., : wide.shape[-1]]
    ratio = torch.where(wide == 0, wide, ratio).clamp(-top - (scheme.codes == "int8"), top)
    return {"codes": _code(scheme.codes, ratio), "scale": held}


def stored(pages: Pages, name: str, rows: Tensor) -> dict[str, Tensor]:
    """Rows as the cache holds those of a field: themselves, or their codes and scales, by the names of the parts."""
    if not pages.spec.quantised or name != pages.spec.quantised[0]:
        return {name: rows}
    held = quantised(pages.spec.quantised[1], rows)
    return {name: held["codes"], f"{name}_scale": held["scale"]}


def coded_rows(pages: Pages, name: str, slots: Tensor, rows: Tensor) -> Tensor:
    """Rows as the field of a cache holds them: where it holds codes, these, and the scales are written."""
    held = stored(pages, name, rows)
    if (scale := f"{name}_scale") in held:
        pages[scale].index_copy_(0, slots, held[scale])
    return held[name]


def _code(kind: str, ratio: Tensor) -> Tensor:
    if kind == "int8":
        return ratio.round().to(torch.int8)
    if kind == "float8_e4m3fn":
        return ratio.to(torch.float8_e4m3fn).view(torch.uint8)
    exponent = (torch.frexp(ratio).exponent - 1).clamp(0, 2)  # of e2m1; codes go by twos from one exponent to the next
    at = torch.ldexp(ratio.abs(), 1 - exponent).round() + 2 * exponent
    return (at + 8 * torch.signbit(ratio)).to(torch.uint8)


class Quantising:
    """The kernels that quantise activations, and back."""

    def quantize(self, x: Tensor, *, scheme: str) -> Quantised:
        return Quantised(QuantisedSpec(tuple(x.shape), scheme), quantised(scheme_of(scheme), x))

    @limits(schemes=ANY_SCHEME)
    def dequantize(self, q: Quantised, *, out: str) -> Tensor:
        return Coded(scheme_of(q.spec.scheme), **q.native).numbers().to(getattr(torch, out))
