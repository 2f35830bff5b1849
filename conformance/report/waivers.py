"""Cases that a plugin says will not pass, each with its reason: `waivers.toml` in the backend's own package.

    [[unsupported]]       permanent: the chip cannot do it
    pattern = "linear,*x:fp16*"
    reason = "the chip has no float16"

    [[known_failure]]     temporary: it fails again from a given day on
    pattern = "topk,*"
    reason = "ties go to the highest position until the library's next version"
    expires = 2027-01-01

A pattern is written as for file names and matches tokens. It matches deliberate mistakes only where it has `fault=`:
they are refused before any kernel is called.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from fnmatch import fnmatchcase
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from porthal.conformance.cases.plan import cases
from porthal.conformance.level import LEVELS
from porthal.hal import Backend, UsageError, operators

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from porthal.conformance.report.results import Result

FILE = "waivers.toml"
Kind = Literal["unsupported", "known_failure"]


@dataclass(frozen=True)
class Waiver:
    """One entry of the file; `expires` is the first day on which it no longer holds."""

    kind: Kind
    pattern: str
    reason: str
    expires: date | None = None

    def matches(self, token: str) -> bool:
        return fnmatchcase(token, self.pattern) and ("fault=" in self.pattern or ",fault=" not in token)

    def expired(self, today: date) -> bool:
        return self.expires is not None and today >= self.expires

    def __str__(self) -> str:
        return f"{self.kind} {self.pattern!r}"


def waivers(backend: Backend) -> tuple[Waiver, ...]:
    """The waivers of a backend's own package, none of its base's; UsageError where the file is malformed."""
    package = type(backend).__module__.rpartition(".")[0]
    if not package:
        return ()
    where = f"{package}/{FILE}"
    try:
        text = (resources.files(package) / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {where}: {getattr(error, 'strerror', None) or 'it is not text'}") from None
    return parse(text, where)


def parse(text: str, where: str = FILE) -> tuple[Waiver, ...]:
    """The entries of a waivers file; UsageError says what is wrong with which."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {error}") from None
    found = []
    for kind, entries in data.items():
        if kind not in get_args(Kind) or not isinstance(entries, list):
            raise UsageError(f"{where} has {kind!r}: expected lists [[{']] and [['.join(get_args(Kind))}]]")
        for i, entry in enumerate(entries, 1):
            found.append(_entry(cast(Kind, kind), entry, f"{where}: {kind} {i}"))
    return tuple(found)


def _entry(kind: Kind, entry: Any, where: str) -> Waiver:
    if not isinstance(entry, dict):
        raise UsageError(f"{where} is {entry!r}, expected a table with pattern and reason")
    if unknown := set(entry) - {"pattern", "reason", "expires"}:
        raise UsageError(f"{where} has {sorted(unknown)[0]!r}: expected only pattern, reason and expires")
    for name in ("pattern", "reason"):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            raise UsageError(f"{where} has {name} {entry.get(name)!r}, expected text")
    if kind == "known_failure" and "expires" not in entry:
        raise UsageError(
            f"{where} ({entry['pattern']!r}) lacks expires: a known failure needs a day such as expires = 2027-01-01"
        )
    return Waiver(
        kind, entry["pattern"], entry["reason"], _day(entry["expires"], where) if "expires" in entry else None
    )


def _day(value: Any, where: str) -> date:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    try:
        return date.fromisoformat(value)
    except (TypeError, ValueError):
        raise UsageError(f"{where} has expires {str(value)!r}, expected a day such as 2027-01-01") from None


def waive(result: Result, known: Sequence[Waiver], today: date | None = None) -> Result:
    """The result, WAIVED where it did not pass and a waiver that holds matches; `waived` is the verdict before."""
    if not result.failed and result.verdict != "UNCLAIMED":
        return result
    for waiver in known:
        if waiver.matches(result.token) and not waiver.expired(today or date.today()):
            return replace(result, verdict="WAIVED", waived=result.verdict, reason=waiver.reason)
    return result


def expired(known: Sequence[Waiver], today: date | None = None) -> list[str]:
    """The entries that hold no more, each in one sentence."""
    past = [waiver for waiver in known if waiver.expired(today or date.today())]
    return [f"{w} expired on {w.expires}: repair what it waives, or give it a later day" for w in past]


def verify(known: Sequence[Waiver], results: Sequence[Result], today: date | None = None) -> list[str]:
    """What is wrong with the entries, each named in one sentence: expired, never matching, or matching what passes now."""
    said = expired(known, today)
    for waiver in known:
        passing = [r.token for r in results if r.verdict == "PASS" and waiver.matches(r.token)]
        if waiver.expired(today or date.today()):
            continue
        if not any(waiver.matches(r.token) for r in results) and not _planned(waiver):
            said.append(f"{waiver} matches no case of any level: remove it, or copy the pattern from a report")
        elif passing:
            more = f" and {len(passing) - 1} more" if len(passing) > 1 else ""
            said.append(f"{waiver} is stale: {passing[0]}{more} passed; remove it, or narrow its pattern")
    return said


def _planned(waiver: Waiver) -> bool:
    """Whether a case of any op and level matches, also one that this run did not ask for."""
    op = waiver.pattern.partition(",")[0].partition("@")[0]
    ops = [contract for name, contract in operators().items() if fnmatchcase(name, op) or "," not in waiver.pattern]
    return any(waiver.matches(case.token) for contract in ops for level in LEVELS for case in cases(contract, level))
