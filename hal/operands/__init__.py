"""What a contract takes that is neither array nor attribute: one file per kind, and the registry of them all.

An operand is frozen and has no arithmetic: `spec` is static and hashable, `native` is the backend's own form, `leaves()`
are its arrays in a fixed order. `Backend.from_logical` and `Backend.to_logical` translate; each kind states its logical form.
A new kind is a file here and a line in `KINDS`; signatures, checks, cases, judging and files follow from `Operand`.
"""

from __future__ import annotations

from typing import Any

from porthal.hal.errors import UsageError
from porthal.hal.operands.batch import Batch
from porthal.hal.operands.communicator import Communicator, CommunicatorSpec
from porthal.hal.operands.operand import Operand
from porthal.hal.operands.pages import Pages, PagesSpec
from porthal.hal.operands.quantised import Quantised, QuantisedSpec
from porthal.hal.operands.selection import Rows, Selection, SelectionSpec
from porthal.hal.operands.weight import Weight, WeightSpec

__all__ = [
    "KINDS",
    "Batch",
    "Communicator",
    "CommunicatorSpec",
    "Operand",
    "Pages",
    "PagesSpec",
    "Quantised",
    "QuantisedSpec",
    "Rows",
    "Selection",
    "SelectionSpec",
    "Weight",
    "WeightSpec",
    "kind_of",
]

KINDS: dict[str, type[Operand]] = {
    kind.__name__: kind for kind in (Weight, Pages, Selection, Quantised, Batch, Communicator)
}


def kind_of(spec: Any) -> type[Operand]:
    """The kind of operand that a spec describes."""
    specs = {kind.Spec: kind for kind in KINDS.values() if kind.Spec is not None}
    found = next((kind for described, kind in specs.items() if isinstance(spec, described)), None)
    if found is None:
        known = ", ".join(described.__name__ for described in specs)
        raise UsageError(f"{type(spec).__name__} describes no kind of operand: expected one of {known}")
    return found
