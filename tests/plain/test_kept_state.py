"""A failure that a fresh process does not have: the report says that the kernel keeps something between calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from porthal.conformance import run
from porthal.conformance.runner.workers import Bounds
from tests.plugins import install, installed

KEEPING = """
    import numpy as np
    from porthal.backends.reference.backend import Reference

    class Chip(Reference):
        calls = 0

        def add(self, a, b):
            Chip.calls += 1
            y = (a.astype(np.float32) + b.astype(np.float32)).astype(a.dtype)
            return y if Chip.calls < {well} else y + y.dtype.type(1)
"""


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[None]:
    for name, well in (("keeping", 60), ("failing", 0)):
        install(tmp_path, name, backend=KEEPING.format(well=well))
    with installed(tmp_path):
        yield


def test_the_first_failure_of_a_kind_is_tried_alone(plugins: None) -> None:
    report = run("keeping", ["add"], bounds=Bounds(workers=1))
    kept = [r for r in report.failures if r.message.endswith("; passes when run alone: the kernel keeps state between calls")]
    assert kept and len({r.verdict for r in kept}) == len(kept) < len(report.failures)
    assert kept[0].message in report.html()


def test_what_fails_alone_too_is_no_state(plugins: None) -> None:
    report = run("failing", ["add"], bounds=Bounds(workers=1))
    assert report.failures and not [r for r in report.failures if "when run alone" in r.message]
