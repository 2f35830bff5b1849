"""Which instruction set and how many threads are used, as the environment says; and one op in each instruction set."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

try:
    from porthal.backends.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the native module is not built ({error}); run `pip install .`", allow_module_level=True)

from porthal.backends.cpu import policy
from porthal.hal import Unavailable, best, create, numpy_dtype, probe


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for name in ("PORTHAL_ISA", "PORTHAL_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    isa, threads = native.isa(), native.num_threads()
    yield
    native.set_isa(isa)
    native.set_num_threads(threads)


TILES = ("amx_tile", "amx_bf16", "amx_int8")


def test_tiles_are_there_where_processor_linux_and_compiler_have_them():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    if not set(TILES) <= set(flags):
        pytest.skip("this processor has no tiles of bf16 and int8")
    if ctypes.CDLL(None).syscall(158, 0x1023, 18):  # arch_prctl, which asks for their registers
        pytest.skip("Linux does not let this process use tiles")
    options = [f"-m{name.replace('_', '-')}" for name in TILES]
    if subprocess.run([os.environ.get("CXX") or "c++", *options, "-fsyntax-only", "-xc++", os.devnull]).returncode:
        pytest.skip("the compiler here knows no tiles")
    assert native.isas()[-1] == "amx"


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
    assert f" ({isa}, 1 thread" in create("cpu").describe()
    assert native.isa() == isa
    assert probe("cpu").why == f"{isa}, 1 thread"


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_read_subnormals_as_zero_where_it_is_stated_and_nowhere_else(monkeypatch, isa, dtype):
    monkeypatch.setenv("PORTHAL_ISA", isa)
    cpu, kind = create("cpu"), numpy_dtype(dtype)
    assert ("products of bfloat16 read subnormals as zero" in cpu.describe()) == cpu.traits.flushes_denormals
    size = 2.0**-20 if dtype == "float16" else 2.0**-128
    tiny, large = np.full((1, 2, 32), size, kind), np.full((16, 32), 2.0**10, kind)
    i32, rows = np.dtype(np.int32), np.zeros((1, 2, 32), kind)
    y, scores, o = np.ones((2, 16), kind), np.ones((1, 4), np.float32), np.ones((1, 2, 32), kind)
    packed = native.Packed(1, 16, 32, kind)
    packed.set(0, large)
    requests = np.array([0, 1], i32), np.zeros((1, 1), i32), 4
    native.linear(tiny[0], packed, y)
    native.indexer_scores(tiny, np.ones((1, 2), np.float32), large, None, np.array([4], i32), *requests, 1.0, scores)
    chosen = np.arange(4, dtype=i32)[None], np.array([4], i32)
    native.sparse_mla(rows, rows[..., :2], np.repeat(tiny[0], 2, 0), None, 0, large[:4, :2], *chosen, *requests, 1.0, o)
    kept = not (cpu.traits.flushes_denormals and dtype == "bfloat16")
    for result, factor in ((y, 32 * 2.0**10), (scores, 64 * 2.0**10), (o, 1)):
        assert (result.astype(np.float64) == kept * factor * size).all()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("PORTHAL_ISA", "neon", "one of baseline"), ("PORTHAL_THREADS", "0", "a number of threads from 1 to 1024"),
     ("PORTHAL_THREADS", "2,1", "a number"), ("PORTHAL_THREADS", "1025", "a number"),
     ("PORTHAL_THREADS", "9" * 5000, "a number"), ("PORTHAL_THREADS", "\u00b2", "a number"),
     ("OMP_NUM_THREADS", "many", "a number"), ("OMP_NUM_THREADS", "-1", "a number")],
)  # fmt: skip
def test_bad_values_are_one_sentence_wherever_they_are_read(monkeypatch, command_line, name, value, expected):
    monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=f"^backend 'cpu' is broken: {name} is '.*': expected {expected}"):
        create("cpu")
    assert probe("cpu").state == "broken" and probe("cpu").why.startswith(f"{name} is ")
    assert best() == "cpu"  # another backend in its place would hide the mistake
    code, out, err = command_line("backends")
    assert code == 2 and "*  cpu            broken" in out
    assert err.startswith(f"porthal: backend 'cpu' (the first available in this order) is broken: {name} is ")


def test_a_process_uses_the_processors_that_it_may_run_on():
    program = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
    program += "from porthal.backends.cpu import _native; print(_native.num_threads())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n", done.stderr
