"""docs/support-matrix.md against what a backend states. Each is asked where its device is: one vendor's per process."""

from __future__ import annotations

from porthal.conformance.report.matrix import cells, rows, section
from porthal.hal import create
from porthal.hal.discovery import emulatable
from tests.proofs import ROOT

STALE = "write it anew: python -m porthal.conformance.report.matrix > docs/support-matrix.md"


def assert_is_told(name: str) -> None:
    """That the page has this backend's part, and its column in the first table."""
    page = (ROOT / "docs" / "support-matrix.md").read_text(encoding="utf-8")
    made = create(name, name in emulatable())
    found = rows(made)
    assert section(name, made.place, found) in page, STALE
    first = page.partition("\n## ")[0].splitlines()
    head, _, *table = [line.strip("| ").split(" | ") for line in first if line.startswith("|")]
    column = head.index(name)
    assert {row[0]: row[column] for row in table} == cells(found), STALE
