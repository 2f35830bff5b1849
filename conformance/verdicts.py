"""The closed list of verdicts, what each level permits, and a judgement's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal[
    "PASS",
    "FAIL_VALUE",
    "FAIL_SHAPE",
    "FAIL_DTYPE",
    "FAIL_ERROR",
    "FAIL_NONDETERMINISTIC",
    "FAIL_WROTE_OUTSIDE",
    "CRASH",
    "TIMEOUT",
    "UNTRUSTED",
    "NOT_JUDGED",
    "WAIVED",
    "UNCLAIMED",
]


@dataclass(frozen=True)
class Strictness:
    """pointwise: the factor c; whole, row: limits of the ratio to the ideal machine."""

    pointwise: float
    whole: float
    row: float


STRICTNESS = {
    "bring-up": Strictness(4, 4, 8),
    "standard": Strictness(2, 2, 4),
    "strict": Strictness(1, 1.25, 2),
}


@dataclass(frozen=True)
class Judgement:
    """`worst` is the largest |e| / B met (at `at`), `ratio` and `z` the largest ratio to the ideal machine and bias."""

    verdict: Verdict
    message: str = ""
    worst: float = 0.0
    at: str = ""
    ratio: float = 0.0
    z: float = 0.0
    note: str = ""


class Failed(Exception):
    def __init__(self, verdict: Verdict, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.judgement = Judgement(verdict, message, **figures)
