"""What says that a report is as it was written, and whether anybody has seen its rows come out again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from porthal.hal import UsageError

NOT_IN_IT = ("receipt", "reproduced")  # the digest itself, and what is added later


def receipt(report: Mapping[str, Any]) -> str:
    """A digest of all that a report's JSON object says: digests of sources, versions, device, command and results.

    It finds what was changed by accident or by a careless hand; who can run porthal can write another.
    """
    ours = report.get("porthal")
    parts = {**report, "porthal": {**ours, **dict.fromkeys(NOT_IN_IT)}} if isinstance(ours, dict) else report
    text = json.dumps({**parts, **dict.fromkeys(NOT_IN_IT)}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def check_receipt(report: Mapping[str, Any]) -> None:
    """Raise UsageError where a report is not what its receipt was made of, or its mark not one of this report."""
    ours = report.get("porthal") or report
    if ours.get("receipt") != receipt(report):
        raise UsageError("a report that was changed after it was written, as its receipt shows: take it from its author again")
    mark = ours.get("reproduced")
    if mark is not None and mark.get("seal") != seal(report, mark):
        raise UsageError("a report whose mark was not made for it as it is, as its seal shows: run porthal verify on it again")


def seal(report: Mapping[str, Any], mark: Mapping[str, Any]) -> str:
    """A digest of a mark and of the report that has it; like a receipt, no signature."""
    return receipt({"of": receipt(report), "mark": {**mark, "seal": ""}})


@dataclass(frozen=True)
class Reproduced:
    """What came out when rows drawn from a report were run again, and where; `noisy` more were drawn and say nothing."""

    rows: int
    held: int
    noisy: int
    date: str
    device: str
    sources: Mapping[str, str]
    seal: str = ""

    @classmethod
    def read(cls, kept: object) -> Reproduced | None:
        """Of what JSON holds of it, None where nobody tried; TypeError or ValueError for anything else."""
        if kept is None:
            return None
        if not isinstance(kept, dict) or kept.keys() != {field.name for field in fields(cls)}:
            raise TypeError(f"reproduced is {kept!r}, expected {', '.join(field.name for field in fields(cls))}")
        made = cls(**kept)
        texts = (made.date, made.device, *made.sources.keys(), *made.sources.values())
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError("reproduced holds what is no line of text")
        counts = made.rows, made.held, made.noisy
        if not (all(type(n) is int for n in counts) and 0 <= made.held <= made.rows > 0 <= made.noisy):
            raise ValueError(f"reproduced says that {made.held} of {made.rows} rows held, {made.noisy} more being noisy")
        return made


def origin(reproduced: Reproduced | None) -> str:
    """Who stands for a report."""
    if reproduced is None:
        return "self-reported"
    drawn = reproduced.rows + reproduced.noisy
    noisy = f", {reproduced.noisy} were too noisy there to say" if reproduced.noisy else ""
    said = f"{reproduced.held} of {drawn} drawn rows held{noisy}, {reproduced.date}, {reproduced.device}"
    return f"{'reproduced' if reproduced.held == reproduced.rows else 'not reproduced'}: {said}"
