"""What `porthal bench --json` wrote, read back: pytest-benchmark's JSON, with what is ours in `extra_info` and `porthal`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from porthal.bench.measured import SCHEMA
from porthal.bench.roofline import ARITHMETIC, WIDE
from porthal.bench.statistics import NOISY, OVER
from porthal.bench.text import rate_text, time_text
from porthal.conformance.report.files import read, why
from porthal.conformance.report.receipt import Reproduced, check_receipt, origin
from porthal.conformance.report.report import Report
from porthal.hal import UsageError

SHORTEST = 1e-15  # seconds
APART = 4  # how far a call's limit may be from what the limits of the whole run say: these change from minute to minute
BUSY = 0.5  # processes that wait, per processor, from which on a machine was busy with other work
MEMORIES = ("dram", "l3", "l2")  # the slowest first


class Timed(NamedTuple):
    """Seconds: a median, and the ends of its 95 % interval."""

    median: float
    low: float
    high: float


class Call(NamedTuple):
    """What is measured, with cold or warm caches."""

    op: str
    token: str
    cache: str


class Key(NamedTuple):
    """Where a call stands in the workload; several of its groups may have the same."""

    group: str
    call: Call


@dataclass(frozen=True)
class Speed:
    """One call on one backend.

    group    the workload's row: "decode, 8 requests, context 32k"; `step` is its kind, `calls` how many of these it makes
    kernel   whose it is: own, inherited, ...; `provider` is the library behind it
    cache    cold or warm
    bound    the limit of the machine that binds, `limit` the seconds which the call takes at that; "" where none is known
    noise    how far its quartiles lie apart; beyond NOISY it is compared with nothing
    limit_noise  the same of the limit
    scaled   how the call is smaller than the model's, "" where it is not
    """

    group: str
    op: str
    token: str
    backend: str
    step: str
    calls: float
    dtype: str
    flops: float
    bytes: float
    cache: str
    bound: str
    limit: float
    noise: float
    limit_noise: float
    scaled: str
    kernel: str
    provider: str
    time: Timed

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Speed:
        """Of an entry of `benchmarks`; KeyError, TypeError or ValueError where `porthal bench` writes no such thing."""
        info = entry["extra_info"]
        if info["verdict"] != "PASS":
            raise ValueError(f"{info['op']} has verdict {_said(info['verdict'])}, and a time")
        time = Timed(entry["stats"]["median"], *info["ci95"])
        known = {f.name: info[f.name] for f in fields(cls) if f.name not in ("group", "limit", "time")}
        row = cls(**known, group=entry["group"], limit=info["limit_s"], time=time)
        for name, value in (*vars(row).items(), *time._asdict().items()):
            text = cls.__annotations__.get(name, "float") == "str"
            if text and not (isinstance(value, str) and value.isprintable()):
                raise TypeError(f"{name} is {_said(value)}, expected a line of text")
            if not text and name != "time" and not number(value):
                raise TypeError(f"{name} is {_said(value)}, expected a number")
        order = (entry["stats"]["min"], info["p10"], time.median, entry["stats"]["max"])
        if not all(map(number, order)) or list(order) != sorted(order):
            raise ValueError(f"times of {row.op} are {order}: expected the least, a tenth, the middle and the most, rising")
        limited = row.limit > SHORTEST if row.bound else row.limit == 0
        if not (SHORTEST < time.low <= time.median <= time.high and limited and row.calls > 0 and row.noise >= 0):
            raise ValueError(f"times of {row.op} are {tuple(time)} and {row.limit} s: expected rising ones, all above 0")
        if row.flops < 0 or row.bytes <= 0:
            raise ValueError(f"{row.op} has {row.flops} operations and {row.bytes} bytes: expected more")
        return row

    @property
    def key(self) -> Key:
        return Key(self.group, Call(self.op, self.token, self.cache))

    @property
    def noisy(self) -> bool:
        return self.noise > NOISY

    @property
    def impossible(self) -> bool:
        """Whether it is faster than its limit permits: then the limit or the time is wrong."""
        return self.share > OVER and max(self.noise, self.limit_noise) <= NOISY

    @property
    def silent(self) -> bool:
        """Whether it is compared with nothing."""
        return self.noisy or self.impossible

    @property
    def clear(self) -> bool:
        """Whether its share of a limit says something."""
        return bool(self.bound) and max(self.noise, self.limit_noise) <= NOISY

    @property
    def words(self) -> str:
        share = f", {self.share:.0%} of {self.bound}" + ", which is impossible" * self.impossible
        return time_text(self.time.median) + (share if self.clear else "")

    @property
    def share(self) -> float:
        """Of what the machine could do; 0 where that is not known."""
        return self.limit / self.time.median


class Whole(NamedTuple):
    """A step of the demo checkpoint as a whole, with so many threads: seconds, those of the host between its ops, and how many
    these are."""

    threads: int
    seconds: float
    host: float
    ops: int

    @classmethod
    def read(cls, threads: str, said: Mapping[str, Any]) -> Whole:
        made = cls(int(threads), said["seconds"], said["host_s"], said["calls"])
        if not all(map(number, made)) or min(made) < 0:
            raise TypeError(f"a whole step is {_said(said)}")
        return made


class Missing(NamedTuple):
    """What a group asks for and was not measured, and why."""

    op: str
    token: str
    backend: str
    why: str
    group: str


@dataclass(frozen=True)
class Speeds:
    """One file: rows, the limits of the machine as measured in the same run, and all that is needed to understand them."""

    rows: tuple[Speed, ...]
    missing: tuple[Missing, ...]
    limits: Mapping[str, Mapping[str, float]]
    backends: Mapping[str, Mapping[str, Any]]
    workload: Mapping[str, Any]
    machine: Mapping[str, Any]
    date: str
    receipt: str
    whole: Mapping[str, list[Whole]]
    load: float
    reproduced: Reproduced | None = None

    @classmethod
    def of_object(cls, data: Mapping[str, Any]) -> Speeds:
        """The file's object; UsageError where `porthal bench` of this version does not write such a thing."""
        if "benchmarks" not in data:
            raise UsageError("not a benchmark file: it lacks benchmarks")
        ours = data.get("porthal")
        if not isinstance(ours, dict):
            raise UsageError("of pytest-benchmark, but not of porthal bench: its part porthal is missing")
        if ours.get("schema") != SCHEMA:
            raise UsageError(f"a benchmark file of schema {_said(ours.get('schema'))}, expected {SCHEMA}: measure again")
        try:
            made = cls(
                tuple(_read(n, row) for n, row in enumerate(data["benchmarks"])),
                tuple(Missing(*(m[name] for name in Missing._fields)) for m in ours["unmeasured"]),
                ours["limits"],
                ours["backends"],
                ours["workload"],
                data["machine_info"],
                data["datetime"],
                ours["receipt"],
                {name: [Whole.read(*step) for step in steps.items()] for name, steps in ours.get("steps", {}).items()},
                ours["load"],
                Reproduced.read(ours.get("reproduced")),
            )
            made._verify()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"a damaged benchmark file: {why(error)}; measure again") from None
        if not made.rows:
            raise UsageError("a benchmark file in which nothing was measured")
        check_receipt(data)
        return made

    def _verify(self) -> None:
        _check_objects(self.limits, self.backends, self.workload, self.machine)
        _check_objects(*self.limits.values(), *self.backends.values())
        for backend in {row.backend for row in self.rows} - self.backends.keys():
            raise ValueError(f"nothing is said of backend {backend}")
        for name, limits in self.limits.items():
            if wrong := [what for what, value in limits.items() if not number(value) or value <= 0]:
                raise TypeError(f"limit {wrong[0]} of {name} is {_said(limits[wrong[0]])}, expected a rate")
        if not number(self.load) or self.load < 0:
            raise TypeError(f"load is {_said(self.load)}, expected a number")
        for row in self.rows:
            rate = self.limits.get(row.backend, {}).get(row.bound)
            if row.bound and rate is not None:
                expected = (row.flops if row.bound in (*ARITHMETIC.values(), WIDE) else row.bytes) / rate
                if not expected / APART <= row.limit <= expected * APART:
                    raise ValueError(f"the limit of {row.op}, {row.limit} s, is not what {row.bound} says, {expected:.3g} s")
        found = [key for keys in self.by_backend.values() for key in keys]
        if len(found) != len(self.rows):
            raise ValueError("a call stands there twice")
        texts = (self.date, self.receipt, *(part for missing in self.missing for part in missing), *self.backends)
        if wrong := [text for text in texts if not (isinstance(text, str) and text.isprintable())]:
            raise TypeError(f"{_said(wrong[0])} stands where a line of text is expected")

    @cached_property
    def by_backend(self) -> dict[str, dict[Key, Speed]]:
        """Of each backend, its rows by what they measure."""
        found: dict[str, dict[Key, Speed]] = {backend: {} for backend in self.backends}
        for row in self.rows:
            found[row.backend][row.key] = row
        return {backend: rows for backend, rows in found.items() if rows}

    @property
    def origin(self) -> str:
        """Who stands for it: self-reported, or reproduced by whom."""
        return origin(self.reproduced)

    @property
    def described(self) -> str:
        """The machine in words."""
        cpu = self.machine.get("cpu")
        brand = cpu.get("brand_raw", "") if isinstance(cpu, dict) else ""
        return plain(", ".join(str(part) for part in (brand, self.machine.get("machine"), self.machine.get("node")) if part))

    @property
    def worked(self) -> str:
        """The workload in words, without how each of its calls was scaled."""
        return plain(", ".join(f"{name} {value}" for name, value in self.workload.items() if isinstance(value, str)))

    @property
    def threads(self) -> int:
        """That the backends had."""
        said = [facts.get("threads") for facts in self.backends.values()]
        return max((n for n in said if type(n) is int and n > 0), default=1)

    def place(self, backend: str) -> str:
        """Where its kernels ran."""
        return plain(self.backends[backend].get("place", "not said"))

    def said(self, backend: str) -> list[str]:
        """All that is said of a backend and of the run, line by line; versions of libraries are left to `facts`."""
        versions = self.backends[backend].get("environment")
        versions = versions if isinstance(versions, dict) else {}
        facts = [f"{name} {value}" for name, value in self.facts(backend).items() if name not in versions]
        return [", ".join(facts), self.described, self.worked, f"{self.date}, receipt {self.receipt}"]

    def facts(self, backend: str) -> dict[str, str]:
        """What else is said of a backend, as text: version, threads, device, digests of sources, versions, ..."""
        return told(self.backends[backend])


