"""A paged cache, whose memory and layout belong to the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from porthal.hal.errors import UsageError
from porthal.hal.operands.operand import Array, Form, Operand

if TYPE_CHECKING:
    from porthal.hal.signature import OperandSpec


@dataclass(frozen=True)
class PagesSpec:
    """A paged cache: named fields of fixed width, one dtype, `n_blocks` pages of `block_size` slots."""

    fields: tuple[tuple[str, int], ...]
    dtype: str
    n_blocks: int
    block_size: int
    scheme: str = "none"

    @property
    def slots(self) -> int:
        return self.n_blocks * self.block_size


@dataclass(frozen=True, eq=False)
class Pages(Operand):
    """A paged cache in backend memory. Logical form: {field: array [slots, width]}.

    `native` maps each field to an array whose first axes are the slots; a backend may add entries of its own and may make
    the fields views of one joint row.
    """

    Spec: ClassVar[type | None] = PagesSpec
    typed: ClassVar[bool] = True
    spec: PagesSpec
    native: Any

    def __getitem__(self, name: str) -> Any:
        return self.native[name]

    def leaves(self) -> tuple[Any, ...]:
        return tuple(self.native[name] for name, _ in self.spec.fields)

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        fields = self.spec.fields
        wanted = [f for i, f in enumerate(declared.fields) if not f[2] or i < len(fields)]
        if len(fields) != len(wanted):
            raise UsageError(
                f"{declared.name} has fields {[n for n, _ in fields]}, expected {[n for n, _, _ in declared.fields]}"
            )
        widths = [(dim, width) for (_, dim, _), (_, width) in zip(wanted, fields)]
        return [*widths, ("block_size", self.spec.block_size), ("P", self.spec.n_blocks)]

    @property
    def scheme(self) -> str | None:
        return self.spec.scheme

    @classmethod
    def form(cls, spec: PagesSpec) -> Form:
        return {name: ((spec.slots, width), spec.dtype) for name, width in spec.fields}

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> PagesSpec:
        return PagesSpec(**{**facts, "fields": tuple((name, width) for name, width in facts["fields"])})

    def mapped(self, f: Callable[[Array], Array]) -> Pages:
        changed = {name: f(array) for name, array in self.native.items()}
        same = all(changed[name] is array for name, array in self.native.items())
        return self if same else replace(self, native=changed)
