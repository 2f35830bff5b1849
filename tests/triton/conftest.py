"""These tests need a process of their own (`pytest tests/triton`): Triton's interpreter is chosen before Triton is imported."""

from __future__ import annotations

from importlib.util import find_spec

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if find_spec("triton") is None:  # imported here, it would be imported without its interpreter
        pytest.skip("Triton is not installed: pip install --no-deps triton==3.7.1")


@pytest.fixture(scope="session")
def cuda():
    from porthal.hal import create

    return create("cuda", emulated=True)
