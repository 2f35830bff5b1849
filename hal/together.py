"""Calls that several ranks make together: checked on each, compared among all, and then made on every rank or on none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from porthal.hal.backend import Backend
from porthal.hal.contract import CallSpec, Contract
from porthal.hal.errors import PorthalError, UsageError
from porthal.hal.operands import Communicator
from porthal.hal.wire import Differ

Function = Callable[..., Any]
RIGHT, REFUSED = b"+", b"-"  # begins what a rank says of its call
MOST = 1024  # calls of which what is said is kept
HEAD = 4096  # bytes of what is said that goes along with what a kernel moves, at most


class _Known:
    """What is said of every call of these static facts: `head`, the same on all ranks, before what each tells."""

    def __init__(self, contract: Contract, spec: CallSpec) -> None:
        dims = {name: size for name, size in spec.dims.items() if name not in contract.uneven}
        head = json.dumps([contract.name, contract.version, dims, dict(spec.dtypes), dict(spec.attrs)]).encode()
        self.spec, self.facts = spec, SimpleNamespace(**spec.dims, **spec.attrs)
        self.head = RIGHT + len(head).to_bytes(4, "little") + head


def together(contract: Contract, backend: Backend, function: Function) -> Function:
    """A kernel of a collective, which runs once all ranks have told that they make the same call, and that it is right.

    Before anything is sent a wrong call is a UsageError on every rank that names the rank at fault, and a rank that is gone or
    late is a PeerLost. The kernel is given the communicator with what was told.
    """
    known: dict[Any, _Known] = {}
    place = list(contract.signature.operands).index(next(iter(contract.signature.of_kind("Communicator"))))
    reads = bool(contract.told or contract.ranges)
    carries = not reads and getattr(function, "carries", False)  # what is said goes along with what it moves

    def call(*args: Any, **attrs: Any) -> Any:
        comm = args[place] if place < len(args) else contract.arrange(args, attrs)[0][contract.collective]
        if not isinstance(comm, Communicator):
            raise UsageError(f"{contract.name}: {contract.collective} is {type(comm).__name__}, expected Communicator")
        if comm.native is None:  # where calls are only recorded
            return function(*args, **attrs)
        try:
            form = tuple([_form(backend, v) for v in args]), tuple([(name, _form(backend, v)) for name, v in attrs.items()])
            if (right := known.get(form)) is None:
                if len(known) == MOST:
                    known.clear()
                right = known[form] = _Known(contract, _spec(contract, backend, *contract.arrange(args, attrs)))
            said = right.head
            if reads:
                said += _told(contract, backend, right, contract.arrange(args, attrs)[0])
        except PorthalError as error:
            said = REFUSED + str(error).encode()
        if carries and comm.native.carries and said[:1] == RIGHT and len(said) <= HEAD:
            comm.native.said = said
            try:
                return function(*args, **attrs)
            except Differ as found:
                (heard,) = found.args
            finally:
                comm.native.said = b""
        else:
            heard = comm.gather(contract.name, said)
        if not reads and said[:1] == RIGHT and heard.count(said) == comm.size:
            return function(*args, **attrs)
        knowing = comm.knowing(_agreed(contract, heard))
        named = {name: knowing if value is comm else value for name, value in attrs.items()}
        return function(*(knowing if value is comm else value for value in args), **named)

    return call


def _form(backend: Backend, value: Any) -> Any:
    """All static facts of an argument, and why the backend refuses it."""
    if isinstance(value, Communicator):
        return value.spec.rank, value.spec.size
    shape = getattr(value, "shape", None)
    return repr(value) if shape is None else (shape, value.dtype, backend.refuses_array(value))


def _spec(contract: Contract, backend: Backend, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> CallSpec:
    """The static facts of this rank's call; raises what is wrong with it."""
    for operand in contract.signature.of_kind("array"):
        if operands[operand.name] is not None and (why := backend.refuses_array(operands[operand.name])):
            raise UsageError(f"{contract.name}: {operand.name} is {why}")
    return contract.spec(operands, attrs)


def _told(contract: Contract, backend: Backend, right: _Known, operands: Mapping[str, Any]) -> bytes:
    """The numbers that this rank tells; raises where its values are out of range."""
    host = {name: backend.to_numpy(operands[name]) for name in contract.ranges if name in operands}
    contract.check_values(host, right.spec, np.asarray)
    told = contract.told(**host, facts=right.facts) if contract.told else []
    return np.array(told, np.int64).tobytes()


def _agreed(contract: Contract, heard: list[bytes]) -> np.ndarray[Any, Any]:
    """What all ranks have told; UsageError where one refuses its call, where they differ, and where it cannot be done."""
    for rank, each in enumerate(heard):
        if each.startswith(REFUSED):
            raise UsageError(f"{each[1:].decode()} (on rank {rank}; nothing was sent on any)")
    heads, told = zip(*map(_cut, heard))
    for rank, head in enumerate(heads):
        if head != heads[0]:
            first, other = (_worded(json.loads(each)) for each in (heads[0], head))
            raise UsageError(f"{contract.name}: rank {rank} calls {other} and rank 0 {first}, expected the same on all")
    numbers = np.frombuffer(b"".join(told), np.int64).reshape(len(heard), -1)
    if contract.fits:
        _, _, dims, _, attrs = json.loads(heads[0])
        if why := contract.fits(numbers, SimpleNamespace(**dims, **attrs)):
            raise UsageError(f"{contract.name}: {why} (nothing was sent on any rank)")
    return numbers


def _cut(message: bytes) -> tuple[bytes, bytes]:
    """The call in a message, and what is told behind it."""
    end = 5 + int.from_bytes(message[1:5], "little")
    return message[5:end], message[end:]


def _worded(call: list[Any]) -> str:
    name, _, dims, dtypes, attrs = call
    facts = [f"{k}={v}" for k, v in {**dims, **attrs}.items()] + [f"{k}:{v}" for k, v in dtypes.items()]
    return ",".join([name, *facts])
