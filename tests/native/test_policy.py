"""Which instruction set and how many threads are used, as the environment says; and one op in each instruction set."""

from __future__ import annotations

import subprocess
import sys

import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.backends.cpu import policy
from porthal.hal import UsageError, create, probe


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for name in ("PORTHAL_ISA", "PORTHAL_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    isa, threads = native.isa(), native.num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({"PORTHAL_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "4"}, 4), ({"OMP_NUM_THREADS": "5,2"}, 5),
     ({"PORTHAL_THREADS": "6", "OMP_NUM_THREADS": "4"}, 6), ({"PORTHAL_THREADS": "", "OMP_NUM_THREADS": " 7 "}, 7), ({}, 2)],
)  # fmt: skip
def test_threads(monkeypatch, variables, threads):
    native.set_num_threads(2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    create("cpu")
    assert native.num_threads() == threads
    assert policy.text(native).endswith(f", {threads} threads")


@pytest.mark.parametrize("isa", native.isas())
def test_the_instruction_set_is_forced_and_told(monkeypatch, isa):
    monkeypatch.setenv("PORTHAL_ISA", isa)
    monkeypatch.setenv("PORTHAL_THREADS", "1")
    assert create("cpu").describe().endswith(f" ({isa}, 1 thread)")
    assert native.isa() == isa
    assert probe("cpu").why == f"{isa}, 1 thread"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("PORTHAL_ISA", "neon", "one of baseline"), ("PORTHAL_THREADS", "0", "a number of threads from 1 to 1024"),
     ("PORTHAL_THREADS", "2,1", "a number"), ("PORTHAL_THREADS", "1025", "a number"),
     ("PORTHAL_THREADS", "9" * 5000, "a number"), ("PORTHAL_THREADS", "\u00b2", "a number"),
     ("OMP_NUM_THREADS", "many", "a number"), ("OMP_NUM_THREADS", "-1", "a number")],
)  # fmt: skip
def test_bad_values_are_one_sentence_wherever_they_are_read(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{name} is '.*': expected {expected}"):
        create("cpu")
    assert probe("cpu").state == "available"  # else another backend would be chosen in silence
    assert probe("cpu").why.startswith(f"{name} is ")


def test_a_process_uses_the_processors_that_it_may_run_on():
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    program += "from porthal.backends.cpu import _native; print(_native.num_threads())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
