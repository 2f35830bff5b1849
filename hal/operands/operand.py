"""What every kind of operand says about itself; the defaults suit a kind that is a set of named arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

if TYPE_CHECKING:
    from porthal.hal.backend import Backend
    from porthal.hal.signature import OperandSpec

Array = np.ndarray[Any, Any]
Parts = dict[str, Array]  # a logical form: NumPy arrays by name
Form = dict[str, tuple[tuple[int, ...], str]]  # the shape and dtype of each


class Operand:
    """Base of the kinds. "Logical" is an operand whose `native` holds NumPy arrays.

    Spec      the class of its specs, None where it has none
    typed     whether a contract states a dtype for it
    """

    Spec: ClassVar[type | None] = None
    typed: ClassVar[bool] = False
    spec: Any
    native: Any

    # -- what a contract asks ----------------------------------------------------------------------------------------

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        """Dims of the declaration with their values here; UsageError, without the op's name, where it does not fit."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        return str(self.spec.dtype)

    @property
    def scheme(self) -> str | None:
        """The quantisation scheme, None where the kind has none."""
        return None

    @classmethod
    def result_spec(cls, shape: tuple[int, ...], attrs: Mapping[str, Any]) -> Any:
        """The spec of a result of this kind whose declared dims have these sizes, of a call with these attributes."""
        raise NotImplementedError(f"an operand of kind {cls.__name__} cannot be a new result, only a mutated operand")

    # -- the logical form --------------------------------------------------------------------------------------------

    def leaves(self) -> tuple[Any, ...]:
        """The backend's arrays in a fixed order."""
        return tuple(self.native.values())

    def parts(self) -> Parts:
        """The arrays of a logical operand."""
        return dict(self.native)

    @classmethod
    def form(cls, spec: Any) -> Form:
        """What the parts of this spec must be."""
        raise NotImplementedError

    @classmethod
    def names(cls, spec: Any) -> tuple[str, ...]:
        """The names of the parts."""
        return tuple(cls.form(spec))

    @classmethod
    def of(cls, spec: Any, parts: Mapping[str, Array]) -> Any:
        """The logical operand made of these parts."""
        return cls(spec, dict(parts))  # type: ignore[call-arg]

    def facts(self) -> dict[str, Any]:
        """The spec as plain values, for a file; `spec_of` reads it."""
        return asdict(self.spec)

    @classmethod
    def spec_of(cls, facts: Mapping[str, Any]) -> Any:
        """The spec that `facts` wrote."""
        assert cls.Spec is not None
        return cls.Spec(**facts)

    def mapped(self, f: Callable[[Array], Array]) -> Any:
        """A logical operand with its floats changed; the same object where f changes none."""
        return self

    def for_reference(self, widen: Callable[[Array], Array]) -> Any:
        """As the float64 references take it."""
        return self.mapped(widen)

    def with_rows(self, order: Array) -> Any:
        """A logical operand with its rows in this order, -1 for a row without content; None where its rows are not
        those of the call."""
        return None

    # -- on a backend ------------------------------------------------------------------------------------------------

    def place(self, services: Any, into: Any = None) -> Any:
        """This logical operand on a backend, or on a binding's, in the memory of `into` if given."""
        return services.from_logical(self.spec, {name: array.copy() for name, array in self.parts().items()}, into)

    def carry(self, source: Any, target: Any) -> Any:
        """This operand of one backend on another."""
        return target.from_logical(self.spec, source.to_logical(self))

    @classmethod
    def from_logical(cls, backend: Backend, spec: Any, parts: Mapping[str, Array], into: Any = None) -> Any:
        """What `Backend.from_logical` does unless the backend overrides it."""
        arrays = {name: backend.from_numpy(value) for name, value in parts.items()}
        if into is None:
            return cls(spec, arrays)  # type: ignore[call-arg]
        into.native.update({name: backend.write(into.native[name], value) for name, value in arrays.items()})
        return into

    def to_logical(self, backend: Backend) -> Parts:
        """What `Backend.to_logical` does unless the backend overrides it."""
        return {name: backend.to_numpy(self.native[name]) for name in self.form(self.spec)}
