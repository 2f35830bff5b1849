"""Quantised matrices as packers publish them: which tensors stand for one, and which numbers they say.

A matrix is known by the tensors that it has, by their dtypes and shapes, and never by a format's name: packers write
different things under one name. Codes times scale is exact here and is rounded once, to the dtype that is asked for; a
product of two scales is rounded to float32 first, as the packers' own readers do.

Sources: compressed-tensors 0.20.0, nvidia-modelopt 0.47.0 and torchao 0.18.0, by what they write; AscendV1 1.0.0 of
msModelSlim, from its description and its saver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from porthal.hal import UsageError, widen
from porthal.hal.scheme import NONE

Array = np.ndarray[Any, Any]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8, FP4, E8M0 = "float8_e4m3fn", "float4_e2m1fn", ("uint8", "float8_e8m0fnu")
FLOAT_SCALES = ("float32", "bfloat16", "float16")
# Of the activations' own quantisation, which a matrix of plain numbers does without.
ACTIVATIONS = ("input_scale", "input_global_scale", "input_offset", "quant_bias", "scale_bias", "output_scale")
# The schemes of calls by codes and block; where the scale is one of e8m0, or of e4m3 under another, the block says so.
CALLS = {
    ("int8", (1, 0)): "int8_channel",
    (FP8, (128, 128)): "fp8_block",
    ("int4", (1, 128)): "int4_g128",
    ("int4", (1, 32)): "int4_g32",
    (FP4, (1, 32)): "mxfp4",
    (FP4, (1, 16)): "nvfp4",
}
PARTS = (
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_offset", "weight_shape", "pre_quant_scale", "deq_scale", *ACTIVATIONS),
)
# How torchao spells parts: NAME.weight is NAME._weight_qdata and so on, and the file's metadata says under NAME.weight of
# which class it is. Those of other classes than these have codes in an order of some kernel.
TORCHAO = {
    **{"weight": "qdata", "weight_scale": "scale", "weight_scale_2": "per_tensor_scale"},
    **{"weight_zero_point": "zero_point", "pre_quant_scale": "act_pre_scale"},
}
TORCHAO_CLASSES = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "NVFP4Tensor", "MXTensor")
TILE = (32, 4, 4)  # scales of 128 rows and 4 columns, as tensor cores of Blackwell take them: row % 32, row // 32, column


class Tensors(Protocol):
    """The tensors that stand beside one another for a matrix."""

    def __contains__(self, part: str) -> bool: ...

    def dtype(self, part: str) -> str: ...

    def shape(self, part: str) -> tuple[int, ...]: ...

    def array(self, part: str) -> Array:
        """The tensor, from the file."""

    def wrong(self, part: str, what: str) -> UsageError:
        """The error that says what is wrong with one of them: "has ..., expected ...\""""


@dataclass(frozen=True)
class Scheme:
    """How codes and scales say the numbers of a matrix.

    codes   of one number: int1 to int8, float4_e2m1fn, float8_e4m3fn
    block   rows and columns that share a scale; 0: all of them
    scale   the scale's dtype; float8_e4m3fn is multiplied with another of float32 for the whole matrix
    """

    codes: str
    block: tuple[int, int]
    scale: str

    def __str__(self) -> str:
        rows, columns = (str(n) if n else "all" for n in self.block)
        return f"{self.codes} with a scale of {self.scale} for {rows} x {columns}"


