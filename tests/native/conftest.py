"""Each instruction set that this CPU runs, and numbers of threads, of the native module."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

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
