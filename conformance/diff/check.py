"""Does a port lie? A minute's look: the calls of a model in its own sizes, and what the demo checkpoint computes with them."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.plan import among, large
from porthal.conformance.cases.plan import cases as planned
from porthal.conformance.cases.profiles import MODEL, profile_of
from porthal.conformance.diff.curve import DTYPE, Curve, Probe, measure, probes, stored
from porthal.conformance.level import BRING_UP
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.results import Result, counted, replay_command
from porthal.conformance.report.waivers import waive
from porthal.conformance.runner.workers import Bounds, Pool, Worker, ends_with
from porthal.conformance.verdicts import Judgement
from porthal.hal import PorthalError, bind, contracts, create, running
from porthal.hal.backend import NOT_TAKEN
from porthal.hal.errors import message_of
from porthal.model.load import DEMO, load, opened
from porthal.model.quantising import quantise

if TYPE_CHECKING:
    from rich.console import Group

Progress = Callable[[int, int, str], None]
PATIENCE = 600.0  # seconds for the demo checkpoint


@dataclass(frozen=True)
class Check:
    """What was found: of each call its result, of the demo checkpoint its probes."""

    backend: str
    facts: Facts
    model: str
    results: tuple[Result, ...]
    probes: tuple[Probe, ...]
    seconds: float
    schemes: tuple[str, ...] = ()

    @property
    def failed(self) -> list[str]:
        """The names of what does not hold. Data that an own kernel does not take go to another in a model, and are told."""
        left = [r for r in self.results if r.verdict in ("UNCLAIMED", "WAIVED") and NOT_TAKEN not in r.message]
        calls = ["calls"] if left or any(r.failed for r in self.results) else []
        return [*calls, *(probe.name for probe in self.probes if not probe.holds)]

    @property
    def exit_code(self) -> int:
        """0 where all holds, 1 where something does not, 2 where no kernel of the chip's own was called."""
        if self.failed:
            return 1
        return 0 if any(r.own and r.tested for r in self.results) else 2

    @property
    def verdict(self) -> str:
        where = f"{self.backend} ({self.facts.place}) in {DTYPE}{self._under}"
        said = {
            0: f"{where} computes what it should, as far as {self.seconds:.0f} s show",
            1: f"{where} does not compute what it should: {', '.join(self.failed)}",
            2: f"{where} has no own kernel among these calls: nothing of the chip was tested",
        }
        return said[self.exit_code]

    @property
    def _under(self) -> str:
        return f" under {', '.join(self.schemes)}" if self.schemes else ""

    def lines(self) -> Iterator[str]:
        passed = [r for r in self.results if r.verdict == "PASS"]
        whose = counted(Counter(r.status for r in passed))
        sizes = f"in the sizes of {self.model} and of the demo checkpoint{', and' * bool(self.schemes)}{self._under}"
        yield f"calls: {len(passed)} of {len(self.results)} pass, {sizes} ({whose or 'none'})"
        told = set()
        for r in self.results:
            if r.verdict != "PASS" and (r.op, r.verdict) not in told:
                told.add((r.op, r.verdict))
                yield f"  {r.verdict}: {r.op}: {r.message or r.reason}"
                yield f"  {replay_command(r.token, self.backend, place=self.facts.place)}"
        yield from (f"{probe.name}: {'' if probe.holds else 'NOT as it must be, '}{probe.words}" for probe in self.probes)
        yield self.verdict

    def table(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        return Group(*map(Text, self.lines()))


def check(
    backend: str,
    model: str = MODEL,
    emulated: bool = False,
    bounds: Bounds | None = None,
    progress: Progress = lambda done, of, what: None,
    form: str = "",
    caches: Sequence[str] = (),
) -> Check:
    """Each call of `model` (a directory, or the name of a published one) and of the demo checkpoint, judged at the level of
    bring-up in bfloat16; then the demo checkpoint's curve against the stored one. The backend runs in processes of its own.

    form    of `porthal.model.quantising.FORMATS`: in which the demo checkpoint is written first
    caches  schemes of its caches
    Then calls under these schemes are judged, too, and the curve against the reference's under the same.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        demo = Demo(Path(folder) / form if form else DEMO, tuple(caches))
        if form:
            quantise(DEMO, demo.directory, form)
        schemes = demo.schemes()
        cases = [case for each in (model, str(DEMO)) for case in _calls(each)]
        cases = list(dict.fromkeys([*cases, *_coded(model, schemes)]))
        results = []
        with Pool(backend, BRING_UP.name, emulated, bounds or Bounds(), len(cases)) as pool:
            for result in pool.judged(cases):
                results.append(waive(result, pool.facts.waivers))
                progress(len(results), len(cases) + 1, result.op)
            facts = pool.facts
        progress(len(cases), len(cases) + 1, "the demo checkpoint")
        found = tuple(_curve(backend, emulated, demo))
    progress(len(cases) + 1, len(cases) + 1, "")
    return Check(backend, facts, model, tuple(results), found, time.monotonic() - began, schemes)


@dataclass(frozen=True)
class Demo:
    """The demo checkpoint as it is written, and the schemes of its caches."""

    directory: Path = DEMO
    caches: tuple[str, ...] = ()

    def schemes(self) -> tuple[str, ...]:
        """Those of its matrices, as far as calls have any, and of its caches."""
        return (*dict.fromkeys(opened(self.directory, self.caches)[1].kept().values()), *self.caches)


def _coded(model: str, schemes: Sequence[str]) -> Iterator[Case]:
    """What is planned of a model's ops under these schemes, in whatever dtype."""
    for op, _ in profile_of(model).calls:
        dtypes = ((first_float(contracts()[op]), DTYPE),)
        for case in planned(contracts()[op], BRING_UP.name):
            if case.schemes and {name for _, name in case.schemes} <= set(schemes):
                yield replace(case, dtypes=dtypes)


def _calls(model: str) -> Iterator[Case]:
    """The calls of a model in its own sizes."""
    for op, _ in profile_of(model).calls:
        yield from (case for case in large(contracts()[op], BRING_UP.name, model) if among(case, [DTYPE]))


def _curve(backend: str, emulated: bool, demo: Demo) -> Iterator[Probe]:
    """The probes of the demo checkpoint, or one that says why there are none. Under schemes the reference is measured, too."""
    known = stored()
    with ExitStack() as stack:
        names = [(backend, emulated), ("reference", False)]
        workers = [Worker((*name, demo), __name__) for name in names[: 2 if demo != Demo() else 1]]
        for worker in workers:
            stack.callback(worker.close)
        found = [each.received() if wait([each.pipe], PATIENCE) else f"no answer within {PATIENCE:g} s" for each in workers]
    curves = [each for each in found if isinstance(each, Curve)]
    if len(curves) == len(found):
        yield from probes(curves[0], known, *curves[1:])
    else:
        wrong = next(each for each in found if not isinstance(each, Curve))
        yield Probe("the demo checkpoint", False, wrong.message if isinstance(wrong, Judgement) else str(wrong))


def serve(descriptor: int, parent: int) -> None:
    """In a worker: the curve of a backend, or what is wrong in one sentence."""
    os.set_inheritable(descriptor, False)
    ends_with(parent)
    faulthandler.enable()
    pipe = Connection(descriptor)
    with suppress(EOFError, BrokenPipeError):  # the parent is gone
        pipe.send(_measured(*pipe.recv()))


def _measured(name: str, emulated: bool, demo: Demo) -> Any:
    try:
        backend = create(name, emulated)
        with running(backend):
            return measure(load(demo.directory, bind(backend=backend), dtype=DTYPE, caches=demo.caches), stored().texts)
    except PorthalError as error:
        return str(error)
    except Exception as error:  # of the plugin's
        return message_of(error)
