from porthal.hal import Rows, Selection, SelectionSpec, contract
from porthal.hal.numerics import Array


@contract(
    "sel: Selection[T, k], rows[M] -> out: Selection[M, k]",
    dtypes={"rows": "int32"},
    cost=lambda d, b: (0, 8 * d.M * d.k),
    independent=("M",),
    cases={"k": (2048, 16), "M": (4, 1, 17)},
    ranges={"rows": (0, "T")},
    values={"rows": ("index", "ascending")},
    exact=True,
)
def select_rows(sel: Selection, rows: Array) -> Selection:
    """Row m of the result selects what row rows[m] selected (index sharing between MTP steps).

    Valid for any later batch of the same requests: block tables only grow. Moving pages invalidates it.
    """
    indices, length = sel.native
    return Selection(SelectionSpec(len(rows), sel.spec.k), Rows(indices[rows], length[rows]))
