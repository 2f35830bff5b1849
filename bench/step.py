"""What a model's step takes beside its ops: Python, batches, plans, copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from porthal.conformance.cases.compositions import Request
from porthal.hal import Backend, bind, narrow
from porthal.hal.several import Function
from porthal.model.config import Config
from porthal.model.generate import step
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, needed, opened, profile, stepped

STEPS, FIRST = 60, 5  # steps that are timed, and those before them
LONG, FEW = 30.0, 3  # seconds of all steps, after which so many of them are enough
DEVIATION = 0.02  # of random weights: transformers' initializer_range


@dataclass(frozen=True)
class Whole:
    """A step that is timed as a whole: of a model with these requests and drafts; without a config, of the demo checkpoint,
    with caches of these schemes."""

    group: str
    requests: tuple[Request, ...]
    drafts: int = 0
    config: Config | None = None
    caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a whole step, and of what is between its ops, as medians by the backend's clock."""

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


class Random:
    """A checkpoint that is made as it is read: vectors of ones, and matrices of small random numbers that repeat themselves."""

    def __init__(self) -> None:
        drawn = np.random.default_rng(0).standard_normal(2**20 - 3)
        self.numbers = narrow(DEVIATION * drawn, "bfloat16")

    def holds(self, prefix: str) -> bool:
        return not prefix.endswith("experts.gate_up_proj")  # one by one, as GLM-5's own files have them

    def read(self, name: str, shape: Sequence[int], rows: slice) -> np.ndarray[Any, Any]:
        made = (len(range(*rows.indices(shape[0]))), *shape[1:])
        return np.resize(self.numbers, made) if len(shape) > 1 else np.ones(made, self.numbers.dtype)


def whole_step(backend: Backend, whole: Whole, dtype: str, clock: Callable[[], float]) -> StepTime:
    """Steps of a model from one place; what is wrapped around its ops, or around a captured graph of them, is not counted."""
    ops, drafts = Clocked(clock), whole.drafts
    config, source = (whole.config, Random()) if whole.config else opened(DEMO, whole.caches)
    requests = [(r.q, r.kv) for r in whole.requests]
    captured = backend.captures and not drafts and all(q == 1 for q, _ in requests)
    wrap = [] if captured else [ops]
    binding = bind(profile=profile(config, dtype), needed=needed(config, drafts), backend=backend, wrap=wrap)
    if captured:
        vars(backend)["capture"] = lambda run: ops("capture", type(backend).capture(backend, run))
    model = Glm5(config, source, binding, dtype)
    model.config = replace(config, eos_token_id=())
    made = step(model, requests, drafts)
    each = _empty(clock)
    times, hosts = [], []
    until = time.perf_counter() + LONG
    for n in range(FIRST + STEPS):
        ops.spent, ops.calls = 0.0, 0
        start = clock()
        made()
        spent = clock() - start - ops.calls * each
        if n >= FIRST or spent > 1:
            times.append(spent)
            hosts.append(max(spent - ops.spent, 0.0))
        if len(times) >= FEW and time.perf_counter() > until:
            break
    return StepTime(median(times), median(hosts), len(stepped(config, requests, dtype, drafts)))


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
