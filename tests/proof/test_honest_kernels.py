"""Honest kernels pass at the strict level, run as often as it says."""

import pytest

from tests.honest import HONEST, strictly_judged

PROVES = (
    "conformance/cases",
    "conformance/execution",
    "conformance/judgement",
    "conformance/runner/check.py",
    "conformance/level.py",
    "ops",
    "hal/numerics.py",
    "hal/dtypes.py",
    "tests/honest.py",
)


@pytest.mark.parametrize("name", HONEST)
def test_honest_kernels_pass_at_the_strict_level(name):
    results = strictly_judged(name)
    assert len(results) > 15
    assert [r.explain() for r in results if r.failed] == []
    assert all(r.own or r.status == "refusal" for r in results)
