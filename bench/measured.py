"""What a run has measured, one JSON line each as it comes, so that one that was stopped can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from porthal.bench.roofline import Limit, Work, limit
from porthal.bench.statistics import Summary, quantile
from porthal.hal import UsageError

SCHEMA = 1
SUSTAINED = 0.9  # of the samples of a limit, those below what a kernel is held to


@dataclass(frozen=True)
class Measured:
    """Seconds of one call on one backend, and the device's peaks as they were between these samples. Without samples `why`
    says what stood against it."""

    token: str
    backend: str
    cache: str
    verdict: str = ""
    why: str = ""
    kernel: str = ""
    provider: str = ""
    work: Work | None = None
    samples: tuple[float, ...] = ()
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    calls: int = 1  # in a row, of which each sample is the mean
    holds: Mapping[str, float] = field(default_factory=dict)  # bytes that the device's caches have room for

    @property
    def summary(self) -> Summary:
        return Summary.of(self.samples)

    @property
    def limit(self) -> Limit:
        """What the call is held to: of each peak what it sustains, not its luckiest sample."""
        assert self.work
        return limit(self.work, {name: sustained(found) for name, found in self.rates.items()}, self.holds)

    @property
    def noisy(self) -> bool:
        """Whether nothing is said of its share: the time is noisy, or the limit that binds it was."""
        return self.summary.noisy or Summary.of(self.rates.get(self.limit.bound, (1.0,))).noisy

    @property
    def share(self) -> float:
        """Of the device's best, what the median reaches; 0 where no limit is known."""
        return self.limit.share(self.summary.median)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Measured:
        work = facts["work"] and Work(**facts["work"])
        rates = {name: tuple(map(float, found)) for name, found in facts["rates"].items()}
        made = cls(**{**facts, "work": work, "samples": tuple(map(float, facts["samples"])), "rates": rates})
        if made.samples and not (work and min(made.samples) > 0):
            raise ValueError("a time is not above 0")
        return made


def sustained(rates: tuple[float, ...]) -> float:
    return quantile(sorted(rates), SUSTAINED)


class Kept:
    """The file of one run: a line of facts about it, then one per measurement. With `resume`, what is there is kept.

    Raises UsageError for the file of another run: of another workload, number of threads, backend, or sources.
    """

    def __init__(self, file: Path, head: Mapping[str, Any], resume: bool) -> None:
        whole = {"bench": SCHEMA, **head}
        lines = _lines(file) if resume and file.exists() else []
        self.known: list[Measured] = []
        if lines:
            found = _parsed(file, lines[0])
            for name, now in json.loads(json.dumps(whole)).items():
                if found.get(name) != now:
                    was = json.dumps(found.get(name))
                    raise UsageError(f"{file} is of a run with {name} {was}, this one has {json.dumps(now)}: give another file")
            try:
                self.known = [Measured.read(_parsed(file, line)) for line in lines[1:]]
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file} is damaged ({error}): give another file") from None
            os.truncate(file, sum(len(line.encode()) for line in lines))
        self._file = file.open("a" if lines else "w", encoding="utf-8")
        if not lines:
            self._write(whole)

    def add(self, measured: Measured) -> None:
        self._write(asdict(measured))

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(file: Path) -> list[str]:
    """The whole lines: the last may have been cut off when the run was stopped."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError:
        raise _other(file) from None
    return lines[:-1] if lines and not lines[-1].endswith("\n") else lines


def _parsed(file: Path, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _other(file)
    return value


def _other(file: Path) -> UsageError:
    return UsageError(f"{file} is not what a benchmark run keeps: give the file of a stopped run, or a new name")
