from dataclasses import replace

import numpy as np

from porthal.hal import FLOATS, Pages, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import KEYS, LATENTS


@contract(
    "pages!: Pages{a[A], b[B]?}, source[M], target[M] -> pages",
    dtypes={"pages": FLOATS, "source": "int32", "target": "int32"},
    cost=lambda d, b: (0, 2 * d.M * d.block_size * (d.A + getattr(d, "B", 0)) * b.pages),
    rows="M",
    writes="target",
    cases={"A": (512, 128), "B": (64,), "M": (2, 0, 1, 17)},
    ranges={"source": (0, "P"), "target": (0, "P")},
    exact=True,
    values={"source": ("pages", "lone"), "target": ("pages",), "pages": ("normal", "special", "extreme", "signed")},
    schemes={"pages": (*KEYS, *LATENTS)},
)
def page_copy(pages: Pages, source: Array, target: Array) -> Pages:
    """Copy whole pages: page target[m] becomes what page source[m] was before the call (forking and moving requests).

    No target occurs twice. Pages are updated in place and returned.
    """
    within = np.arange(pages.spec.block_size)
    there, here = ((pages.spec.block_size * p[:, None] + within).reshape(-1) for p in (target, source))
    fields = {}
    for name, _ in pages.spec.fields:
        fields[name] = pages[name].copy()
        fields[name][there] = pages[name][here]
    return replace(pages, native=fields)
