"""The closed list of verdicts, and a judgement's form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

Verdict = Literal[
    "PASS",  # within the contract
    "FAIL_VALUE",  # a wrong number, or a wrong choice
    "FAIL_SHAPE",  # a result of another shape
    "FAIL_DTYPE",  # a result of another dtype
    "FAIL_ERROR",  # an exception, or none where there must be one
    "FAIL_NONDETERMINISTIC",  # other bits on the same inputs
    "FAIL_MUTATED",  # an operand changed that the call may not change
    "FAIL_WROTE_OUTSIDE",  # memory changed beside results and operands, or a slot that the call may not write
    "CRASH",  # the kernel ended its process
    "TIMEOUT",  # no answer in the given time
    "UNTRUSTED",  # zeros where the reference has none: perhaps nothing was computed
    "NOT_JUDGED",  # the suite's own fault, which says nothing about the chip
    "WAIVED",  # not passed, and the plugin says why
    "UNCLAIMED",  # no kernel takes the call
    "LEFT_OUT",  # the backend's arrays are such that the case would tell nothing
]
NEUTRAL = ("PASS", "WAIVED", "UNCLAIMED", "LEFT_OUT")  # none of these is a failure
NOT_READ = "not read back"  # begins the note on what of an operand nobody can read
UNTESTED = ("UNCLAIMED", "LEFT_OUT", "WAIVED", "NOT_JUDGED")


@dataclass(frozen=True)
class Judgement:
    """A verdict with what was measured.

    worst   the largest |error| / budget, found `at`
    ratio   the largest ratio to an ideal chip's error, `z` the bias of the rounding direction
    few     the statistics that were not judged, because a result has too few samples of them
    note    what to say with a passing result
    """

    verdict: Verdict
    message: str = ""
    worst: float = 0.0
    at: str = ""
    ratio: float = 0.0
    z: float = 0.0
    few: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"{self.verdict!r} is not a verdict, expected one of {', '.join(get_args(Verdict))}")
        if self.message and self.verdict == "PASS":
            raise ValueError(f"a PASS has no message, got {self.message!r}: use note")
        if self.note and self.verdict != "PASS":
            raise ValueError(f"a {self.verdict} has no note, got {self.note!r}: use message")


class Failed(Exception):
    """Raised with a judgement other than PASS."""

    def __init__(self, verdict: Verdict, message: str, **figures: Any) -> None:
        super().__init__(message)
        self.judgement = Judgement(verdict, message, **figures)
