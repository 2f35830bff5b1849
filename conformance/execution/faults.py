"""Deliberate mistakes, one of each kind, which a checked call must refuse."""

from __future__ import annotations

import numpy as np

from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.execution.placing import place
from porthal.hal import Binding
from porthal.hal.signature import ARRAY


def refusal_of(binding: Binding, inputs: Inputs) -> BaseException | None:
    """Make the case's mistake: what the checked binding raises."""
    contract, fault = inputs.contract, inputs.case.fault
    operands, attrs = dict(inputs.operands), dict(inputs.attrs)
    first = next((o.name for o in contract.signature.of_kind(ARRAY)), "")
    if fault == "dtype":
        operands[first] = np.zeros(operands[first].shape, np.int8)
    elif fault == "shape":
        operands[first] = operands[first][None]
    elif fault == "attribute":
        attrs[next(iter(contract.attributes))] = None
    elif fault == "range":
        name = next(iter(contract.ranges))
        operands[name] = np.full_like(operands[name], np.iinfo(np.int32).max)
    placed = {name: place(binding, name, value)[0] for name, value in operands.items()}
    if fault == "kind":
        placed[first] = operands[first].tolist()
    try:
        getattr(binding, contract.name)(*placed.values(), **attrs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    return None
