"""What chips that are not here have passed on an emulated device: docs/results/vendors.json, a line per backend and op.

    porthal conform --emulated --backend X --level standard --op OP --json FILE
    python -m porthal.conformance.report.vendors FILE...

The second command keeps what matters of such reports, and docs/support-matrix.md shows it. An entry has a hash of the op's
contract and reference and of what the op runs through in the backend's folder, its stand-in included, and in the interfaces
that vendors share: a change makes stale what it may concern. The plan of cases is not in it, as an entry says how many ran.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from porthal.conformance.level import STANDARD
from porthal.conformance.report.files import read
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import counted, figure
from porthal.conformance.verdicts import UNTESTED
from porthal.hal import UsageError, contracts
from porthal.hal.discovery import surroundings
from porthal.hal.sources import digest, library_files

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "docs" / "results" / "vendors.json"
PLACE = "emulated device"
RENEW = (
    "porthal conform --emulated --backend {} --level standard --op {} --json FILE && "
    "python -m porthal.conformance.report.vendors FILE"
)
SHARED = re.compile(r"^from porthal\.(ops|backends\.torch\.interfaces)\.(\w+) import", re.MULTILINE)
Entry = dict[str, Any]


# -- entries ---------------------------------------------------------------------------------------------------------


def kept(file: Path = KEPT) -> list[Entry]:
    """The entries, by backend and op."""
    found: list[Entry] = json.loads(file.read_text(encoding="utf-8"))
    return found


def entry(report: Report) -> Entry:
    """What is kept of a report. UsageError unless it is of all cases of one op, at that place and level, of these sources."""
    name, [row, *more] = report.backend.partition(":")[0], report.rows
    renew = f"write one of these sources: {RENEW.format(name, row.op)}"
    if more or (report.place, report.level) != (PLACE, STANDARD.name) or report.levels[row.op].why.endswith("run"):
        raise UsageError(f"a report of another run than all cases of one op, {PLACE}, {STANDARD.name}: {renew}")
    current = digest(library_files(f"porthal.backends.{name}")), contracts()[row.op].version
    if (report.sources[name], report.contracts[row.op]) != current:
        raise UsageError(f"a report of other sources of {name} or {row.op}: {renew}")
    modules, _ = surroundings(name)
    failed = [f"{len(rs)} {rs[0].verdict}, {rs[0].token} for one: {rs[0].message}" for rs in report.causes]
    untested = [*report.unclaimed, *report.untaken, *report.never_ran, *(s for s in report.left_out if " left out: " in s)]
    return {
        "backend": name,
        "op": row.op,
        "place": report.place,
        "level": report.level,
        "verdicts": row.verdicts,
        "failed": row.failed,
        "kernels": report.passed,
        "domain": [report.levels[row.op].passed, report.levels[row.op].required],
        "own": Counter(r.provider for r in row.results if r.own and r.verdict == "PASS"),
        "worst": round(max((r.worst for r in row.results if r.own), default=0.0), 3),
        "remarks": [said.replace(f" of {row.op} ", " ") for said in (*failed, *untested)],
        "versions": {module: version for module, version in report.environment.items() if module in modules},
        "processor": report.environment["processor"],
        "date": report.date[:10],
        "hash": hashed(name, row.op),
    }


def merge(files: Iterable[Path], into: Path = KEPT) -> None:
    """Put what is kept of these reports in the place of older entries."""
    new = [read(file, lambda data: entry(Report.of_object(data))) for file in files]
    found = {(each["backend"], each["op"]): each for each in [*kept(into), *new]}
    lines = ",\n ".join(json.dumps(found[key]) for key in sorted(found))
    into.write_text(f"[\n {lines}\n]\n", encoding="utf-8")


def objection(each: Entry) -> str:
    """Why an entry does not hold for the sources as they are, or ""."""
    name, op = each["backend"], each["op"]
    if each["hash"] == hashed(name, op):
        return ""
    return f"what {op} passed on {name} is stale, as its sources have changed since {each['date']}: {RENEW.format(name, op)}"


# -- sources ---------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A definition or another statement of a module or a class: the names that it gives, those that it uses, its text."""

    gives: frozenset[str]
    uses: frozenset[str]
    text: str


