"""The record of what `make proof` has proved: which tests passed, on what sources.

A file of tests/proof names in PROVES the sources that its result depends on. The record keeps a hash of these and of the
file itself, so that `tests/house` can refuse a result that has become stale.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROOF = ROOT / "tests" / "proof"
RESULTS = PROOF / "results.json"
MADE = ("__pycache__", ".so")  # by running, not by hand
Results = dict[str, dict[str, Any]]


def proofs() -> list[Path]:
    return sorted(PROOF.glob("test_*.py"))


def proves(file: Path) -> tuple[str, ...]:
    """What the file says in PROVES: files and folders, seen from the root."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROVES":
            return tuple(ast.literal_eval(node.value))
    return ()


def sources(file: Path, root: Path = ROOT) -> Iterator[Path]:
    """The proof file and every file that it names."""
    yield file
    for name in proves(file):
        place = root / name
        found = [p for p in place.rglob("*") if p.is_file()] if place.is_dir() else [place]
        yield from sorted(p for p in found if not any(part.endswith(MADE) for part in p.relative_to(root).parts))


def digest(file: Path, root: Path = ROOT) -> str:
    """A hash of what a proof depends on: names and contents."""
    made = hashlib.sha256()
    for source in sources(file, root):
        content = source.read_bytes()
        made.update(f"{source.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return made.hexdigest()[:32]


def entry(hashed: str, tests: int, seconds: float) -> dict[str, Any]:
    """One proof's line in the record."""
    return {
        "hash": hashed,
        "tests": tests,
        "cpu_seconds": round(seconds),
        "date": date.today().isoformat(),
        "processor": processor(),
    }


def processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def results(file: Path = RESULTS) -> Results:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def record(ran: Mapping[str, dict[str, Any] | None], file: Path = RESULTS) -> None:
    """Renew the results of proofs that ran, by file name; None takes one away."""
    kept = results(file) | dict(ran)
    kept = {name: line for name, line in sorted(kept.items()) if line}
    file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def objection(name: str, hashed: str, kept: Results) -> str:
    """Why the record does not hold for a proof whose sources have this hash, or ""."""
    line = kept.get(name)
    if line is None:
        return f"tests/proof/{name} has no result: run make proof"
    if line["hash"] != hashed:
        return f"tests/proof/{name} is stale, as what it proves has changed since {line['date']}: run make proof"
    return "" if line["tests"] > 0 else f"tests/proof/{name} passed 0 tests: run make proof"
