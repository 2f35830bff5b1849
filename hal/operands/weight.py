"""A parameter, packed once by the backend whose kernel reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from porthal.hal.operands.operand import Array, Form, Operand, Parts

if TYPE_CHECKING:
    from porthal.hal.backend import Backend
    from porthal.hal.signature import OperandSpec


@dataclass(frozen=True)
class WeightSpec:
    """What the loader knows of a weight: the contract and operand it is for, its logical shape, dtype and scheme."""

    op: str
    operand: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str = "none"


@dataclass(frozen=True, eq=False)
class Weight(Operand):
    """A parameter in the form `backend.prepare` gave it. Logical form: {"w": array of spec.shape}, [out, in]."""

    Spec: ClassVar[type | None] = WeightSpec
    typed: ClassVar[bool] = True
    spec: WeightSpec
    native: Any

    def leaves(self) -> tuple[Any, ...]:
        return (self.native,)

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return declared.matched(self.spec.shape)

    @property
    def scheme(self) -> str | None:
        return self.spec.scheme

    def parts(self) -> Parts:
        return {"w": self.native}

    @classmethod
    def form(cls, spec: WeightSpec) -> Form:
        return {"w": (spec.shape, spec.dtype)}

    @classmethod
    def of(cls, spec: WeightSpec, parts: Mapping[str, Array]) -> Weight:
        return cls(spec, parts["w"])

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> WeightSpec:
        return WeightSpec(**{**facts, "shape": tuple(facts["shape"])})

    def mapped(self, f: Callable[[Array], Array]) -> Weight:
        return replace(self, native=f(self.native))

    def for_reference(self, widen: Callable[[Array], Array]) -> Array:
        return widen(self.native)

    def place(self, services: Any) -> Any:
        return services.prepare(self.spec, lambda index: self.native[index].copy())

    def carry(self, source: Any, target: Any) -> Weight:
        return self  # already prepared by the other backend

    @classmethod
    def from_logical(cls, backend: Backend, spec: WeightSpec, parts: Mapping[str, Array], into: Any = None) -> Any:
        return backend.prepare(spec, lambda index: parts["w"][index], into)

    def to_logical(self, backend: Backend) -> Parts:
        return {"w": backend.to_numpy(self.native)}
