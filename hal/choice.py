"""Which kernel a binding has chosen for each op, and what that says about the chip."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from porthal.hal.backend import Kernel

Status = Literal["own", "inherited", "composed", "fallback", "missing"]


@dataclass(frozen=True)
class Choice:
    """Which kernel a binding uses for an op. `own` proves something about the chip; the other words do not."""

    op: str
    status: Status
    owner: str
    provider: str
    reason: str
    tie: str = "lowest"
    batch_invariant: bool = False

    @classmethod
    def of(cls, op: str, status: Status, kernel: Kernel, reason: str) -> Choice:
        return cls(op, status, kernel.owner, kernel.provider, reason, kernel.tie, kernel.batch_invariant)


class Choices(Mapping[str, Choice]):
    """The choice of every op, made when it is first asked for: most bindings are asked for few of them.

    Those of collectives are answered and not listed: what they prove is not about one device.
    """

    def __init__(self, ops: Collection[str], collectives: Collection[str], choose: Callable[[str], Choice]) -> None:
        self._ops, self._collectives, self._choose = ops, collectives, choose
        self._made: dict[str, Choice] = {}

    def __getitem__(self, op: str) -> Choice:
        if op not in self._made:
            if op not in self._ops and op not in self._collectives:
                raise KeyError(op)
            self._made[op] = self._choose(op)
        return self._made[op]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ops)

    def __len__(self) -> int:
        return len(self._ops)
