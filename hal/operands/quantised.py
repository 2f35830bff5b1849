"""Activations under a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from porthal.hal.operands.operand import Array, Form, Operand, Parts
from porthal.hal.scheme import Scaled, scheme_of

if TYPE_CHECKING:
    from porthal.hal.signature import OperandSpec


@dataclass(frozen=True)
class QuantisedSpec:
    shape: tuple[int, ...]
    scheme: str


@dataclass(frozen=True, eq=False)
class Quantised(Operand):
    """The result of `quantize`. Logical form: {"codes", "scale"}, see `Scheme.form`."""

    Spec: ClassVar[type | None] = QuantisedSpec
    spec: QuantisedSpec
    native: Any

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return declared.matched(self.spec.shape)

    @property
    def dtype(self) -> str:
        return ""

    @property
    def scheme(self) -> str | None:
        return self.spec.scheme

    @classmethod
    def result_spec(cls, shape: tuple[int, ...], attrs: Mapping[str, Any]) -> QuantisedSpec:
        return QuantisedSpec(shape, attrs["scheme"])

    @classmethod
    def form(cls, spec: QuantisedSpec) -> Form:
        return scheme_of(spec.scheme).form(spec.shape)

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> QuantisedSpec:
        return QuantisedSpec(**{**facts, "shape": tuple(facts["shape"])})

    def parts(self) -> Parts:
        return dict(self.native.parts if isinstance(self.native, Scaled) else self.native)

    def for_reference(self, widen: Callable[[Array], Array]) -> Quantised:
        return Quantised(self.spec, Scaled(scheme_of(self.spec.scheme), self.native))

    def with_rows(self, order: Array) -> Quantised:
        at = np.maximum(order, 0)
        spec = QuantisedSpec((len(order), *self.spec.shape[1:]), self.spec.scheme)
        return Quantised(spec, {name: part[at] for name, part in self.native.items()})
