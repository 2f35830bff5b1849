from dataclasses import replace

from porthal.hal import FLOATS, Batch, Pages, contract
from porthal.hal.numerics import Array
from porthal.hal.scheme import KEYS, LATENTS


@contract(
    "pages!: Pages{a[A], b[B]?}, batch: Batch[T], first[T, A], second[T, B]? -> pages",
    dtypes={"pages": FLOATS, "first": "pages", "second": "pages"},
    cost=lambda d, b: (0, 2 * d.T * (d.A + getattr(d, "B", 0)) * b.first),
    independent=("T",),
    cases={"A": (512, 128), "B": (64,)},
    exact=True,
    values={"first": ("normal", "special", "huge", "denormal", "extreme", "signed")},
    schemes={"pages": (*KEYS, *LATENTS)},
)
def kv_write(pages: Pages, batch: Batch, first: Array, second: Array | None = None) -> Pages:
    """Write row t into cache slot batch.slots[t]: `first` into the first field of the pages, `second` into the second.

    Slot -1 (padding) is skipped; no slot occurs twice in a batch; every other slot keeps its bits. Pages are updated in
    place and returned: use what is returned. Under a scheme `first` is quantised row by row, see `Scheme`.
    """
    written = batch.slots >= 0
    fields = dict(pages.native)
    for (name, _), rows in zip(pages.spec.fields, (first, second)):
        fields[name] = fields[name].copy()
        fields[name][batch.slots[written]] = rows[written]  # type: ignore[index]
    return replace(pages, native=fields)
