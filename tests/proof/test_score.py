"""The suite's score: one planted defect of each class and op in every dtype it has, and the honest variants at two seeds."""

from porthal.conformance.selftest.run import self_test

PROVES = (
    "conformance/cases",
    "conformance/execution",
    "conformance/judgement",
    "conformance/runner/check.py",
    "conformance/selftest",
    "conformance/level.py",
    "conformance/verdicts.py",
    "ops",
    "hal/numerics.py",
    "hal/dtypes.py",
    "backends/reference",
    "backends/torch/backend.py",
    "backends/torch/ranking.py",
    "backends/torch/schemes.py",
    "backends/cpu",
)


def test_every_defect_is_caught_and_no_honest_variant_refused():
    score = self_test(quick=True)
    assert score.exit_code == 0, "\n".join(str(t) for t in (*score.escaped, *score.alarms, *score.idle))
    assert len(score.caught) > 200 and len(score.passed) > 200
    assert score.unplanted == ""