def hashed(name: str, op: str) -> str:
    """A hash of a backend's definitions that an op reaches by their names, and of those that no op reaches."""
    adapter, stand_in = _pieces_of(name)
    services = {used for p in adapter if not p.gives & _by_ops(name) for used in p.uses}
    mine = _reached({op, *services}, (*adapter, *stand_in))
    chosen = [p.text for p in (*adapter, *stand_in) if p.gives & mine or not p.gives & _by_ops(name)]
    files = _with_imported([ROOT / "ops" / f"{op}.py"])
    texts = [*sorted(chosen), *(file.read_text(encoding="utf-8") for file in files)]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


@cache
def _by_ops(name: str) -> set[str]:
    """The names that some op reaches."""
    return set().union(*(_reached({op}, sum(_pieces_of(name), ())) for op in contracts()))


@cache
def _pieces_of(name: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Of the adapter with what it shares, and of its stand-in."""
    folder = ROOT / "backends" / name
    inside = sorted(file for kind in ("*.py", "*.txt") for file in folder.rglob(kind))
    files = _with_imported([file for file in inside if "emulated" not in file.parts])
    stand_in = [file for file in inside if "emulated" in file.parts]
    return tuple(p for file in files for p in pieces(file)), tuple(p for file in stand_in for p in pieces(file))


def _with_imported(files: list[Path]) -> list[Path]:
    """The same, and what they import of ops and of shared interfaces."""
    for file in files:  # which grows
        for room, module in SHARED.findall(file.read_text(encoding="utf-8")):
            found = ROOT / room.replace(".", "/") / f"{module}.py"
            files += [found] if found not in files else []
    return files


def _reached(names: set[str], among: Sequence[Piece]) -> set[str]:
    """These names, those that their definitions use, and so on."""
    left, found = list(names), set[str]()
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            left += [used for p in among if name in p.gives for used in p.uses]
    return found


def pieces(file: Path) -> Iterator[Piece]:
    """All of a source but its imports: of a class its head, and one by one what stands in it."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield Piece(frozenset(), frozenset(), text)
        return
    lines = text.splitlines()

    def of(body: list[ast.stmt]) -> Iterator[Piece]:
        for node in body:
            first, last, parts = node.lineno, node.end_lineno, list(ast.walk(node))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                first = min([first, *(d.lineno for d in node.decorator_list)])
            if isinstance(node, ast.ClassDef):
                yield from of(node.body)
                last, parts = node.body[0].lineno - 1, [part for base in node.bases for part in ast.walk(base)]
            uses = {n.id for n in parts if isinstance(n, ast.Name)} | {n.attr for n in parts if isinstance(n, ast.Attribute)}
            if not isinstance(node, (ast.Import, ast.ImportFrom)):
                yield Piece(frozenset(_given(node)), frozenset(uses), "\n".join(lines[first - 1 : last]))

    yield from of(ast.parse(text).body)


def _given(node: ast.stmt) -> Iterator[str]:
    """Names that a statement gives: `kernel.capturable = False` says something of the kernel."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        yield node.name
    places = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    yield from (n.id for place in places for n in ast.walk(place) if isinstance(n, ast.Name))


# -- docs/support-matrix.md ------------------------------------------------------------------------------------------

COLUMNS = "operator", "state", "GLM-5", "passed", "of these", "not tested", "error / budget", "date"


def told(name: str, ops: Iterable[str]) -> tuple[list[list[str]], list[str]]:
    """Of a backend's own ops the rows of a table, and in words where they ran and what did not pass; nothing where it has no
    entry."""
    mine = {each["op"]: each for each in kept(KEPT) if each["backend"] == name}
    part = {", ".join([each["processor"], *map(" ".join, each["versions"].items())]) for each in mine.values()}
    why = [f"* `{op}`: {said}" for op, each in mine.items() for said in each["remarks"]]
    rows = [[op, *(_cells(mine[op]) if op in mine else ["not run", *[""] * 6])] for op in dict.fromkeys(ops)]
    return (rows, [*(f"{PLACE.capitalize()}: {each}" for each in sorted(part)), "", *why]) if mine else ([], [])


def _cells(each: Entry) -> list[str]:
    verdicts: Counter[str] = Counter(each["verdicts"])
    return [
        f"{each['failed']} failed" if each["failed"] else "passed",
        "{} of {}".format(*each["domain"]),
        f"{verdicts['PASS']} of {verdicts.total()}",
        counted(Counter(each["kernels"])),
        ", ".join(f"{verdicts[v]} {v.lower().replace('_', ' ')}" for v in UNTESTED if verdicts[v]),
        figure(each["worst"]),
        each["date"],
    ]


if __name__ == "__main__":
    try:
        merge(map(Path, sys.argv[1:]))
    except UsageError as error:
        sys.exit(str(error))
