"""Which cached positions each query row attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from porthal.hal.operands.operand import Array, Form, Operand, Parts

if TYPE_CHECKING:
    from porthal.hal.backend import Backend
    from porthal.hal.signature import OperandSpec


class Rows(NamedTuple):
    """Logical form of a Selection: int32 positions [T, k], valid first, -1 tail; int32 count [T]."""

    indices: Any
    length: Any


@dataclass(frozen=True)
class SelectionSpec:
    T: int
    k: int


@dataclass(frozen=True, eq=False)
class Selection(Operand):
    """The result of indexer_topk, opaque to the model. Logical form: Rows.

    A native form in cache slots must hold what `Backend.rows` needs to find the positions again, because `rows` does
    not get the batch; and its backend's sparse_mla must take Rows as well, which `from_logical` makes.
    """

    Spec: ClassVar[type | None] = SelectionSpec
    spec: SelectionSpec
    native: Any

    def leaves(self) -> tuple[Any, ...]:
        return tuple(self.native) if isinstance(self.native, tuple) else (self.native,)

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return list(zip(declared.dims, (self.spec.T, self.spec.k)))

    @property
    def dtype(self) -> str:
        return ""

    @classmethod
    def result_spec(cls, shape: tuple[int, ...], attrs: Mapping[str, Any]) -> SelectionSpec:
        return SelectionSpec(*shape)

    def parts(self) -> Parts:
        return dict(self.native._asdict())

    @classmethod
    def form(cls, spec: SelectionSpec) -> Form:
        return {"indices": ((spec.T, spec.k), "int32"), "length": ((spec.T,), "int32")}

    @classmethod
    def of(cls, spec: SelectionSpec, parts: Mapping[str, Array]) -> Selection:
        return cls(spec, Rows(**parts))

    def with_rows(self, order: Array) -> Selection:
        at, empty = np.maximum(order, 0), order < 0
        indices, length = (part[at] for part in self.native)
        indices[empty], length[empty] = -1, 0
        return Selection(SelectionSpec(len(order), self.spec.k), Rows(indices, length))

    @classmethod
    def from_logical(cls, backend: Backend, spec: SelectionSpec, parts: Mapping[str, Array], into: Any = None) -> Any:
        made = Rows(**{name: backend.from_numpy(parts[name]) for name in Rows._fields})
        if into is None:
            return Selection(spec, made)
        held = backend.rows(into)
        written = Rows(*map(backend.write, held, made))
        return into if all(a is b for a, b in zip(held, written)) else Selection(spec, written)

    def to_logical(self, backend: Backend) -> Parts:
        return {name: backend.to_numpy(part) for name, part in backend.rows(self)._asdict().items()}
