"""A call captured as a graph, and its replays with other values in the same memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.bindings import Bound
from porthal.conformance.execution.call import _copied, logical, told
from porthal.conformance.execution.outcome import Outcome, WrongResult, difference, named
from porthal.conformance.execution.placing import Watch, filled
from porthal.hal import Batch, Binding, Operand, Weight
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
        replay = binding.capture(lambda: kernel(*operands.values(), **captured.attrs))
        for at in others:
            runs: list[Held] = []
            for _ in range(2):
                _renew(binding, operands, at.operands)
                watches = _watches(operands, at)
                if elsewhere := [w.what for w in watches.values() if w.trespass(binding)]:
                    raise WrongResult(f"{elsewhere[0]} does not hold what was written into it, and the graph reads it there")
                _spoil(binding, held)
                found = named(binding, captured.contract, replay())
                held = held or found  # where results of the first replay lie, those of all do
                runs.append({name: _copied(value) for name, value in logical(binding, at, held).items()})
                if change := difference(runs[-1], logical(binding, at, found)):
                    raise WrongResult(f"results of a replay lie in new memory: {change} there")
            for operand in at.contract.signature.mutated:
                del watches[operand.name]
            trespasses = tuple(t for w in watches.values() if (t := w.trespass(binding)))
            done.append((at, Outcome(runs[0], runs[1], trespasses, flushes=binding.backend.traits.flushes_denormals)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too must not end the run
        done.append((at, Outcome(error=told(error))))
    return done


def _placed(binding: Binding, value: Any) -> Any:
    if value is None:
        return None
    return value.place(binding) if isinstance(value, Operand) else binding.from_numpy(value.copy())


def _renew(binding: Binding, operands: Held, values: Mapping[str, Any]) -> None:
    """Write a call's values over the operands."""
    for name, value in values.items():
        if isinstance(value, Batch):
            binding.plan(value, into=operands[name])
        elif isinstance(value, Weight):
            binding.prepare(value.spec, value.native.__getitem__, into=operands[name])
        elif isinstance(value, Operand):
            binding.from_logical(value.spec, value.parts(), into=operands[name])
        elif value is not None:
            binding.from_numpy(value.copy(), into=operands[name])


def _spoil(binding: Binding, held: Held) -> None:
    """Overwrite results, so that what a replay leaves out is seen."""
    for value in held.values():
        if not isinstance(value, Operand):
            binding.from_numpy(filled(tuple(value.shape), dtype(value)), into=value)


def _watches(operands: Held, inputs: Inputs) -> dict[str, Watch]:
    """Over all operands but batches, whose memory is the backend's own."""
    found = {}
    for name, value in inputs.operands.items():
        if isinstance(value, Operand) and not isinstance(value, Batch):
            found[name] = Watch(f"{type(value).__name__.lower()} {name}", operands[name], value.parts())
        elif isinstance(value, np.ndarray):
            found[name] = Watch(f"input {name}", operands[name], {"": value})
    return found
