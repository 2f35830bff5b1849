"""A call captured as a graph, and its replays with other values in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.bindings import Bound
from porthal.conformance.execution.call import copied, logical, told
from porthal.conformance.execution.outcome import Outcome, WrongResult, difference, named
from porthal.conformance.execution.placing import Watch, filled, unwritten
from porthal.hal import Batch, Binding, Operand
from porthal.hal.dtypes import dtype

Held = dict[str, Any]


def uncapturable(bound: Bound) -> str:
    """Which kernels of a call say that they cannot stand in a captured graph, or ""."""
    ops = [choice.op for choice in bound.made_of if not bound.binding.capturable(choice.op)]
    return f"{', '.join(ops)} on {bound.binding.backend} cannot be captured: the kernel says so, or needs data" if ops else ""


def replayed(bound: Bound, calls: Sequence[Inputs]) -> list[tuple[Inputs, Outcome]]:
    """Each call but the first with its outcome: that one is captured, and the others are written over its operands.

    What is raised stands as the error of the call at which it was.
    """
    binding, (captured, *others) = bound.binding, calls
    held: Held = {}
    done: list[tuple[Inputs, Outcome]] = []
    at = captured
    try:
        operands = {name: _placed(binding, value) for name, value in captured.operands.items()}
        kernel = getattr(binding, captured.contract.name)
        kernel(*operands.values(), **captured.attrs)  # as who captures warms up: what is kept of this call may not be captured
        replay = binding.capture(lambda: kernel(*operands.values(), **captured.attrs))
        for at in others:
            runs: list[Held] = []
            for _ in range(2):
                _renew(binding, operands, at.operands)
                watches = _watches(binding, operands, at)
                _spoil(binding, held)
                found = named(binding, captured.contract, replay())
                held = held or found  # where results of the first replay lie, those of all do
                runs.append({name: copied(value) for name, value in logical(binding, at, held).items()})
                if change := difference(runs[-1], logical(binding, at, found)):
                    raise WrongResult(f"results of a replay lie in new memory: {change} there")
            trespasses = tuple(t for w in watches if (t := w.trespass(binding)))
            done.append((at, Outcome(runs[0], runs[1], trespasses, flushes=binding.backend.traits.flushes_denormals)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too must not end the run
        done.append((at, Outcome(error=told(error))))
    return done


def _placed(binding: Binding, value: Any, into: Any = None) -> Any:
    if value is None:
        return None
    return value.place(binding, into) if isinstance(value, Operand) else binding.from_numpy(value.copy(), into)


def _renew(binding: Binding, operands: Held, values: Mapping[str, Any]) -> None:
    """Write a call's values over the operands; raises WrongResult where they do not lie there afterwards."""
    for name, value in values.items():
        _placed(binding, value, operands[name])
        if value is None or isinstance(value, Batch):
            continue  # a plan's memory is in a form of the backend's own
        if wrong := unwritten(binding, name, value, operands[name]):  # a captured call reads the memory that it has
            raise WrongResult(wrong)


def _spoil(binding: Binding, held: Held) -> None:
    """Overwrite results, so that what a replay leaves out is seen."""
    for value in held.values():
        if not isinstance(value, Operand):
            binding.from_numpy(filled(tuple(value.shape), dtype(value)), into=value)


def _watches(binding: Binding, operands: Held, inputs: Inputs) -> list[Watch]:
    """Over what the call may not change."""
    found, mutated = [], {o.name for o in inputs.contract.signature.mutated}
    for name, value in inputs.operands.items():
        if isinstance(value, Operand) and name not in mutated:
            what = f"{type(value).__name__.lower()} {name}"
            found.append(Watch.over(binding.backend, what, operands[name], value.parts()))
        elif value is not None and name not in mutated:
            found.append(Watch(f"input {name}", operands[name], {"": value}))
    return found
