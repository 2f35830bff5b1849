"""What a model's step takes beside its ops: Python, batches, plans, copies."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from porthal.conformance.cases.compositions import Request
from porthal.hal import Backend, bind
from porthal.hal.binding import Function
from porthal.model.generate import step
from porthal.model.load import DEMO, load

STEPS, FIRST = 60, 5  # steps that are timed, and those before them


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of the demo checkpoint, as medians: of the wall clock, and of the backend's clock between its ops."""

    seconds: float
    host: float
    calls: int


class Clocked:
    """A wrap for `bind`: what the ops take that the model itself calls, and how many there are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.depth = clock, 0
        self.spent, self.calls = 0.0, 0

    def __call__(self, op: str, function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            start = self.clock()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += (self.clock() - start) * (self.depth == 1)
                self.calls += self.depth == 1
                self.depth -= 1

        return call


def demo_step(backend: Backend, requests: tuple[Request, ...], dtype: str, clock: Callable[[], float]) -> StepTime:
    """Steps of the demo checkpoint from one place; what the wrap itself takes is not counted."""
    ops = Clocked(clock)
    model = load(DEMO, bind(backend=backend, wrap=[ops]), dtype=dtype)
    model.config = replace(model.config, eos_token_id=())
    made = step(model, [(r.q, r.kv) for r in requests])
    each = _empty(clock)
    walls, hosts = [], []
    for n in range(FIRST + STEPS):
        ops.spent, ops.calls = 0.0, 0
        wall, start = time.perf_counter(), clock()
        made()
        spent, wall = clock() - start, time.perf_counter() - wall
        if n >= FIRST:
            walls.append(wall)
            hosts.append(max(spent - ops.spent - ops.calls * each, 0.0))
    return StepTime(median(walls), median(hosts), ops.calls)


def _empty(clock: Callable[[], float], n: int = 2000) -> float:
    """What the wrap adds around an op that does nothing, beyond what it counts as the op's and what a call takes anyway."""

    def nothing() -> None:
        pass

    ops = Clocked(clock)
    wrapped, start = ops("", nothing), clock()
    for _ in range(n):
        wrapped()
    added = clock() - start - ops.spent
    start = clock()
    for _ in range(n):
        nothing()
    return max(added - (clock() - start), 0.0) / n
