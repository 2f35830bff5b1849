"""What a run has found, one JSON line each as it comes, so that one that was stopped can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.results import Result, verify_results
from porthal.hal import UsageError, operators

T = TypeVar("T")


class Lines(Generic[T]):
    """The file of one run: a line of facts about it, then a line per result. With `resume`, what is there is `known`.

    Raises UsageError for what is no such file, is damaged, or is of a run with other facts.
    """

    what: ClassVar[str]  # the file in words
    many: ClassVar[Mapping[str, str]] = {}  # what is said of facts that are too long to be told

    def __init__(self, file: Path, head: Mapping[str, Any], resume: bool) -> None:
        head = json.loads(json.dumps(head))
        text = self._text(file) if resume and file.exists() else ""
        lines = text.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # the line that was being written when the run was stopped
            lines.pop()
        self.known: list[T] = []
        if lines:
            self._check(file, self._parsed(file, lines[0]), head)
            try:
                self.known = self.read([self._parsed(file, line) for line in lines[1:]])
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{file} is a damaged {self.what} ({error}): give another file") from None
            os.truncate(file, sum(len(line.encode()) for line in lines))
        elif not json.dumps(head).startswith(text):
            raise self._other(file)
        self._file = file.open("a" if lines else "w", encoding="utf-8")
        if not lines:
            self._write(head)

    @staticmethod
    def read(lines: list[dict[str, Any]]) -> list[T]:
        """The results that these lines say. Raises KeyError, TypeError or ValueError for what is none."""
        raise NotImplementedError

    def add(self, result: T) -> None:
        self._write(asdict(result))  # type: ignore[call-overload]  # each is a dataclass

    def close(self) -> None:
        self._file.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(value) + "\n")
        self._file.flush()

    def _text(self, file: Path) -> str:
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise self._other(file) from None

    def _parsed(self, file: Path, line: str) -> dict[str, Any]:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise self._other(file)
        return value

    def _check(self, file: Path, found: Mapping[str, Any], head: Mapping[str, Any]) -> None:
        for name in head:
            if found.get(name) != head[name]:
                was, now = (json.dumps(v.get(name)) for v in (found, head))
                what = self.many.get(name) or f"{name} {was}, this one has {now}"
                raise UsageError(f"{file} is the {self.what} with {what}: give another file")

    def _other(self, file: Path) -> UsageError:
        return UsageError(f"{file} is not the {self.what}: give the file of a stopped run, or a new name")


class Journal(Lines[Result]):
    """That of a conformance run, with its verdicts: of one backend, level and suite, and versions and sources of what took
    part."""

    what = "journal of a conformance run"
    many: ClassVar[Mapping[str, str]] = {"contracts": "other versions of contracts"}

    def __init__(self, file: Path, facts: Facts, level: str, resume: bool) -> None:
        head = {
            "backend": facts.backend,
            "place": facts.place,
            "level": level,
            "suite": SUITE,
            **facts.environment,
            "sources": dict(facts.sources),
            "contracts": {name: c.version for name, c in operators().items()},
        }
        super().__init__(file, head, resume)

    @staticmethod
    def read(lines: list[dict[str, Any]]) -> list[Result]:
        found = list({line["token"]: Result.read(line) for line in lines}.values())
        if found:
            verify_results(found)
        return found

    def add(self, result: Result) -> None:
        """Keep a verdict; what could not be judged is tried again by the run that continues this one."""
        if result.verdict != "NOT_JUDGED":
            super().add(result)
