"""Schemes of few bits: how codes and scales say numbers, stated once for weights, activations and caches.

A number is its code times the scale of its block. In a logical form every part is a plain NumPy array: a code of 4 bits has a
byte of its own, and what NumPy has no dtype for (e4m3, e2m1, e8m0) is uint8 with the format's bits. A kernel packs as it likes.

Sources: OCP Microscaling Formats 1.0 (e2m1, e8m0, floor rule), OCP FP8 (e4m3), DeepSeek-V3 (blocks of 128 x 128 beside groups
of 1 x 128), FlashMLA and vllm-ascend (caches), compressed-tensors and NVIDIA ModelOpt (int4, NVFP4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from porthal.hal.dtypes import UNIT_ROUNDOFF, narrow, numpy_dtype
from porthal.hal.errors import UsageError
from porthal.hal.numerics import FLUSHED, SUMMED, U_ACC, Array, dot, may_round, nearest, single, unsettled

NONE = "none"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
TOP = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float4_e2m1fn": 6.0}  # where the largest of a block goes
HELD = {"int4": "int8", "float8_e4m3fn": "uint8", "float4_e2m1fn": "uint8", "float8_e8m0fnu": "uint8"}  # in a logical form
LEAST = 2.0**-9  # of a scale in e4m3
QUOTIENT = 4 * U_ACC  # how far off x / scale may be in float32, where it is not exact


@dataclass(frozen=True)
class Scheme:
    """How codes and scales say the numbers of a matrix, or of a cache's rows.

    codes   the dtype of a code
    block   rows and columns that share a scale, 0: all of them. What does not fill a last block has a scale all the same:
            576 rows in blocks of 128 have five rows of scales
    scale   its dtype. float8_e8m0fnu is a power of two; float8_e4m3fn is multiplied with one of float32 for the whole matrix,
            which is held for each row, so that matrices may be joined
    other   the scheme in which a product takes its other operand; "" as it is

    The scale of a block is its largest magnitude / TOP; in e8m0 the power of two by the floor rule; in e4m3 it is rounded
    once, and at least 2^-9. A code is number / scale rounded half to even, saturating. A block of zeros has codes of 0, and
    any finite scale. Stored codes may be any of their dtype, -128 and -8 among them. There is no zero point, and nothing is
    rotated.
    """

    name: str
    codes: str
    block: tuple[int, int]
    scale: str = "float32"
    other: str = ""

    def form(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the parts of an array of this shape, whose last two axes are the matrix."""
        rows, columns = (-(-n // b) if b else 1 for n, b in zip(shape[-2:], self.block))
        form = {"codes": (shape, HELD.get(self.codes, self.codes)), "scale": ((*shape[:-2], rows, columns), self._scale_held)}
        return form | ({"whole": (shape[:-1], "float32")} if self.scale == "float8_e4m3fn" else {})

    @property
    def _scale_held(self) -> str:
        return HELD.get(self.scale, self.scale)

    # -- codes -----------------------------------------------------------------------------------------------------------

    def decoded(self, codes: Array) -> Array:
        """The float64 that codes say, before they are scaled."""
        if self.codes.startswith("int"):
            return codes.astype(np.float64)
        return _table(self.codes)[codes]

    def coded(self, x: Array) -> Array:
        """The nearest codes, half to even, saturating; a NaN is coded as one where the format has any."""
        top = TOP[self.codes]
        if self.codes.startswith("int"):
            return np.clip(np.rint(np.nan_to_num(x)), -top - 1, top).astype(np.int8)
        if self.codes == "float8_e4m3fn":
            return narrow(np.clip(x, -top, top), self.codes).view(np.uint8)
        size, between = np.abs(x), (E2M1[1:] + E2M1[:-1]) / 2
        at = np.searchsorted(between, size)
        at += (at % 2 == 1) & (np.append(between, np.inf)[at] == size)
        return (at + 8 * np.signbit(x)).astype(np.uint8)

    def _grid(self, x: Array) -> Array:
        """x at its nearest codes; what is no number stays none."""
        if self.codes.startswith("int"):
            return np.clip(np.rint(x), -TOP[self.codes] - 1, TOP[self.codes])
        return self.decoded(self.coded(x))

    # -- scales ----------------------------------------------------------------------------------------------------------

    def scales(self, x: Array) -> dict[str, Array]:
        """The scales of an array, in float64 and not rounded but where the format leaves one answer."""
        amax = self._over_blocks(np.abs(x))
        if self.scale == "float8_e8m0fnu":
            _, exponent = np.frexp(amax)
            powers = np.where(amax > 0, exponent - 1 - int(np.log2(TOP[self.codes])), -127)
            return {"scale": np.ldexp(1.0, np.clip(powers, -127, 127))}
        if self.scale != "float8_e4m3fn":
            return {"scale": np.where(amax > 0, amax / TOP[self.codes], 1.0)}
        largest = amax.max((-2, -1), initial=0)[..., None]
        whole = narrow(np.where(largest > 0, largest / (TOP[self.codes] * 448), 1.0), "float32").astype(np.float64)
        block = np.clip(amax / (TOP[self.codes] * whole[..., None]), LEAST, 448)
        rows = np.broadcast_to(whole, x.shape[:-1])
        return {"scale": narrow(block, "float8_e4m3fn").astype(np.float64), "whole": rows}

    def _over_blocks(self, x: Array) -> Array:
        for axis, size in zip((-2, -1), self.block):
            if not size:
                x = x.max(axis, keepdims=True, initial=0)
            elif size > 1 and x.shape[axis]:
                x = np.maximum.reduceat(x, range(0, x.shape[axis], size), axis)
        return x

    def spread(self, scale: Array, shape: tuple[int, ...]) -> Array:
        """A scale for each number of an array of this shape, or what broadcasts to it."""
        for axis, size in zip((-2, -1), self.block):
            if size > 1:
                scale = np.repeat(scale, size, axis).take(np.arange(shape[axis]), axis)
        return scale

    def factors(self, parts: Mapping[str, Array], shape: tuple[int, ...]) -> Array:
        """What the codes of stored parts are multiplied with, in float64, spread over the shape."""
        scale = parts["scale"]
        if self.scale in HELD:
            scale = _table("float8_e4m3fn" if "whole" in parts else self.scale)[scale]
        scale = scale.astype(np.float64)
        if "whole" in parts:
            scale = scale * parts["whole"].astype(np.float64)[..., None]
        return self.spread(scale, shape)

    def stored(self, name: str, scale: Array) -> Array:
        """A part's scales as they are stored."""
        if name == "whole":
            return narrow(scale, "float32")
        if self.scale == "float8_e8m0fnu":
            return (np.frexp(scale)[1] + 126).astype(np.uint8)
        held = narrow(scale, self.scale)
        return held.view(np.uint8) if self.scale in HELD else held

    # -- whole arrays ----------------------------------------------------------------------------------------------------

    def quantised(self, x: Array) -> dict[str, Array]:
        """The parts of an array of two axes or more, in float64."""
        parts = {name: self.stored(name, scale) for name, scale in self.scales(x).items()}
        with np.errstate(invalid="ignore", divide="ignore"):
            return {"codes": self.coded(np.where(x == 0, x, x / self.factors(parts, x.shape))), **parts}

    def numbers(self, parts: Mapping[str, Array]) -> Array:
        """The float64 that parts say: exact."""
        codes = parts["codes"]
        with np.errstate(invalid="ignore"):
            return self.decoded(codes) * self.factors(parts, codes.shape)

    def rounded(self, x: Array) -> Array:
        """x as it is after it was quantised, along its last axis and a scale per row: what a product takes of it."""
        scale = self.scales(x[..., None, :])["scale"][..., 0, :]
        exact = self.scale == "float8_e8m0fnu"
        scale = scale if exact else single(scale)
        for_each = self.spread(scale[..., None, :], (*x.shape[:-1], 1, x.shape[-1]))[..., 0, :]
        with np.errstate(invalid="ignore"):
            off = unsettled(x)
            slack, beside = (0.0 if exact else QUOTIENT) + off, SUMMED * TOP[self.codes] if off else 0.0
            return nearest(x / for_each, self._grid, slack, beside) * for_each

    # -- what a chip may choose ------------------------------------------------------------------------------------------

    def misfit(self, x: Array, parts: Mapping[str, Array], slack: Array) -> tuple[str, tuple[int, ...], str] | None:
        """Where parts are not what these numbers give, each of which may be off by its slack: the part, the place, and why.

        A scale may be off by the rounding of its dtype and a little of float32's; where a number lies so near the middle
        between two codes that such errors decide, either is right. Where a scale is a power of two there is one answer.
        """
        empty = self._over_blocks(np.abs(x)) == 0
        low, expected, high = (self.scales(np.maximum(np.abs(x) + sign * slack, 0)) for sign in (-1, 0, 1))
        for name, wanted in expected.items():
            found = self._read(name, parts[name])
            kind = "float32" if name == "whole" else self.scale
            near = 0.0 if kind in HELD else UNIT_ROUNDOFF[kind] + QUOTIENT
            lowest = np.where(low[name] > wanted, 0.0, low[name])  # 1 stands for nothing
            tiny = 0.0 if kind in HELD else 2.0**-25 if kind == "float16" else FLUSHED
            good = (found >= lowest * (1 - near) - tiny) & (found <= high[name] * (1 + near) + tiny)
            good |= np.isfinite(found) & (empty if name == "scale" else empty.all((-2, -1))[..., None])
            if not good.all():
                at = tuple(int(i[0]) for i in np.nonzero(~good))
                return name, at, f"is {found[at]:.9g}, expected {wanted[at]:.9g}"
        factors, power = self.factors(parts, x.shape), np.frexp(self._read("scale", parts["scale"]))[0] == 0.5
        rough = np.where(power, 0.0, UNIT_ROUNDOFF["float16"] if self.scale == "float16" else QUOTIENT)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            exact, off = (np.where(v == 0, 0.0, v / factors) for v in (x, slack))
            off += np.abs(exact) * self.spread(rough, x.shape)
            said, least, most = self.decoded(parts["codes"]), self._grid(exact - off), self._grid(exact + off)
            good = ((said >= least) & (said <= most)) | (factors == 0)
        if good.all():
            return None
        at = tuple(int(i[0]) for i in np.nonzero(~good))
        return "codes", at, f"says {said[at]:g} for {exact[at]:.9g}, expected {self._grid(exact)[at]:g}"

    def _read(self, name: str, stored: Array) -> Array:
        kind = "float32" if name == "whole" else self.scale
        return _table(kind)[stored] if kind in HELD else stored.astype(np.float64)


@cache
def _table(codes: str) -> Array:
    """What each byte says."""
    if codes == "float4_e2m1fn":
        return np.tile(np.concatenate([E2M1, -E2M1]), 16)
    if codes == "float8_e8m0fnu":
        return np.append(np.ldexp(1.0, np.arange(-127, 128)), np.nan)
    return np.arange(256, dtype=np.uint8).view(numpy_dtype(codes)).astype(np.float64)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("int8_channel", "int8", (1, 0), other="int8_token"),
        Scheme("fp8_block", "float8_e4m3fn", (128, 128), other="fp8_group"),
        Scheme("int4_g128", "int4", (1, 128)),
        Scheme("int4_g32", "int4", (1, 32)),
        Scheme("mxfp4", "float4_e2m1fn", (1, 32), "float8_e8m0fnu"),
        Scheme("nvfp4", "float4_e2m1fn", (1, 16), "float8_e4m3fn"),
        Scheme("int8_token", "int8", (1, 0)),
        Scheme("fp8_group", "float8_e4m3fn", (1, 128)),
        Scheme("int8_keys", "int8", (1, 0), other="int8_token"),
        Scheme("int8_half_keys", "int8", (1, 0), "float16", other="int8_token"),
        Scheme("fp8_keys", "float8_e4m3fn", (1, 0), other="fp8_group"),
        Scheme("int8_latents", "int8", (1, 0)),
        Scheme("int8_tile_latents", "int8", (1, 128)),
        Scheme("fp8_latents", "float8_e4m3fn", (1, 128)),
    )
}
WEIGHTS = ("int8_channel", "fp8_block", "int4_g128", "int4_g32", "mxfp4", "nvfp4")
ACTIVATIONS = ("int8_token", "fp8_group", "mxfp4")
KEYS = ("int8_keys", "int8_half_keys", "fp8_keys")
LATENTS = ("int8_latents", "int8_tile_latents", "fp8_latents")


