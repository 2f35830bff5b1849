"""What a run has measured, one JSON line each as it comes, so that one that was stopped can be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porthal.bench.roofline import Limit, Work, limit
from porthal.bench.statistics import NOISY, OVER, Summary, quantile
from porthal.conformance.report.journal import Lines

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
    apart: float = 0.0  # of several ranks: how much sooner the first is done, of what the last one takes

    @property
    def summary(self) -> Summary:
        return Summary.of(self.samples)

    @property
    def limit(self) -> Limit:
        """What the call is held to: of each peak what it sustains, not its luckiest sample."""
        assert self.work
        return limit(self.work, {name: sustained(found) for name, found in self.rates.items()}, self.holds)

    @property
    def limit_noise(self) -> float:
        """Of the limit that binds it."""
        return Summary.of(self.rates.get(self.limit.bound, (1.0,))).noise

    @property
    def noisy(self) -> bool:
        """Whether nothing is said of its share: the time is noisy, or the limit that binds it was."""
        return self.summary.noisy or self.limit_noise > NOISY

    @property
    def impossible(self) -> bool:
        """Whether it was faster than the device can be: then the limit or the time is wrong."""
        return not self.noisy and self.share > OVER

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


class Journal(Lines[Measured]):
    """That of a benchmark run: of one workload, number of threads, and set of backends with their sources."""

    what = "journal of a benchmark run"

    def __init__(self, file: Path, head: Mapping[str, Any], resume: bool) -> None:
        super().__init__(file, {"bench": SCHEMA, **head}, resume)

    @staticmethod
    def read(lines: list[dict[str, Any]]) -> list[Measured]:
        return list(map(Measured.read, lines))
