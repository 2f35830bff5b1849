"""A parameter, packed once by the backend whose kernel reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from porthal.hal.operands.operand import Array, Form, Operand, Parts
from porthal.hal.scheme import NONE, Scaled, scheme_of

if TYPE_CHECKING:
    from porthal.hal.backend import Backend
    from porthal.hal.signature import OperandSpec


@dataclass(frozen=True)
class WeightSpec:
    """What the loader knows of a weight: the contract and operand it is for, its logical shape, dtype and scheme.

    dtype is that of the numbers where there is no scheme, and of the activations beside it where there is one.
    """

    op: str
    operand: str
    shape: tuple[int, ...]
    dtype: str
    scheme: str = NONE

    @property
    def quantised(self) -> bool:
        return self.scheme != NONE


@dataclass(frozen=True, eq=False)
class Weight(Operand):
    """A parameter in the form `backend.prepare` gave it. Logical form: {"w": array of spec.shape}, [out, in]; under a scheme
    its parts, {"codes", "scale"} and where it has one {"whole"}, see `Scheme.form`, which are also what `native` holds."""

    Spec: ClassVar[type | None] = WeightSpec
    typed: ClassVar[bool] = True
    spec: WeightSpec
    native: Any

    def leaves(self) -> tuple[Any, ...]:
        return tuple(self.native.values()) if self.spec.quantised else (self.native,)

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return declared.matched(self.spec.shape)

    @property
    def scheme(self) -> str | None:
        return self.spec.scheme

    def parts(self) -> Parts:
        return dict(self.native) if self.spec.quantised else {"w": self.native}

    @classmethod
    def form(cls, spec: WeightSpec) -> Form:
        return scheme_of(spec.scheme).form(spec.shape) if spec.quantised else {"w": (spec.shape, spec.dtype)}

    @classmethod
    def of(cls, spec: WeightSpec, parts: Mapping[str, Array]) -> Weight:
        return cls(spec, dict(parts) if spec.quantised else parts["w"])

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> WeightSpec:
        return WeightSpec(**{**facts, "shape": tuple(facts["shape"])})

    def mapped(self, f: Callable[[Array], Array]) -> Weight:
        return self if self.spec.quantised else replace(self, native=f(self.native))

    def for_reference(self, widen: Callable[[Array], Array]) -> Any:
        return Scaled(scheme_of(self.spec.scheme), self.native) if self.spec.quantised else widen(self.native)

    def place(self, services: Any, into: Any = None) -> Any:
        def read(index: Any) -> Any:
            found = {name: part[index].copy() for name, part in self.parts().items()}
            return found if self.spec.quantised else found["w"]

        return services.prepare(self.spec, read, into)

    def carry(self, source: Any, target: Any) -> Weight:
        return self  # already prepared by the other backend

    @classmethod
    def from_logical(cls, backend: Backend, spec: WeightSpec, parts: Mapping[str, Array], into: Any = None) -> Any:
        def read(index: Any) -> Any:
            return {name: part[index] for name, part in parts.items()} if spec.quantised else parts["w"][index]

        return backend.prepare(spec, read, into)

    def to_logical(self, backend: Backend) -> Parts:
        return {name: backend.to_numpy(part) for name, part in self.parts().items()}
