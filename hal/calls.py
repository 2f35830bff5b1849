"""The static facts of calls, counted, with the work and traffic that each contract states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

from porthal.hal.contract import CallSpec, Contract, contracts
from porthal.hal.dtypes import itemsize
from porthal.hal.operands import Pages, PagesSpec
from porthal.hal.scheme import NONE, scheme_of
from porthal.hal.signature import OperandSpec, evaluate, symbols


@dataclass(frozen=True)
class Call:
    """`operands` and `results`: name -> {"kind", "dtype", "shape" or "fields", perhaps "scheme"}; flops and bytes are those of
    one call."""

    op: str
    count: int
    operands: dict[str, dict[str, Any]]
    results: dict[str, dict[str, Any]]
    attributes: dict[str, Any]
    flops: float
    bytes: float

    def signature(self) -> str:
        return " -> ".join(", ".join(_text(n, o) for n, o in side.items()) for side in (self.operands, self.results))

    def attributes_text(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.attributes.items())


def distinct(calls: Sequence[tuple[str, CallSpec]]) -> list[Call]:
    """Equal calls once, with their count, in the order of first use."""
    counts = Counter((op, spec.key()) for op, spec in calls)
    first = {(op, spec.key()): (contracts()[op], spec) for op, spec in reversed(calls)}
    return [_call(*first[key], count) for key, count in counts.items()]


def _call(contract: Contract, spec: CallSpec, count: int) -> Call:
    env = {**{k: v for k, v in spec.attrs.items() if isinstance(v, int)}, **spec.dims}
    operands = {
        o.name: _facts(o, env, spec.dtypes.get(o.name, "")) | _scheme(spec.schemes.get(o.name, NONE))
        for o in contract.signature.operands
        if o.name in spec.dtypes or not o.typed
    }
    results = {o.name: _facts(o, env, spec.dtypes.get(o.name, name)) for o, _, name in contract.results(spec)}
    sizes: dict[str, float] = {o.name: 0 for o in contract.signature.operands}
    sizes.update({n: itemsize(x["dtype"]) for n, x in (operands | results).items() if x["dtype"]})
    sizes.update({n: _bytes(x) for n, x in operands.items() if "scheme" in x})
    flops, traffic = contract.cost(SimpleNamespace(**spec.attrs, **spec.dims), SimpleNamespace(**sizes))
    return Call(contract.name, count, operands, results, dict(spec.attrs), flops, traffic)


def _facts(operand: OperandSpec, env: dict[str, Any], dtype: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": operand.kind, "dtype": dtype}
    if operand.fields:
        return {**facts, "fields": {n: evaluate(d, env) for n, d, _ in operand.fields if set(symbols(d)) <= set(env)}}
    return {**facts, "shape": [evaluate(d, env) for d in operand.dims]}


def _scheme(name: str) -> dict[str, str]:
    return {} if name == NONE else {"scheme": name}


def _bytes(facts: dict[str, Any]) -> float:
    """What a number takes of an operand under a scheme, its scales included."""
    if "fields" in facts:
        form = Pages.form(PagesSpec(tuple(facts["fields"].items()), facts["dtype"], 1, 1, facts["scheme"]))
        count = sum(facts["fields"].values())
    else:
        form, count = scheme_of(facts["scheme"]).form(tuple(facts["shape"])), prod(facts["shape"])
    return sum(prod(shape) * itemsize(kind) for shape, kind in form.values()) / max(count, 1)


def _text(name: str, facts: dict[str, Any]) -> str:
    if "fields" in facts:
        inside = "{" + ", ".join(f"{n}[{width}]" for n, width in facts["fields"].items()) + "}"
    else:
        inside = str(facts["shape"])
    scheme = f"%{facts['scheme']}" if "scheme" in facts else ""  # as in tokens
    return f"{name} {facts['dtype']}{scheme}{inside}"
