"""The ranks that make a call together, as one of them sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from porthal.hal.dtypes import dtype, numpy_dtype
from porthal.hal.errors import UsageError
from porthal.hal.operands.operand import Array, Form, Operand, Parts

if TYPE_CHECKING:
    from porthal.hal.signature import OperandSpec
    from porthal.hal.wire import Wire


@dataclass(frozen=True)
class CommunicatorSpec:
    """Which rank of how many."""

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise UsageError(f"rank is {self.rank} of {self.size}: expected 0 to {self.size - 1}")


@dataclass(frozen=True, eq=False)
class Communicator(Operand):
    """A group of ranks and this one's place in it; it has no arrays. `Backend.communicator` makes that of all ranks.

    native  what carries its messages: a `Wire`, or what a backend derives from it; None where calls are only recorded
    told    in a kernel: int64 [ranks, n], what each rank has told about this call (`@op.tells`)
    """

    Spec: ClassVar[type | None] = CommunicatorSpec
    spec: CommunicatorSpec
    native: Any
    told: Any = None

    @classmethod
    def over(cls, wire: Wire) -> Communicator:
        """The communicator of a wire."""
        return cls(CommunicatorSpec(wire.rank, wire.size), wire)

    @property
    def rank(self) -> int:
        return self.spec.rank

    @property
    def size(self) -> int:
        return self.spec.size

    def gather(self, what: str, message: bytes) -> list[bytes]:
        """The messages of all ranks, see `Wire.gather`."""
        found: list[bytes] = self.native.gather(what, message)
        return found

    def exchange(self, what: str, arrays: Mapping[str, Array | None]) -> list[dict[str, Array | None]]:
        """The NumPy arrays of all ranks, by name: slow, and all that the reference needs."""
        return [_unpacked(message) for message in self.gather(what, _packed(arrays))]

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """UsageError on every rank where these facts are not the same on all."""
        heard = [json.loads(message) for message in self.gather(what, json.dumps(facts).encode())]
        for rank, theirs in enumerate(heard):
            for name, value in theirs.items():
                if value != (first := heard[0].get(name)):
                    raise UsageError(f"{what}: {name} is {value} on rank {rank}, expected {first} as on rank 0")

    def group(self, ranks: Sequence[int]) -> Communicator | None:
        """That of some of the ranks, in ascending order; None on the others. Every rank calls it, with the same ranks."""
        wire = self.native.group(ranks)
        return None if wire is None else Communicator.over(wire)

    def close(self) -> None:
        """Leave the group."""
        self.native.close()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- as an operand -----------------------------------------------------------------------------------------------

    def leaves(self) -> tuple[Any, ...]:
        return ()

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return declared.matched((self.size,))

    @property
    def dtype(self) -> str:
        return ""

    def parts(self) -> Parts:
        return {}

    @classmethod
    def form(cls, spec: CommunicatorSpec) -> Form:
        return {}

    def place(self, services: Any, into: Any = None) -> Communicator:
        return self

    def carry(self, source: Any, target: Any) -> Communicator:
        return self

    def knowing(self, told: Array) -> Communicator:
        """This one in a call of which each rank has told something."""
        return replace(self, told=told)


def _packed(arrays: Mapping[str, Array | None]) -> bytes:
    facts = [[name, None if a is None else [dtype(a), list(a.shape)]] for name, a in arrays.items()]
    head = json.dumps(facts).encode()
    data = [np.ascontiguousarray(a).reshape(-1).view(np.uint8).tobytes() for a in arrays.values() if a is not None]
    return b"".join([len(head).to_bytes(8, "little"), head, *data])


def _unpacked(message: bytes) -> dict[str, Array | None]:
    at = 8 + int.from_bytes(message[:8], "little")
    found: dict[str, Array | None] = {}
    for name, form in json.loads(message[8:at]):
        found[name] = None
        if form is not None:
            kind, shape = numpy_dtype(form[0]), form[1]
            count = int(np.prod(shape, dtype=np.int64))
            found[name] = np.frombuffer(message, kind, count, at).reshape(shape) if count else np.empty(shape, kind)
            at += count * kind.itemsize
    return found
