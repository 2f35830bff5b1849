import numpy as np

from porthal.hal import FLOATS, Batch, contract
from porthal.hal.numerics import Array, elementary, single
from porthal.hal.spans import THETA


@contract(
    "x[T, N, D], batch: Batch[T] -> y[T, N, D]",
    dtypes={"x": FLOATS, "y": "x"},
    cost=lambda d, b: (6 * d.T * d.N * d.width, d.T * d.N * d.D * (b.x + b.y)),
    independent=("T", "N"),
    cases={
        "N": (64, 1, 32),
        "D": (256, 128, 64),
        "theta": (1e6, 1e4),
        "layout": ("interleaved", "half"),
        "start": (192, 0, 3),
        "width": (64, 8, 128),
    },
    legal={
        "theta": THETA,
        "layout": ("interleaved", "half"),
        "width": lambda f: range(2, f.D + 1, 2),
        "start": lambda f: range(f.D - f.width + 1),
    },
    values={"x": ("normal", "seesaw", "signed")},
)
def rope(x: Array, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Array:
    """Rotate x[..., start : start+width] by the row's position p: pair i is rotated by p * theta^(-2i/width).

    "interleaved" pairs elements (2i, 2i+1), "half" pairs (i, i + width/2); the result keeps the layout of the input, and
    elements outside the slice are copied. Angles and rotation are float32 or better. Source: Su et al. 2021; GLM-5 uses
    "interleaved" in MLA (slice last) and in the indexer (slice first).
    """
    i = np.arange(width // 2)
    angle = batch.positions[:, None, None] * theta ** (-2.0 * i / width)
    # In float32 the frequency is off by a few ulps, and by what its exponent is; the error of the angle grows with the angle.
    off = 4 + np.log(theta)
    cos, sin = (elementary(f, angle) + (single(elementary(np.asarray, angle, off)) - angle) for f in (np.cos, np.sin))
    first, second = _pairs(layout, start, width)
    y = x.copy()
    y[..., first] = single(single(x[..., first] * cos) - single(x[..., second] * sin))
    y[..., second] = single(single(x[..., second] * cos) + single(x[..., first] * sin))
    return y


def _pairs(layout: str, start: int, width: int) -> tuple[slice, slice]:
    if layout == "interleaved":
        return slice(start, start + width, 2), slice(start + 1, start + width, 2)
    half = start + width // 2
    return slice(start, half), slice(half, start + width)
