"""One rank's part of a call of several ranks: placed, called again and again, read back; or called wrongly on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.inputs import Array, Inputs
from porthal.conformance.cases.ranked import given, victim
from porthal.conformance.execution.outcome import same_bits
from porthal.conformance.verdicts import Failed
from porthal.hal import Binding, Communicator, collectives
from porthal.hal.dtypes import is_float

REPEATS = 50  # of a plain call; others as often as the level says
BESIDE = 3  # columns beside those of a view


def called(binding: Binding, inputs: Inputs, comm: Communicator, runs: int) -> dict[str, Array]:
    """The results of a rank, the same in every repeat; raises Failed where they are not, or an operand has changed."""
    contract = inputs.contract
    operands = {name: _placed(binding, inputs, name, value, comm) for name, value in inputs.operands.items()}
    first: dict[str, Array] = {}
    case = inputs.case
    for turn in range(runs if case.recipes or case.view or case.seq or case.seed else REPEATS):
        out = contract.named(getattr(binding, contract.name)(*operands.values(), **inputs.attrs))
        found = {name: binding.to_numpy(value) for name, value in out.items()}
        first = first or found
        kept = contract.specified(**first) if contract.specified else {}
        for name, value in found.items():
            rows = slice(kept.get(name))
            if value.shape == first[name].shape and not same_bits(_dense(value[rows]), _dense(first[name][rows])):
                raise Failed("FAIL_NONDETERMINISTIC", f"{name} differs in run {turn + 1} on the same inputs")
    for name, value in inputs.operands.items():
        if isinstance(value, np.ndarray) and not same_bits(_dense(binding.to_numpy(operands[name])), _dense(value)):
            raise Failed("FAIL_MUTATED", f"{name} changed, which the call may not write")
    return first


def _dense(x: Array) -> Array:
    return np.ascontiguousarray(x)


def _placed(binding: Binding, inputs: Inputs, name: str, value: Any, comm: Communicator) -> Any:
    if isinstance(value, Communicator):
        return comm
    view = inputs.case.view if name == first_float(inputs.contract) else ""
    fill = np.nan if is_float(str(value.dtype)) else 99
    if view == "columns":
        wide = np.full((len(value), value.shape[1] + BESIDE), fill).astype(value.dtype)
        wide[:, 1 : 1 + value.shape[1]] = value
        return binding.from_numpy(wide)[:, 1 : 1 + value.shape[1]]
    if view == "rows":
        long = np.full((2 * len(value), value.shape[1]), fill).astype(value.dtype)
        long[::2] = value
        return binding.from_numpy(long)[::2]
    return binding.from_numpy(value)


def mistaken(binding: Binding, case: Case, rank: int, comm: Communicator, leave: Callable[[], None]) -> None:
    """The call of a rank in a case with a fault: that of the rank at fault, or the right one of another."""
    contract, plain = case.contract, replace(case, fault="")
    if rank != victim(case) or case.fault == "overflow":
        inputs = given(case, rank)
    elif case.fault in ("killed", "stalled"):
        leave()
        inputs = given(case, rank)
    elif case.fault == "other":
        inputs = given(_another(case), rank)
    elif case.fault == "dtype":
        first = first_float(contract)
        kind = next(k for k in reversed(contract.dtypes[first]) if k != case.dtype(first))
        inputs = given(replace(plain, dtypes=((first, kind),)), rank)
    elif case.fault == "shape":
        inputs = given(replace(plain, dims=tuple((s, n + (s == "H")) for s, n in case.dims)), rank)
    else:
        inputs = given(case, rank)
        name = next(iter(contract.ranges))
        inputs.operands[name].flat[-1] = contract.bounds(name, inputs.spec)[1]
    operands = {name: _placed(binding, inputs, name, value, comm) for name, value in inputs.operands.items()}
    getattr(binding, inputs.contract.name)(*operands.values(), **inputs.attrs)


def _another(case: Case) -> Case:
    """A call of another collective, of the sizes of this one where it can be."""
    known = [c for c in collectives().values() if c.name != case.op and not c.attributes]
    other = next((c for c in known if c.signature.symbols() <= dict(case.dims).keys()), known[0])
    return Case(other.name, tuple((s, dict(case.dims).get(s, 2)) for s in sorted(other.signature.symbols())))
