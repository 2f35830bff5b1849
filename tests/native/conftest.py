"""Each instruction set that this CPU runs, and numbers of threads, of the native module; benchmarks that are soon done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

import pytest

from porthal.bench import measured, run, statistics

try:
    from porthal.backends.cpu import _native as native
except ImportError:  # the files that need it are skipped, and say why
    native = None


@pytest.fixture(params=native.isas() if native else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(best)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = native.num_threads()
    yield native.set_num_threads
    native.set_num_threads(before)


@pytest.fixture(scope="module")
def few_rounds() -> Iterator[None]:
    """A benchmark takes the fewest samples that it may, however long they take and however far apart they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "LONGEST", 0.0)
        for module in (statistics, measured):
            patch.setattr(module, "NOISY", inf)
        yield
