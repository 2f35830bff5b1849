"""What a binding offers beside ops: arrays and operands of its backend, and calls captured as a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from porthal.hal.backend import Backend
from porthal.hal.dtypes import dtype
from porthal.hal.errors import Unavailable, UsageError
from porthal.hal.operands import Batch, Pages, PagesSpec

COPIES = ("from_numpy", "to_numpy")  # all that crosses between host and device goes through these


class Services:
    """Services of a backend; one that gives nothing is refused, since what then failed would name anything but the backend.

    What takes `into` keeps its memory, so that a captured call sees the new values: use what is returned from then on.
    """

    backend: Backend

    def to_numpy(self, x: Any) -> np.ndarray[Any, Any]:
        """See `Backend.to_numpy`."""
        host: np.ndarray[Any, Any] = self._made("to_numpy", x)
        return host

    def from_numpy(self, x: np.ndarray[Any, Any], into: Any = None) -> Any:
        """An array from a NumPy array, or the array `into` overwritten, which has the same shape and dtype."""
        made = self._made("from_numpy", x)
        if into is None:
            return made
        self._check_form((tuple(x.shape), dtype(x)), (tuple(into.shape), dtype(into)))
        return self._made("write", into, made)

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        """See `Backend.alloc_pages`."""
        pages: Pages = self._made("alloc_pages", spec)
        return pages

    def from_logical(self, spec: Any, arrays: dict[str, np.ndarray[Any, Any]], into: Any = None) -> Any:
        """See `Backend.from_logical`; `into` has the same spec."""
        if into is not None:
            self._check_form(spec, into.spec)
        return self._made("from_logical", spec, arrays, into)

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        """What the kernels need of a batch, once per step; `into` is one that was planned, to which this is padded.

        UsageError where the batch needs more than that one has, see `Batch.within`.
        """
        if into is None:
            planned: Batch = self._made("plan", batch)
            return planned
        planned = self._made("plan", batch.within(into), into)
        return planned

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The calls that `run` makes, as a graph: what is returned repeats them on the same memory, with the same Python
        values, and returns the same arrays each time, overwritten.

        New values come by `into`. Rows, requests, table columns and the longest request are those of the batch with which
        it was captured; more is refused. Before the first replay all that `run` writes is undefined.
        NotClaimed where the backend captures no graphs, UsageError where `run` copies between host and device.
        """
        with _sealed(self.backend):
            replay: Callable[[], Any] = self._made("capture", run)
        return replay

    def _made(self, service: str, *args: Any) -> Any:
        if (made := getattr(self.backend, service)(*args)) is None:
            raise Unavailable(f"{self.backend}: {service} returned None")
        return made

    def _check_form(self, given: Any, held: Any) -> None:
        if given != held:
            raise UsageError(f"{self.backend} cannot write {given} into the memory of {held}: give what has the same form")


@contextmanager
def _sealed(backend: Backend) -> Iterator[None]:
    """While it lasts, nothing crosses between host and device: a replay would repeat the value of now, or nothing."""

    def refusing(name: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise UsageError(
                f"{backend} captures a graph, in which {name} cannot be repeated: copy between host and device before the "
                "capture or after a replay, and bind without checks"
            )

        return refuse

    before = {name: vars(backend)[name] for name in COPIES if name in vars(backend)}
    vars(backend).update({name: refusing(name) for name in COPIES})
    try:
        yield
    finally:
        for name in COPIES:
            del vars(backend)[name]
        vars(backend).update(before)
