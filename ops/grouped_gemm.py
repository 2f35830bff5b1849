import numpy as np

from porthal.hal import FLOATS, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import WEIGHTS, product


@contract(
    "x[M, K], w: Weight[E, N, K], counts[E] -> y[M, N]",
    dtypes={"x": FLOATS, "w": "x", "counts": "int32", "y": "x"},
    cost=lambda d, b: (
        2 * d.M * d.N * d.K,
        d.M * (d.K * b.x + d.N * b.y) + min(d.E, d.M) * d.N * d.K * b.w,
    ),
    rows="M",
    independent=("M", "N"),
    cases={"K": (6144, 2048, 96, 7), "N": (256, 96, 7), "E": (8, 1, 33), "M": (64, 0, 1, 257)},
    ranges={"counts": (0, "M+1")},
    values={
        "x": ("normal", "integer", "cancel", "surge", "seesaw"),
        "counts": ("counts", "heap", "waist", "single", "tiled"),
        "w": ("weight", "pillar"),
    },
    schemes={"w": WEIGHTS},
)
def grouped_gemm(x: Array, w: Array, counts: Array) -> Array:
    """Rows are sorted by expert; the next counts[e] rows are multiplied by w[e]: y[m] = w[e] x[m].

    Rows beyond sum(counts) are padding: their results are unspecified and their contents must not affect other rows
    (the reference gives zeros). Under a scheme of w, x is taken as `linear` takes it.
    Source: MegaBlocks; torch._grouped_mm, npu_grouped_matmul, DeepGEMM m_grouped_gemm.
    """
    y = np.zeros((len(x), w.shape[1]))
    start = 0
    for e, n in enumerate(counts):
        y[start : start + n] = product("mk,nk->mn", x[start : start + n], w[e])
        start += int(n)
    return y


@grouped_gemm.unread
def _(x: Array, counts: Array, **_: object) -> dict[str, Array]:
    return {"x": np.arange(len(x)) >= counts.sum()}


@grouped_gemm.specified_rows
def _(counts: Array, **_: object) -> int:
    return int(counts.sum())