def scheme_of(name: str) -> Scheme:
    """The scheme of this name; UsageError where there is none."""
    if name not in SCHEMES:
        raise UsageError(f"scheme is {name!r}, expected {NONE} or one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


class Scaled:
    """Numbers under a scheme as references take them: `numbers` is float64. What is written to it is quantised.

    asked  of what was quantised here, the numbers that were: NaN elsewhere, as where codes were copied
    """

    def __init__(self, scheme: Scheme, parts: Mapping[str, Array], asked: Array | None = None) -> None:
        self.scheme, self.parts, self.asked = scheme, dict(parts), asked
        self.shape = self.parts["codes"].shape

    @classmethod
    def of(cls, scheme: Scheme, x: Array) -> Scaled:
        return cls(scheme, scheme.quantised(x), x)

    def __len__(self) -> int:
        return len(self.parts["codes"])

    def __getitem__(self, at: Any) -> Scaled:
        """Of the first axis, along which no block reaches: rows of a cache, or the matrices of experts."""
        return Scaled(self.scheme, {name: part[at] for name, part in self.parts.items()})

    def __setitem__(self, at: Any, value: Any) -> None:
        given = value if isinstance(value, Scaled) else Scaled.of(self.scheme, value)
        for name, part in given.parts.items():
            self.parts[name][at] = part
        if given.asked is not None:
            self.asked = np.full(self.shape, np.nan) if self.asked is None else self.asked
            self.asked[at] = given.asked

    def copy(self) -> Scaled:
        return Scaled(self.scheme, {name: part.copy() for name, part in self.parts.items()})

    @property
    def numbers(self) -> Array:
        return self.scheme.numbers(self.parts)

    def flushed(self, least: float) -> Scaled:
        """As read by a chip that takes a scale below the least for zero: the same object where none is."""
        changed = {
            name: np.where(np.abs(part) < least, part * 0, part) for name, part in self.parts.items() if part.dtype.kind == "f"
        }
        same = all((changed[name] == self.parts[name]).all() for name in changed)
        return self if same else Scaled(self.scheme, self.parts | changed, self.asked)


def sides(x: Array, w: Any) -> tuple[Array, Array]:
    """The operands of a product as the scheme of w takes them. Where x stays as it is, w is dequantised, which may round to
    the dtype of x; else both are multiplied as codes, and scaled in float32."""
    if not isinstance(w, Scaled):
        return x, w
    if w.scheme.other:
        return SCHEMES[w.scheme.other].rounded(x), w.numbers
    return x, may_round("dequantised", w.numbers, to="x")


def product(subscripts: str, x: Array, w: Any) -> Array:
    """`dot` of x with a weight, or with rows of a cache, under any scheme."""
    return dot(subscripts, *sides(x, w))
