"""One case's result, and one op's results together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.discrepancies import named_for
from porthal.conformance.level import BRING_UP
from porthal.conformance.verdicts import NEUTRAL, UNTESTED, Judgement, Verdict
from porthal.hal import Choice, emulatable

LARGEST = 1e300  # written for an infinite figure
REFUSAL = "refusal"
# Whose kernel ran; `refusal`: none, as the call is wrong on purpose and the check before the kernel answers it; `missing`:
# none takes the call; `unknown`: the process ended before one was chosen.
STATUSES = ("own", "inherited", "composed", "fallback", REFUSAL, "missing", "unknown")


@dataclass(frozen=True)
class Result:
    """One case's verdict, and whose kernel it speaks of.

    token     repeats the case; op and dtype (of its first float) are read off it
    verdict   one of `Verdict`, with its message where it is not PASS, and a note where it is
    status    whose kernel ran: one of STATUSES; `owner` is the backend that wrote it, `provider` the library behind it
    worst     the largest |error| / budget, found `at`
    ratio, z  the ratio to an ideal chip's error, and the bias of the rounding direction
    few       the statistics that were not judged, because a result has too few samples of them
    seconds   to build, execute and judge
    foreign   of a composition: the ops in it that are not the chip's own
    tie       the kernel's declared order of ties
    invariant whether it is declared that a row's bits do not depend on the other rows: of a composition, by all its parts
    waived    what the verdict was before a waiver with this `reason` made it WAIVED
    """

    token: str
    op: str
    dtype: str
    verdict: str
    message: str
    status: str
    owner: str
    provider: str
    worst: float
    at: str
    ratio: float
    z: float
    note: str
    seconds: float
    foreign: tuple[str, ...] = ()
    tie: str = "lowest"
    waived: str = ""
    reason: str = ""
    few: tuple[str, ...] = ()
    invariant: bool = False

    @classmethod
    def read(cls, kept: dict[str, Any]) -> Result:
        """A result from what JSON holds of it."""
        return cls(**kept | {name: tuple(kept[name]) for name in ("foreign", "few")})

    @classmethod
    def of(
        cls,
        case: Case,
        judged: Judgement,
        choice: Choice | None,
        seconds: float,
        foreign: tuple[str, ...] = (),
        invariant: bool = False,
    ) -> Result:
        none = "missing" if judged.verdict == "UNCLAIMED" else "unknown"
        choice, status = (None, REFUSAL) if choice and case.fault else (choice, choice.status if choice else none)
        return cls(
            token=case.token,
            op=case.op,
            dtype=next((d for _, d in case.dtypes), "fixed"),
            verdict=judged.verdict,
            message=judged.message,
            status=status,
            owner=choice.owner if choice else "",
            provider=choice.provider if choice else "",
            worst=_finite(judged.worst),
            at=judged.at,
            ratio=_finite(judged.ratio),
            z=_finite(judged.z),
            note=judged.note,
            seconds=round(seconds, 4),
            foreign=foreign,
            tie=choice.tie if choice else "lowest",
            few=judged.few,
            invariant=invariant and choice is not None,
        )

    @property
    def failed(self) -> bool:
        return self.verdict not in NEUTRAL

    @property
    def tested(self) -> bool:
        return self.verdict not in UNTESTED

    @property
    def own(self) -> bool:
        """Whether it speaks of the chip alone: an own kernel, or a composition of own kernels alone."""
        return self.status == "own" or (self.status == "composed" and not self.foreign)

    def explain(self) -> str:
        """The verdict in words."""
        whose = {
            "own": f"{self.owner}'s own kernel",
            "inherited": f"the kernel inherited from {self.owner}",
            "composed": "the default composition of other ops",
            REFUSAL: "the check before the kernel",
            "unknown": "a kernel that was not chosen yet",
        }.get(self.status, "no kernel")
        lines = [f"{self.verdict}: {self.op} by {whose}" + (f" ({self.provider})" if self.provider else "")]
        if self.message:
            lines.append(self.message)
        if self.worst:
            known = self.ratio and self.verdict == "PASS"  # a failure says itself by how much
            overall = f"; the overall error is {figure(self.ratio)} times that of an ideal chip" if known else ""
            lines.append(f"The largest error is {figure(self.worst)} of its budget, at {self.at}{overall}.")
        if self.note:
            lines.append(self.note)
        lines += [f"Named for discrepancy {d.number}: {d.what} ({d.sources})" for d in named_for(self.token)]
        if self.waived:
            lines.append(f"{self.waived} was waived: {self.reason}")
        return "\n".join(lines)


def untried(kernels: Mapping[str, Sequence[str]], results: Sequence[Result]) -> list[str]:
    """Of these own kernels of ops that were asked for, given as their providers, those that no call reached."""
    reached = {(r.op, r.provider) for r in results if r.tested and r.own}
    unknown = {r.op for r in results if r.status == "unknown"}  # nobody knows whose kernels these calls reached
    asked = dict.fromkeys(r.op for r in results if r.op not in unknown)
    pairs = [(op, provider) for op in asked for provider in kernels.get(op, ()) if (op, provider) not in reached]
    return [op + (f" ({provider})" if provider else "") for op, provider in pairs]


NOT_RUN = "not run again"


def counted(statuses: Counter[str]) -> str:
    """Own first: "12 own, 8 inherited, 4 refusals"."""
    words = {REFUSAL: f"{REFUSAL}s"}
    return ", ".join(f"{statuses[s]} {words.get(s, s)}" for s in STATUSES if statuses[s])


def reused(passed: Result, owner: str) -> Result:
    """What a base has passed, as a result of the backend that inherits it unchanged."""
    note = f"{NOT_RUN}: {owner} has passed it with the same kernels, services, sources and versions"
    result = replace(passed, note=note, seconds=0.0)
    if result.status in ("composed", REFUSAL):
        return result
    return replace(result, status="inherited", owner=owner, foreign=(result.op,))


def verify_results(results: Sequence[Result]) -> None:
    """Raise TypeError or ValueError where a run writes no such results."""
    if not results:
        raise ValueError("it has no results")
    kinds = {n: get_origin(kind) or kind for n, kind in get_type_hints(Result).items()}
    words = {str: "text", float: "a number", tuple: "a list of text", bool: "true or false"}
    closed = {"verdict": get_args(Verdict), "status": STATUSES}
    for i, result in enumerate(results, 1):
        for name, kind in kinds.items():
            value = getattr(result, name)
            items = value if kind is tuple else ()
            if (type(value) is not kind and (kind, type(value)) != (float, int)) or any(type(v) is not str for v in items):
                raise TypeError(f"{name} of result {i} is {value!r}, expected {words[kind]}")
            if value not in closed.get(name, (value,)):
                raise ValueError(f"{name} of result {i} is {value!r}, expected one of {', '.join(closed[name])}")


@dataclass(frozen=True)
class Row:
    """One op's line of the summary."""

    op: str
    results: Sequence[Result]

    @cached_property
    def verdicts(self) -> Counter[str]:
        return Counter(r.verdict for r in self.results)

    @property
    def failed(self) -> int:
        return sum(r.failed for r in self.results)

    @property
    def passed(self) -> int:
        return self.verdicts["PASS"]

    @property
    def whose(self) -> str:
        """Whose kernels were tested, own first, and what was not: "12 own, 8 inherited, 2 unclaimed"."""
        tested = counted(Counter(r.status for r in self.results if r.tested))
        others = (f"{n} {verdict.lower().replace('_', ' ')}" for verdict in UNTESTED if (n := self.verdicts[verdict]))
        return ", ".join([*filter(None, [tested]), *others])

    @property
    def worst(self) -> Result:
        return max(self.results, key=lambda r: r.worst)

    @property
    def determinism(self) -> str:
        """What its kernels, own ones if there are any, are held to: the same bits in every run, or of a row in any batch
        too; "" where none ran."""
        ran = [r for r in self.results if r.tested and r.status != REFUSAL]
        promised = {r.invariant for r in [r for r in ran if r.own] or ran}
        return "" if not promised else "run to run" if False in promised else "any batch"

    @property
    def seconds(self) -> float:
        return sum(r.seconds for r in self.results)


def figure(error: float) -> str:
    """An |e|/B in two digits: 0.047, 0.99, 41, 3e+06."""
    if error >= LARGEST:
        return "inf"
    return f"{error:.2g}" if error < 99.5 else f"{error:.0f}" if error < 1e5 else f"{error:.0e}"


def _finite(x: float) -> float:
    """JSON knows neither infinity nor NaN."""
    return float(np.nan_to_num(x, nan=0.0, posinf=LARGEST, neginf=-LARGEST))


def replay_command(
    token: str, backend: str, level: str = BRING_UP.name, place: str = "hardware", bounds: str = ""
) -> str:
    """The command that repeats a case: same backend, same strictness, same device, same bounds."""
    options = "" if level == BRING_UP.name else f" --level {level}"
    if place == "emulated device" and backend.partition(":")[0] in emulatable():  # else its own library imitates it
        options += " --emulated"
    return f"porthal replay '{token}' --backend {backend}{options}{bounds}"
