"""What the host spends on a decode step of the demo model where nothing is computed: each call of PyTorch or of a library
gives back the arrays that it gave when the step was recorded.

`python -m tests.host_cost ascend npu` prints the times of a vendor's backend and of the torch base on the same emulated device,
whose steps take turns in one process, and their ratio.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from porthal.backends.torch.interfaces.library import Library
from porthal.model.generate import step
from tests import demo

KEYS = 64  # that the step's row sees
ROUNDS = 200
PATCHED = {"moore_threads": ("rms_norm",)}  # of torch itself, in the vendor's build


class Recorded(TorchDispatchMode):
    """The results of a step's calls in their order, given back in that order when it is made again."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Any] = []
        self.left: Iterator[Any] | None = None  # None: they are recorded
        self.inside = False  # a vendor's call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left is not None:
            return next(self.left)
        return self._kept(func(*args, **kwargs or {}))

    def _kept(self, result: Any) -> Any:
        if not self.inside:
            self.results.append(result)
        return result

    def call(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.left is not None:
                return next(self.left)
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            result = function(*args, **kwargs)
            self.inside = False
            return self._kept(result)

        return run

    @contextmanager
    def vendors(self, functions: list[tuple[Any, str]]) -> Iterator[None]:
        """Calls of these, each (owner, name), are calls of ours."""
        held = [(owner, name, getattr(owner, name)) for owner, name in functions]
        for owner, name, function in held:
            setattr(owner, name, self.call(function))
        try:
            yield
        finally:
            for owner, name, function in held:
                setattr(owner, name, function)


class Step:
    def __init__(self, backend: str, functions: list[tuple[Any, str]]) -> None:
        self.again = step(demo.model(backend, "bfloat16"), [(1, KEYS)])
        self.again()
        self.functions, self.recorded = functions, Recorded()
        with self.recorded.vendors(functions), self.recorded:
            self.again()

    def seconds(self) -> float:
        self.recorded.left = iter(self.recorded.results)
        with self.recorded.vendors(self.functions), self.recorded:
            start = time.perf_counter()
            self.again()
            taken = time.perf_counter() - start
        assert next(self.recorded.left, None) is None  # it was the same step
        return taken


@torch.inference_mode()  # elsewhere a view of a weight cannot be given back twice
def measured(vendor: str, base: str) -> tuple[float, float]:
    """Median seconds of a step of a vendor's backend, and of another backend."""
    importlib.import_module(f"porthal.backends.{vendor}.emulated").install()
    demo.model(vendor, "bfloat16")  # after which its libraries are known
    functions = [(library, name) for library in Library.known.values() for name in library.calls if name != "/"]
    functions = [(library, name) for library, name in functions if library.lacks(name) is None]
    steps = Step(vendor, [*functions, *((torch, name) for name in PATCHED.get(vendor, ()))]), Step(base, [])
    times = [[each.seconds() for each in steps] for _ in range(ROUNDS)]
    own, others = (statistics.median(column) for column in zip(*times))
    return own, others


if __name__ == "__main__":
    name, kind = sys.argv[1:]
    own, others = measured(name, f"torch:{kind}:0" if kind != "cpu" else "torch")
    print(f"{name} {own * 1e3:.2f} ms, the torch base {others * 1e3:.2f} ms: {own / others:.2f}")
