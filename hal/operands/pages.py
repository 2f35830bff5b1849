"""A paged cache, whose memory and layout belong to the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from porthal.hal.errors import UsageError
from porthal.hal.operands.operand import Array, Form, Operand, Parts
from porthal.hal.scheme import NONE, Scaled, Scheme, scheme_of

if TYPE_CHECKING:
    from porthal.hal.signature import OperandSpec


@dataclass(frozen=True)
class PagesSpec:
    """A paged cache: named fields of fixed width, one dtype, `n_blocks` pages of `block_size` slots.

    A scheme holds for the first field; the others stay numbers of the dtype, which is also that of the rows to write.
    """

    fields: tuple[tuple[str, int], ...]
    dtype: str
    n_blocks: int
    block_size: int
    scheme: str = NONE

    @property
    def slots(self) -> int:
        return self.n_blocks * self.block_size

    @property
    def quantised(self) -> tuple[str, Scheme] | None:
        """The field that is held as codes and scales, and by which scheme."""
        return None if self.scheme == NONE else (self.fields[0][0], scheme_of(self.scheme))


@dataclass(frozen=True, eq=False)
class Pages(Operand):
    """A paged cache in backend memory. Logical form: {field: array [slots, width]}; under a scheme the first field is its
    codes, and "FIELD_scale" each slot's scales: {"c": uint8 [slots, 512], "c_scale": float32 [slots, 4], "kp": ...}.

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
        return tuple(self.native[name] for name in self.form(self.spec))

    def parts(self) -> Parts:
        found: Parts = {}
        for name, value in self.native.items():
            found |= _held(name, value.parts) if isinstance(value, Scaled) else {name: value}
        return found

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
        form: Form = {}
        for name, width in spec.fields:
            plain = {name: ((spec.slots, width), spec.dtype)}
            quantised = spec.quantised and spec.quantised[0] == name
            form |= _held(name, spec.quantised[1].form((spec.slots, width))) if quantised and spec.quantised else plain
        return form

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> PagesSpec:
        return PagesSpec(**{**facts, "fields": tuple((name, width) for name, width in facts["fields"])})

    def mapped(self, f: Callable[[Array], Array]) -> Pages:
        changed = {name: f(array) for name, array in self.native.items()}
        same = all(changed[name] is array for name, array in self.native.items())
        return self if same else replace(self, native=changed)

    def for_reference(self, widen: Callable[[Array], Array]) -> Pages:
        if not self.spec.quantised:
            return self.mapped(widen)
        name, scheme = self.spec.quantised
        scaled = Scaled(scheme, {"codes": self.native[name], "scale": self.native[name + SCALE]})
        return replace(self, native={name: scaled, **{other: widen(self.native[other]) for other, _ in self.spec.fields[1:]}})


SCALE = "_scale"  # behind a field's name


def _held(name: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a field under a scheme by their names in a cache."""
    return {name: parts["codes"], name + SCALE: parts["scale"]}
