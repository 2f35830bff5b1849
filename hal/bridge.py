"""Kernels over arrays of another library: operands are carried to it and back in their logical forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from porthal.hal.backend import Backend, Kernel
from porthal.hal.contract import Contract
from porthal.hal.operands import Operand


def same_library(chosen: Backend, owner: str, instance: Callable[[str], Backend]) -> bool:
    """Whether kernels of a base take the arrays of the backend that inherits them; `instance` makes the base."""
    base: Any = next(c for c in type(chosen).__mro__ if vars(c).get("name") == owner)
    if type(chosen).from_numpy is base.from_numpy:
        return True
    return issubclass(chosen.array_type, instance(owner).array_type)


def bridge(chosen: Backend, other: Backend, contract: Contract, kernel: Kernel) -> Callable[..., Any]:
    """A kernel of another backend as one of the chosen backend: each call carries what it takes there and back."""

    def carry(value: Any, source: Backend, target: Backend) -> Any:
        if value is None or isinstance(value, Operand):
            return value and value.carry(source, target)
        return target.from_numpy(source.to_numpy(value))

    def fetch(value: Any, into: Any) -> Any:
        if into is not None:
            return chosen.from_logical(value.spec, other.to_logical(value), into)
        return carry(value, other, chosen)

    names = [o.name for o in contract.signature.operands]

    def call(*args: Any, **attrs: Any) -> Any:
        found = contract.named(kernel.function(*(carry(a, chosen, other) for a in args), **attrs))
        given = dict(zip(names, args))
        mutated = {r.name for r in contract.signature.mutated}
        back = tuple(fetch(value, given[name] if name in mutated else None) for name, value in found.items())
        return back if len(back) > 1 else back[0]

    return call
