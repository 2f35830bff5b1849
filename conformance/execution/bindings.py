"""Which kernel a call gets: bindings made for exactly this call, so that own kernels run where they claim it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.traits import verify
from porthal.hal import (
    Backend,
    Batch,
    Binding,
    CallSpec,
    Choice,
    Operand,
    UsageError,
    bind,
    recorded,
    running,
)
from porthal.hal.binding import VIA


@dataclass(frozen=True)
class Bound:
    """A call's binding, the kernel chosen there, and the kernels that a composition is made of."""

    binding: Binding
    choice: Choice
    made_of: tuple[Choice, ...]

    @property
    def foreign(self) -> tuple[str, ...]:
        """The ops in it that are not the chip's own."""
        return tuple(c.op for c in self.made_of if c.status not in ("own", "composed"))

    @property
    def tie(self) -> str:
        """The declared order of ties: a composition's is that of its parts."""
        return "any" if any(c.tie == "any" for c in self.made_of) else "lowest"

    @property
    def batch_invariant(self) -> bool:
        """Whether it is promised that a row's bits do not depend on the other rows: of a composition, by all its parts."""
        return all(c.batch_invariant for c in self.made_of if c.status != "composed")


class Bindings:
    """The bindings of one backend, one per distinct call."""

    def __init__(self, backend: Backend) -> None:
        if rules := os.environ.get("PORTHAL_OPS"):
            raise UsageError(f"PORTHAL_OPS is {rules!r}, but every kernel of {backend} is tried itself here: unset it")
        with running(backend):
            verify(backend)
        self.backend = backend
        self._known: dict[Any, Bound] = {}

    def bound(self, inputs: Inputs, checked: bool = False) -> Bound:
        """Functions chosen for exactly this call; `checked` ones check their arguments first."""
        op, via = inputs.contract.name, inputs.case.via
        key = op, via, inputs.spec.key(), checked
        if key not in self._known:
            if len(self._known) > 32:
                self._known.clear()
            binding, made_of = self._bind(op, {op: [inputs.spec]}, via, checked), [op]
            expanded: list[str] = []  # the parts of a composition are claimed call by call, not those of an own kernel
            while more := [o for o in made_of if binding.choices[o].status == "composed" and o not in expanded]:
                expanded += more
                inner = parts(inputs, expanded)
                binding, made_of = self._bind(op, inner, via, checked), list(inner)
            choices = binding.choices
            self._known[key] = Bound(binding, choices[op], tuple(choices[made] for made in made_of))
        return self._known[key]

    def _bind(self, op: str, profile: Mapping[str, Sequence[CallSpec]], via: str, checked: bool) -> Binding:
        rules = {op: VIA + via} if via else {}
        return bind(backend=self.backend, profile=profile, overrides=rules, fallback="error", check=checked, divert=False)


def parts(inputs: Inputs, expand: Collection[str] | None = None) -> dict[str, list[CallSpec]]:
    """The calls a composite consists of, itself first, found by running its decomposition on shapes alone; `expand` names
    the composites that are taken apart (None: all)."""
    found: dict[str, list[CallSpec]] = {}

    def run(shapes: Binding) -> None:
        operands = (on_shapes(shapes, value) for value in inputs.operands.values())
        getattr(shapes, inputs.contract.name)(*operands, **inputs.attrs)

    for op, spec in recorded(run, expand):
        found.setdefault(op, []).append(spec)
    return found


def on_shapes(shapes: Binding, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Batch):
        return shapes.plan(value)
    if isinstance(value, Operand):
        return value.of(value.spec, {part: shapes.from_numpy(array) for part, array in value.parts().items()})
    return shapes.from_numpy(value)
