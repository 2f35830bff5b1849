"""A run's verdicts as they come, one JSON line each, so that a run that was stopped can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.results import Result, verify_results
from porthal.hal import UsageError, contracts


class Journal:
    """The file of one run: a line of facts about it, then a line per verdict. With `resume`, what is there is kept.

    Raises UsageError for the journal of another backend, level or suite, or of other versions or sources of what took part.
    """

    def __init__(self, file: Path, facts: Facts, level: str, resume: bool) -> None:
        head = {
            "backend": facts.backend,
            "place": facts.place,
            "level": level,
            "suite": SUITE,
            **facts.environment,
            "sources": dict(facts.sources),
            "contracts": {name: c.version for name, c in contracts().items()},
        }
        text = _text(file) if resume and file.exists() else ""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the line that was being written when the run was stopped
            lines.pop()
        self.known: dict[str, Result] = {}
        if not lines and not json.dumps(head).startswith(text):
            raise _no_journal(file)
        if lines:
            _check(file, _parsed(file, lines[0]), head)
            found = [_parsed(file, line) for line in lines[1:]]
            try:
                self.known = {r["token"]: Result.read(r) for r in found}
                if found:
                    verify_results(list(self.known.values()))
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file} is a damaged journal ({error}): give another file") from None
            os.truncate(file, sum(len(line.encode()) for line in lines))
        self._file = file.open("a" if lines else "w", encoding="utf-8")
        if not lines:
            self._write(head)

    def add(self, result: Result) -> None:
        """Keep a verdict; what could not be judged is tried again by the run that continues this one."""
        if result.verdict != "NOT_JUDGED":
            self._write(asdict(result))

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _no_journal(file) from None


def _no_journal(file: Path) -> UsageError:
    return UsageError(f"{file} is not the journal of a conformance run: give the file of a stopped run, or a new name")


def _parsed(file: Path, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _no_journal(file)
    return value


def _check(file: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    for name in head:
        if found.get(name) != head[name]:
            was, now = (json.dumps(v.get(name)) for v in (found, head))
            others = {"contracts": "other versions of contracts", "sources": f"other sources ({was}, now {now})"}
            what = others.get(name, f"{name} {was}, this one has {now}")
            raise UsageError(f"{file} is the journal of a run with {what}: give another file")
