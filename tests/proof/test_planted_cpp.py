"""A defect planted in C++ is compiled, loaded beside the real kernels, caught, and leaves these alone."""

from porthal.backends.cpu import _native, backend
from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.conformance.selftest.run import LEVEL, attempt
from porthal.hal import create

PROVES = (
    "conformance/selftest/compiled.py",
    "conformance/selftest/planting.py",
    "conformance/selftest/native.py",
    "conformance/selftest/run.py",
    "ops/rms_norm.py",
    "backends/cpu",
)


def state():
    return dict(vars(_native)), dict(vars(backend)), dict(vars(backend.Cpu)), _native.num_threads(), _native.isa()


def test_a_defect_in_cpp_is_built_loaded_and_caught_beside_the_real_kernels():
    create("cpu")  # which says how many threads there are
    before = state()
    trial = attempt(("defect", "rms_norm/eps-forgotten", "float32", 0))
    assert trial.verdict == "FAIL_VALUE" and ",H=1," in trial.token and trial.cases == 1
    assert state() == before
    assert check(Case.from_token(trial.token), Bindings(create("cpu")), LEVEL).verdict == "PASS"
