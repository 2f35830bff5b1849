"""Calls that several ranks make together: checked on each, compared among all, and then made on every rank or on none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from porthal.hal.backend import Backend
from porthal.hal.contract import Contract
from porthal.hal.errors import PorthalError, UsageError
from porthal.hal.operands import Communicator

Function = Callable[..., Any]


def together(contract: Contract, backend: Backend, function: Function) -> Function:
    """A kernel of a collective, which runs once all ranks have told that they make the same call, and that it is right.

    Before anything is sent a wrong call is a UsageError on every rank that names the rank at fault, and a rank that is gone or
    late is a PeerLost. The kernel is given the communicator with what was told.
    """

    def call(*args: Any, **attrs: Any) -> Any:
        operands, full = contract.arrange(args, attrs)
        comm = operands[contract.collective]
        if not isinstance(comm, Communicator):
            raise UsageError(f"{contract.name}: {contract.collective} is {type(comm).__name__}, expected Communicator")
        if comm.native is None:  # where calls are only recorded
            return function(*args, **attrs)
        try:
            said = _said(contract, backend, operands, full)
        except PorthalError as error:
            said = {"refused": str(error)}
        heard = [json.loads(message) for message in comm.gather(contract.name, json.dumps(said).encode())]
        told = _agreed(contract, heard, comm.size)
        operands[contract.collective] = comm.knowing(told)
        return function(*operands.values(), **full)

    return call


def _said(contract: Contract, backend: Backend, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What this rank says about its call; raises what is wrong with it."""
    for operand in contract.signature.of_kind("array"):
        if operands[operand.name] is not None and (why := backend.refuses_array(operands[operand.name])):
            raise UsageError(f"{contract.name}: {operand.name} is {why}")
    spec = contract.spec(operands, attrs)
    host = {name: backend.to_numpy(operands[name]) for name in contract.ranges if name in operands}
    contract.check_values(host, spec, np.asarray)
    facts = SimpleNamespace(**spec.dims, **attrs)
    told = contract.told(**host, facts=facts) if contract.told else []
    dims = {name: size for name, size in spec.dims.items() if name not in contract.uneven}
    return {"call": [contract.name, contract.version, dims, dict(spec.dtypes), dict(attrs)], "told": [int(n) for n in told]}


def _agreed(contract: Contract, heard: list[dict[str, Any]], ranks: int) -> np.ndarray[Any, Any]:
    """What all ranks have told; UsageError where one refuses its call, where they differ, and where it cannot be done."""
    for rank, each in enumerate(heard):
        if "refused" in each:
            raise UsageError(f"{each['refused']} (on rank {rank}; nothing was sent on any)")
    for rank, each in enumerate(heard):
        if each["call"] != heard[0]["call"]:
            first, other = (_worded(e["call"]) for e in (heard[0], each))
            raise UsageError(f"{contract.name}: rank {rank} calls {other} and rank 0 {first}, expected the same on all")
    told = np.array([each["told"] for each in heard], np.int64).reshape(ranks, -1)
    if contract.fits:
        _, _, dims, _, attrs = heard[0]["call"]
        if why := contract.fits(told, SimpleNamespace(**dims, **attrs)):
            raise UsageError(f"{contract.name}: {why} (nothing was sent on any rank)")
    return told


def _worded(call: list[Any]) -> str:
    name, _, dims, dtypes, attrs = call
    facts = [f"{k}={v}" for k, v in {**dims, **attrs}.items()] + [f"{k}:{v}" for k, v in dtypes.items()]
    return ",".join([name, *facts])
