"""What says that a report is as it was written, and whether anybody has seen its rows come out again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
    """Raise UsageError where a report is not what its receipt was made of."""
    said = (report.get("porthal") or report).get("receipt")
    if said != receipt(report):
        raise UsageError("a report that was changed after it was written, as its receipt shows: take it from its author again")


@dataclass(frozen=True)
class Reproduced:
    """What came out when rows drawn from a report were run again, and where."""

    rows: int
    held: int
    date: str
    device: str
    sources: Mapping[str, str]

    @classmethod
    def read(cls, kept: object) -> Reproduced | None:
        """Of what JSON holds of it, None where nobody tried; TypeError or ValueError for anything else."""
        if kept is None:
            return None
        if not isinstance(kept, dict):
            raise TypeError(f"reproduced is {kept!r}")
        made = cls(**kept)
        texts = (made.date, made.device, *made.sources.keys(), *made.sources.values())
        if not all(isinstance(text, str) and text.isprintable() for text in texts):
            raise TypeError("reproduced holds what is no line of text")
        if not (type(made.rows) is type(made.held) is int and 0 <= made.held <= made.rows > 0):
            raise ValueError(f"reproduced says that {made.held} of {made.rows} rows held")
        return made


def origin(reproduced: Reproduced | None) -> str:
    """Who stands for a report."""
    if reproduced is None:
        return "self-reported"
    said = f"{reproduced.held} of {reproduced.rows} drawn rows held, {reproduced.date}, {reproduced.device}"
    return f"{'reproduced' if reproduced.held == reproduced.rows else 'not reproduced'}: {said}"
