"""The least time that a call can take: its work over what the device can do, by the contract's own cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from porthal.conformance.cases.domain import first_float, per_expert
from porthal.conformance.cases.inputs import Inputs
from porthal.hal.calls import distinct
from porthal.hal.dtypes import itemsize

ARITHMETIC = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
WIDE = "fp32"  # what a dtype without arithmetic of its own is widened to
COPYING = 0.25  # part of the traffic that is written, from which on a copy is what it is like
CACHES = ("l2", "l3")  # the smallest first


@dataclass(frozen=True)
class Work:
    """What a call has to do: operations in a dtype, bytes to move at least, and how many of these it writes."""

    flops: float
    bytes: float
    written: float
    dtype: str

    @classmethod
    def of(cls, inputs: Inputs) -> Work:
        """By the contract's cost, with what is known of this call: of the keys those that rows see, of the experts those that
        rows have chosen. What more there is, no kernel needs to touch."""
        contract, spec = inputs.contract, inputs.spec
        known = _met(inputs)
        attrs = {name: known.get(name, value) for name, value in spec.attrs.items()}
        dims = {name: known.get(name, size) for name, size in spec.dims.items()}
        [call] = distinct([(inputs.case.op, replace(spec, dims=dims, attrs=attrs))])
        written = sum(prod(shape) * itemsize(kind) for _, shape, kind in contract.results(spec) if kind)
        return cls(call.flops, call.bytes, min(written, call.bytes), inputs.case.dtype(first_float(contract) or "float32"))


def _met(inputs: Inputs) -> dict[str, int]:
    """The sizes of dims of which a call meets a part only: S and k as the mean of its rows, E as the experts chosen, rows
    without those whose index is -1. A row that sees no more keys than it selects need not look at them to choose."""
    found: dict[str, int] = {}
    sizes = {**inputs.spec.attrs, **inputs.spec.dims}
    if (batch := inputs.batch) is not None and batch.T:
        seen = batch.visible
        if any(result.kind == "Selection" for result in inputs.contract.signature.results):
            seen = np.where(seen > sizes.get("k", 0), seen, 0)
        found |= {s: round(float(seen.mean())) for o in inputs.contract.signature.of_kind("Batch") for s in o.dims[2:]}
        if "k" in sizes:
            found["k"] = round(float(np.minimum(batch.visible, sizes["k"]).mean()))
    rows = inputs.contract.rows
    for name, (lowest, _) in inputs.contract.ranges.items():
        if lowest == -1 and inputs.contract.signature[name].dims == (rows,):
            found[rows] = int(np.count_nonzero(inputs.operands[name] >= 0))
    weights = inputs.contract.signature.of_kind("Weight")
    if any(w.dims[0] == "E" for w in weights):
        counts = per_expert(inputs.contract)
        chosen = np.flatnonzero(inputs.operands[counts]) if counts else _ids(inputs) - sizes.get("first_expert", 0)
        found["E"] = len(np.unique(chosen[(chosen >= 0) & (chosen < sizes["E"])]))
    return {name: size for name, size in found.items() if name in sizes}


def _ids(inputs: Inputs) -> Any:
    """The experts of each row."""
    rows = inputs.contract.rows
    return next(inputs.operands[o.name] for o in inputs.contract.signature.operands if o.dims == (rows, "k")).ravel()


@dataclass(frozen=True)
class Limit:
    """What binds a call, and the seconds that it takes at least; "" where no limit of the device is known."""

    bound: str
    seconds: float

    def share(self, seconds: float) -> float:
        """Of the device's best, what a call that takes so long reaches."""
        return self.seconds / seconds if self.bound else 0.0


def needed(work: Work, holds: Mapping[str, float], cold: bool) -> tuple[str, ...]:
    """The names of the peaks that can bind a call, of those a device has; `holds` are the bytes of its memories. With warm
    caches these are all up to the first that has room for what the call touches."""
    level = next((n for n, c in enumerate(CACHES) if work.bytes <= holds.get(c, 0)), None)
    memories = CACHES[: level + 1] if level is not None and not cold else ("dram",)
    copying = ("copy",) if memories == ("dram",) and work.written > COPYING * work.bytes else ()
    own = ARITHMETIC.get(work.dtype, WIDE)
    return tuple(name for name in (own if own in holds else WIDE, *memories, *copying) if name in holds)


def limit(work: Work, rates: Mapping[str, float], holds: Mapping[str, float]) -> Limit:
    """The higher of the two times, that of arithmetic and that of memory. What an inner cache has no room for comes from the
    next one; of reading memory and copying it the faster counts."""
    name = next((n for n in rates if n in ARITHMETIC.values()), "")
    times = [(work.flops / rates[name], name)] if rates.get(name) else []
    caches = [c for c in CACHES if rates.get(c)]
    if caches:
        left, took = work.bytes, 0.0
        for cache in caches[:-1]:
            part = min(left, holds[cache])
            took, left = took + part / rates[cache], left - part
        times.append((took + left / rates[caches[-1]], caches[-1]))
    elif memories := [(work.bytes / rates[m], m) for m in ("dram", "copy") if rates.get(m)]:
        times.append(min(memories))
    seconds, name = max(times, default=(0.0, ""))
    return Limit(name, seconds) if seconds > 0 else Limit("", 0.0)