def machine(load: float, limits: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """What was wrong with the machine while it was measured."""
    if load > BUSY:
        yield (
            f"the machine was busy as the run began: {load:.1f} processes for each processor waited or ran; "
            "times by the wall clock are of that work, too"
        )
    for rates in limits:
        known = [name for name in MEMORIES if name in rates]
        for outer, inner in pairwise(known):
            if rates[inner] < rates[outer]:
                slower, faster = (rate_text(rates[name], "B/s") for name in (inner, outer))
                yield f"{inner} was measured with {slower}, below {outer} with {faster}: shares of limits say little"


def read_report(file: Path) -> Report | Speeds:
    """A report of either kind from its file; UsageError says what is wrong with it."""
    return read(file, lambda data: (Speeds if "benchmarks" in data else Report).of_object(data))


def told(backend: Mapping[str, Any]) -> dict[str, str]:
    """What a file's object says of a backend, as text."""
    found = {}
    for name, value in backend.items():
        inner = value if isinstance(value, dict) else {name: value}
        parts = {f"{name} of {part}" if name == "digest" != part else part: v for part, v in inner.items()}
        found.update({plain(part): plain(v) for part, v in parts.items() if part != "place" and v not in ("", None)})
    return found


def _read(n: int, row: Any) -> Speed:
    try:
        return Speed.read(row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"a damaged benchmark file: in row {n} of benchmarks {why(error)}; measure again") from None


def _check_objects(*parts: object) -> None:
    if wrong := [part for part in parts if not isinstance(part, dict)]:
        raise TypeError(f"{_said(wrong[0])} stands where an object is expected")


def _said(value: object) -> str:
    """A value in an error: its beginning."""
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def plain(value: object) -> str:
    """A value as one line that moves no cursor."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def number(value: object) -> bool:
    """Whether it is a number of a size with which one can go on computing."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
