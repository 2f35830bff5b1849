"""Every call that something makes on a binding: for traces, profiles, the parts of composites, diff and benchmarks.

Not for exports, whose graph is which array goes from call to call, nor for captures, which keep what is launched below calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from porthal.hal.abstract import Abstract
from porthal.hal.binding import Binding, bind
from porthal.hal.contract import CallSpec, contracts, operators
from porthal.hal.several import Function

Heard = Callable[[str, Sequence[Any], Mapping[str, Any]], None]


class Recorder:
    """A wrap for `bind`: calls `heard` before each call; `path` holds the ops being called, outermost first."""

    def __init__(self, heard: Heard = lambda op, args, kwargs: None) -> None:
        self.heard = heard
        self.path: list[str] = []

    def __call__(self, op: str, function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.path.append(op)
            try:
                self.heard(op, args, kwargs)
                return function(*args, **kwargs)
            finally:
                self.path.pop()

        return call


def recorded(
    run: Callable[[Binding], Any], expand: Collection[str] | None = None
) -> list[tuple[str, CallSpec]]:
    """Every call that `run` makes on a binding without values, in order, and those inside the composites of `expand`
    (None: inside all)."""
    known, calls = operators(), []

    def heard(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        calls.append((op, known[op].spec(*known[op].arrange(args, kwargs))))

    _run(run, Recorder(heard), known if expand is None else expand)
    return calls


def callers(run: Callable[[Binding], Any]) -> dict[str, set[str]]:
    """The ops that `run` calls, and those inside composites, each with the ops that call it: "" is `run` itself."""
    found: dict[str, set[str]] = {}

    def heard(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        found.setdefault(op, set()).add(recorder.path[-2] if recorder.path[1:] else "")

    recorder = Recorder(heard)
    _run(run, recorder, contracts())
    return found


def _run(run: Callable[[Binding], Any], recorder: Recorder, expand: Collection[str]) -> None:
    composed = {op: "composed" for op, contract in contracts().items() if contract.decomposition and op in expand}
    run(bind(backend=Abstract(), overrides=composed, fallback="error", check=False, wrap=[recorder]))