def scheme(tensors: Tensors, shape: tuple[int, int], block: tuple[int, int]) -> Scheme:
    """That of a matrix [rows, columns]; `block` is the config's, for scales of blocks. UsageError where it is none."""
    main = "weight_packed" if "weight_packed" in tensors else "weight"
    codes, name = _codes(tensors, main, shape), _scales(tensors)
    high, wide = shape
    scale = tensors.dtype(name)
    if codes == FP4 and scale == FP8:
        if not ("weight_scale_2" in tensors or "weight_global_scale" in tensors):
            raise tensors.wrong(name, "has neither weight_scale_2 nor weight_global_scale beside it, expected one of them")
        options = {(high, -(-wide // 16)): (1, 16)}
    elif codes in (FP4, FP8) and scale in E8M0:
        scale, options = E8M0[1], {(high, -(-wide // 32)): (1, 32)}
    elif codes == FP4 or scale not in (*FLOAT_SCALES, "int64"):
        expected = (FP8, *E8M0) if codes == FP4 else FLOAT_SCALES
        raise tensors.wrong(name, f"is {scale}, expected one of {', '.join(expected)} beside codes of {codes}")
    elif codes == FP8:
        options = {(-(-high // block[0]), -(-wide // block[1])): block, (1, 1): (0, 0), (high, 1): (1, 0)}
    else:
        held = _two(tensors.shape(name)) or (0, 0)
        whole = held[1] > 1 and wide % held[1] == 0
        options = {(1, 1): (0, 0), (high, 1): (1, 0)} | ({(high, held[1]): (1, wide // held[1])} if whole else {})
    return Scheme(codes, _blocks(tensors, name, options), "float32" if scale == "int64" else scale)


def values(tensors: Tensors, shape: tuple[int, int], block: tuple[int, int], rows: slice) -> Array:
    """Rows of the matrix in float64. UsageError for scales that are no numbers above 0, and for codes that are NaN."""
    found = scheme(tensors, shape, block)
    start, stop, _ = rows.indices(shape[0])
    numbers = _unpacked(tensors, found, shape, start, stop)
    if "weight_zero_point" in tensors or "weight_offset" in tensors:
        numbers = numbers - _spread(_zeros(tensors, found), found.block, start, stop, shape[1])
    factors = _factors(tensors, found)
    result: Array = numbers * _spread(factors, found.block, start, stop, shape[1])
    if "pre_quant_scale" in tensors:
        result *= _positive(tensors, "pre_quant_scale", _shaped(tensors, "pre_quant_scale", (shape[1],)))
    return result


def kept(tensors: Tensors, found: Scheme, shape: tuple[int, int]) -> str:
    """The scheme of calls that takes these codes and scales as they are, or "none". Of blocks as large as the matrix nobody
    can say whether they are all of it."""
    if any(part in tensors for part in ("pre_quant_scale", "deq_scale", "weight_global_scale")):
        return NONE
    if ("weight_zero_point" in tensors or "weight_offset" in tensors) and _zeros(tensors, found).any():
        return NONE
    if found.codes == FP8 and found.scale == E8M0[1]:
        return NONE
    alike = (name for (codes, block), name in CALLS.items() if codes == found.codes and _alike(block, found.block, shape))
    return next(alike, NONE)


def in_rows(tiles: Array, rows: int, columns: int) -> Array | None:
    """Scales [rows, columns] that are stored in tiles, of which the last may be padded; None where these are not so many."""
    high, wide = -(-rows // 128), -(-columns // 4)
    if tiles.size != high * wide * 512:
        return None
    found: Array = tiles.reshape(high, wide, *TILE).transpose(0, 3, 2, 1, 4).reshape(high * 128, wide * 4)
    return found[:rows, :columns]


def _alike(one: tuple[int, int], other: tuple[int, int], shape: tuple[int, int]) -> bool:
    return all(min(a or n, n) == min(b or n, n) for a, b, n in zip(one, other, shape))


def parts(tensors: Tensors, shape: tuple[int, int], block: tuple[int, int]) -> dict[str, Array]:
    """Codes and scales as kernels take them, where `kept` names a scheme: see `porthal.hal.Scheme.form`."""
    found = scheme(tensors, shape, block)
    name = _scales(tensors)
    scale = tensors.array(name).reshape(_two(tensors.shape(name)) or ())
    if found.scale == E8M0[1] or found.scale == FP8:
        _factors(tensors, found)  # refuses what is no number
        scale = scale.view(np.uint8)
    else:
        scale = _positive(tensors, name, scale).astype(np.float32)
    whole = {"whole": np.full(shape[0], _whole(tensors, "weight_scale_2"), np.float32)} if "weight_scale_2" in tensors else {}
    return {"codes": _held(tensors, found, shape), "scale": scale, **whole}


def _held(tensors: Tensors, found: Scheme, shape: tuple[int, int]) -> Array:
    """Codes, one a byte."""
    if found.codes == FP4:
        bytes_ = tensors.array("weight_packed" if "weight_packed" in tensors else "weight")
        return np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(shape)
    if found.codes == "int4":
        return _unpacked(tensors, found, shape, 0, shape[0]).astype(np.int8)
    codes = np.asarray(tensors.array("weight"))
    if found.codes == FP8:
        codes = codes.view(np.uint8)
        if ((codes & 127) == 127).any():
            raise tensors.wrong("weight", "holds codes that are NaN, expected finite numbers")
    return codes


# -- which scheme ----------------------------------------------------------------------------------------------------------


def _codes(tensors: Tensors, main: str, shape: tuple[int, int]) -> str:
    high, wide = shape
    kind, held = tensors.dtype(main), tensors.shape(main)
    if kind == FP8 and held == shape:
        return FP8
    if kind == "int8" and held == shape:
        return "int8"
    if kind in ("int8", "uint8") and held == (high // 2, wide) and high % 2 == 0 and main == "weight":
        return "int4"  # pairs of rows in one byte
    if kind == "uint8" and held == (high, wide // 2) and wide % 2 == 0:
        return FP4
    if kind == "int32" and main == "weight_packed" and len(held) == 2 and held[0] == high:
        for bits in range(1, 9):
            if held[1] == -(-wide * bits // 32):
                return f"int{bits}"
    raise tensors.wrong(main, f"is {kind} {list(held)}, which holds the codes of a matrix {list(shape)} in no known way")


def _scales(tensors: Tensors) -> str:
    named = [name for name in ("weight_scale_inv", "weight_scale", "deq_scale") if name in tensors]
    if "weight_scale" in named and "deq_scale" in named:  # AscendV1's mix of both: the weight's own is more exact
        named.remove("deq_scale")
    if len(named) != 1:
        raise tensors.wrong("weight", f"has {' and '.join(named) or 'no scale'} beside it, expected one scale")
    return named[0]


def _blocks(tensors: Tensors, name: str, options: Mapping[tuple[int, int], tuple[int, int]]) -> tuple[int, int]:
    """The block of a scale of one of these shapes."""
    held = _two(tensors.shape(name))
    if held is None or held not in options:
        expected = " or ".join(str(list(shape)) for shape in options)
        raise tensors.wrong(name, f"has shape {list(tensors.shape(name))}, expected {expected}")
    return options[held]


def _two(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """A scale's shape as rows and columns: [], [n], [n, m] or [n, 1, m, 1]."""
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        return shape[0], shape[2]
    return {0: (1, 1), 1: (*shape, 1), 2: shape}.get(len(shape))  # type: ignore[return-value]


# -- which numbers ---------------------------------------------------------------------------------------------------------


def _unpacked(tensors: Tensors, scheme: Scheme, shape: tuple[int, int], start: int, stop: int) -> Array:
    if "weight_packed" in tensors and scheme.codes.startswith("int"):
        bits = int(scheme.codes[3:])
        if (said := tuple(map(int, _shaped(tensors, "weight_shape", (2,), "int64", "int32")))) != shape:
            raise tensors.wrong("weight_shape", f"holds {list(said)}, expected {list(shape)}")
        return _stream(tensors.array("weight_packed")[start:stop], bits, shape[1])
    if scheme.codes == FP4:
        bytes_ = tensors.array("weight_packed" if "weight_packed" in tensors else "weight")[start:stop]
        return E2M1[np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(len(bytes_), shape[1])]
    codes = tensors.array("weight")
    if scheme.codes == "int4":
        pairs = codes[start // 2 : -(-stop // 2)].view(np.int8)
        both = np.stack([np.left_shift(pairs, 4) >> 4, pairs >> 4], axis=1).reshape(-1, shape[1])
        return both[start % 2 :][: stop - start].astype(np.float64)
    return widen(np.array(codes[start:stop])).astype(np.float64, copy=False)


def _stream(words: Array, bits: int, count: int) -> Array:
    """Signed numbers of so many bits, one behind the other in each row's words, the lowest bits first."""
    ones = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little", count=count * bits)
    weights = 2.0 ** np.arange(bits)
    found: Array = ones.reshape(len(words), count, bits) @ weights - 2.0 ** (bits - 1)
    return found


def _zeros(tensors: Tensors, scheme: Scheme) -> Array:
    """The number among the codes that says 0, of each scale. UsageError where no code can be that."""
    sizes = _two(tensors.shape(_scales(tensors)))
    assert sizes
    name = "weight_offset" if "weight_offset" in tensors else "weight_zero_point"
    if "weight_offset" in tensors and "weight_zero_point" in tensors:
        raise tensors.wrong(name, "has weight_zero_point beside it, expected one of them")
    if not scheme.codes.startswith("int"):  # msModelSlim writes offsets of 0 beside FP8
        if name == "weight_offset" and not (found := np.array(_shaped(tensors, name, sizes))).any():
            return found
        raise tensors.wrong(name, f"stands beside codes of {scheme.codes}, expected none: their zero is 0")
    bits = int(scheme.codes[3:])
    if "weight_packed" in tensors and name == "weight_zero_point":  # packed along the rows of the matrix
        words = _shaped(tensors, name, (-(-sizes[0] * bits // 32), sizes[1]), "int32")
        return _stream(np.ascontiguousarray(words.T), bits, sizes[0]).T
    found = widen(np.array(_shaped(tensors, name, sizes))).astype(np.float64).reshape(sizes)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if (wrong := ~((low <= found) & (found <= high))).any():
        raise tensors.wrong(name, f"holds {found[wrong].flat[0]}, expected {low} to {high}, as codes of {scheme.codes} are")
    return found


def _factors(tensors: Tensors, scheme: Scheme) -> Array:
    """The scales as rows and columns, float64."""
    name = _scales(tensors)
    stored = tensors.array(name)
    if scheme.scale == E8M0[1]:
        powers = stored.view(np.uint8).astype(np.int32)
        if (powers == 255).any():
            raise tensors.wrong(name, "holds 255, which is NaN, expected powers of two")
        return np.ldexp(1.0, powers - 127)
    sizes = _two(stored.shape)
    assert sizes
    if stored.dtype == np.int64:  # the bits of a float32
        stored = stored.astype(np.uint32).view(np.float32)
    found = _positive(tensors, name, stored).reshape(sizes)
    if scheme.scale == FP8:
        divides = "weight_global_scale" in tensors
        whole = _whole(tensors, "weight_global_scale" if divides else "weight_scale_2")
        with np.errstate(over="ignore"):
            product = (found / whole if divides else found * whole).astype(np.float32)
        return _positive(tensors, name, product)
    if name == "deq_scale":
        scale = _whole(tensors, "input_scale")
        _unbiased(tensors)
        return found / scale
    return found


def _unbiased(tensors: Tensors) -> None:
    """UsageError where AscendV1's quant_bias is more than the correction for the activations' offset: nothing adds it here."""
    if not ("quant_bias" in tensors and "input_offset" in tensors):
        return
    sums = tensors.array("weight").sum(axis=1, dtype=np.int64)
    offset, bias = tensors.array("input_offset").reshape(-1), tensors.array("quant_bias").reshape(-1)
    for name, held, count in (("input_offset", offset, 1), ("quant_bias", bias, len(sums))):
        if held.size != count:
            raise tensors.wrong(name, f"has shape {list(tensors.shape(name))}, expected [{count}]")
    correction = sums * float(offset[0])
    if not (np.abs(bias + correction) <= 0.5 + np.abs(correction) * 2.0**-22).all():
        raise tensors.wrong("quant_bias", "holds a bias, expected the correction for input_offset alone")


def _whole(tensors: Tensors, name: str) -> float:
    if name not in tensors:
        raise tensors.wrong("weight", f"has no {name} beside it")
    scale = tensors.array(name)
    if scale.size != 1:
        raise tensors.wrong(name, f"has shape {list(scale.shape)}, expected one number")
    return float(_positive(tensors, name, scale).reshape(-1)[0])


def _shaped(tensors: Tensors, name: str, shape: tuple[int, ...], *kinds: str) -> Array:
    """A tensor of this shape, and of one of these dtypes if there are any."""
    if name not in tensors:
        raise tensors.wrong("weight_packed", f"has no {name} beside it")
    if tensors.shape(name) != shape:
        raise tensors.wrong(name, f"has shape {list(tensors.shape(name))}, expected {list(shape)}")
    if kinds and tensors.dtype(name) not in kinds:
        raise tensors.wrong(name, f"is {tensors.dtype(name)}, expected {' or '.join(kinds)}")
    return tensors.array(name)


def _positive(tensors: Tensors, name: str, scale: Array) -> Array:
    factors = widen(np.array(scale)).astype(np.float64)
    if (wrong := ~(np.isfinite(factors) & (factors > 0))).any():
        why = ": its packer may have divided by a layer of zeros" if not np.isfinite(factors[wrong][0]) else ""
        raise tensors.wrong(name, f"holds {factors[wrong].flat[0]}, expected finite numbers above 0{why}")
    return factors


def _spread(scale: Array, block: tuple[int, int], start: int, stop: int, wide: int) -> Array:
    """A scale for each number of the rows start to stop, or what broadcasts to that."""
    rows, columns = block
    part = scale[np.arange(start, stop) // rows] if rows else scale
    return np.repeat(part, columns, axis=1)[:, :wide] if columns else part
