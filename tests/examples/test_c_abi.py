"""examples/c_abi as a porter would have it: built, found, small; its kernels right on views; no leaks; errors in a sentence."""

from __future__ import annotations

import importlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porthal.conformance import replay, run
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.diff.model import lockstep
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.hal import UsageError, bind, contracts, numpy_dtype
from porthal.model import load

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c_abi"
PROGRAM = [sys.executable, "-c", "from porthal.cli import main; main()"]
MOST_LINES = 150  # of the package's Python that are neither blank nor a comment alone
OWN = ("add", "argmax", "kv_write", "linear", "rms_norm", "silu_mul")
PROMPT = list(b"    def get(self, name):\n        if ")


def installed(folder: Path) -> Path:
    """The example's files with the metadata that an installation would write."""
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    entry = re.search(r'entry-points."porthal.backends"\]\n(.+)\n', (EXAMPLE / "pyproject.toml").read_text())
    assert entry
    info = folder / "porthal_flint-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: porthal-flint\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[porthal.backends]\n" + entry[1].replace('"', ""))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = installed(tmp_path_factory.mktemp("site") / "flint")
    subprocess.run(["sh", folder / "build.sh"], cwd="/", check=True)
    return folder


@pytest.fixture(scope="module")
def flint(site: Path) -> Iterator[Any]:
    """The module with the backend's class, and with `device`, the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        module = importlib.import_module("porthal_flint.backend")
        module.Flint.name = "flint"  # as discovery does
        yield module


@pytest.fixture(scope="module")
def binding(flint: Any) -> Any:
    return bind(backend=flint.Flint(), overrides={}, fallback="error")


def command(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PORTHAL_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    return subprocess.run([*PROGRAM, *args], env=environment, capture_output=True, text=True, timeout=120)


# -- the package -----------------------------------------------------------------------------------------------------


def test_the_wrapper_stays_small() -> None:
    lines = [line for file in EXAMPLE.rglob("*.py") for line in file.read_text().splitlines()]
    assert 100 < sum(not re.fullmatch(r"\s*(#.*)?", line) for line in lines) <= MOST_LINES


def test_without_its_library_the_chip_is_not_here_and_says_what_to_do(tmp_path: Path) -> None:
    done = command(installed(tmp_path / "flint"), "backends")
    assert done.returncode == 0, done.stderr
    first, *_ = [line for line in done.stdout.splitlines() if "flint" in line]
    assert re.fullmatch(r" +flint +not here +\S+/libflint.so is not built: run sh build.sh beside device.c", first)


def test_it_is_found_and_says_whose_kernels_run(site: Path) -> None:
    done = command(site, "explain", "--backend", "flint")
    assert done.returncode == 0, done.stderr
    own = [line.split() for line in done.stdout.splitlines() if " own " in line]
    assert [words[0] for words in own] == list(OWN)
    assert {words[-1] for words in own} == {*(f"flint_{op}" for op in OWN if op != "kv_write"), "flint_copy"}
    (bridged,) = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line.startswith("topk ")]
    assert bridged == ["topk", "inherited", "reference", "operands are carried to arrays of reference and back"]
    assert "flint (emulated device), for the demo checkpoint in float32: 6 own, 24 inherited, 7 composed" in done.stdout


def test_a_token_is_replayed_by_the_command_that_a_report_would_print(site: Path) -> None:
    done = command(site, "replay", "add,T=7,H=96,view=columns,0", "--backend", "flint")
    assert done.returncode == 0, done.stdout + done.stderr


# -- the kernels -----------------------------------------------------------------------------------------------------


def test_its_own_kernels_conform_in_every_case_of_bring_up(flint: Any) -> None:
    report = run(flint.Flint(), OWN)
    assert report.failures == [] and report.exit_code == 0
    far = [r.token for r in report.results if r.verdict == "UNCLAIMED"]  # 2^31 elements, more than the device has
    assert all("view=beyond" in token for token in far) and len(far) < 9
    assert {r.verdict for r in report.results} == {"PASS", "UNCLAIMED"}  # so no case is left out
    taken = [r for r in report.results if r.dtype in ("float32", "bfloat16") and ",out=float16" not in r.token]
    calls = [r for r in taken if "fault=" not in r.token]
    quantised = [r for r in calls if "%" in r.token]  # its kernels take no scheme, so the reference's run
    assert {r.status for r in calls if "%" not in r.token} == {"own"}
    assert {r.op for r in quantised} == {"kv_write", "linear"} and {r.status for r in quantised} == {"inherited"}
    plain = [r for r in report.results if "%" not in r.token]
    viewed = {(r.op, view) for r in plain for view in ("columns", "rows", "transposed") if f"view={view}" in r.token}
    assert {op for op, _ in viewed} == set(OWN) and len(viewed) > 12


def test_bridged_ops_conform_and_count_as_inherited(flint: Any) -> None:
    """In the cases of bring-up that are not large; all of them take half a minute."""
    bindings = Bindings(flint.Flint())
    others = [case for op, contract in contracts().items() if op not in OWN for case in cases(contract)]
    results = [check(case, bindings) for case in others if elements(case) < 2**17]
    assert [(r.token, r.message) for r in results if r.verdict != "PASS" and "view=beyond" not in r.token] == []
    status = {r.op: r.status for r in results}
    assert (status["sparse_mla"], status["moe_experts"]) == ("inherited", "composed")
    assert contracts().keys() - status.keys() == set(OWN)


def test_a_kernel_that_takes_views_for_dense_is_caught(flint: Any) -> None:
    class Careless(flint.Flint):
        name = "careless"

        def silu_mul(self, x: Any) -> Any:
            y = self.empty((x.shape[0], x.shape[1] // 2), x.dtype)
            flint.device.flint_silu_mul(x, y, *y.shape, flint.KIND[x.dtype])
            return y

    assert replay("silu_mul,T=7,I=96,0", Careless()).verdict == "PASS"
    assert replay("silu_mul,T=7,I=96,view=columns,0", Careless()).verdict == "FAIL_VALUE"


def test_a_kernel_that_writes_beside_its_result_is_caught(flint: Any) -> None:
    class Careless(flint.Flint):
        name = "careless"

        def add(self, a: Any, b: Any) -> Any:
            y = super().add(a, b)
            flint.device.flint_upload(y.address - 4, np.zeros(1, np.float32).ctypes.data, 4)
            return y

    assert replay("add,T=7,H=96,0", Careless()).verdict == "FAIL_WROTE_OUTSIDE"


def test_the_model_writes_the_references_text(binding: Any) -> None:
    own, reference = (load(binding=b).generate(PROMPT, 40, speculative=2) for b in (binding, bind("reference")))
    assert own == reference
    assert len(set(own)) > 5


def test_in_lockstep_with_the_reference_nothing_is_at_fault(binding: Any, checkpoints: dict[str, Path]) -> None:
    found = lockstep(binding, list(range(1, 13)), checkpoints["glm52"], decode=1)
    assert (found.exit_code, found.at_fault) == (0, None), found.sentence
    assert sum(layer.wrong for layer in found.layers) == 0


# -- memory and arrays -----------------------------------------------------------------------------------------------


def test_a_model_gives_back_all_memory_of_the_device(flint: Any, binding: Any) -> None:
    empty = flint.device.flint_live()
    model = load(binding=binding)
    held = flint.device.flint_live()
    for _ in range(2):
        model.generate(PROMPT, 4)
        assert flint.device.flint_live() == held > empty
    del model
    assert flint.device.flint_live() == empty


def test_memory_lives_as_long_as_its_last_view(flint: Any) -> None:
    before, backend = flint.device.flint_live(), flint.Flint()
    view = backend.from_numpy(np.arange(12, dtype=np.int32).reshape(3, 4))[1:].reshape(2, 2, 2)[:, 1]
    others = [backend.from_numpy(np.zeros(12, np.int32)) for _ in range(3)]  # would take the memory if it were free
    assert backend.to_numpy(view).tolist() == [[6, 7], [10, 11]]
    del view, others
    assert flint.device.flint_live() == before


KEYS = st.lists(st.integers(-2, 1) | st.slices(2) | st.slices(5), max_size=3).map(tuple)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int32", "int64", "bool"])


@settings(max_examples=60, deadline=None)
@given(key=KEYS, dtype=DTYPES)
def test_slices_are_numpys_and_share_memory(flint: Any, key: tuple[Any, ...], dtype: str) -> None:
    backend = flint.Flint()
    x = np.arange(2 * 5 * 3).reshape(2, 5, 3).astype(numpy_dtype(dtype))
    whole = backend.from_numpy(x)
    part = whole[key]
    assert part.shape == x[key].shape
    assert np.array_equal(backend.to_numpy(part), x[key])
    assert np.array_equal(backend.to_numpy(part.reshape(math.prod(part.shape))), x[key].reshape(-1))
    backend.write(part, backend.from_numpy(np.zeros_like(x[key])))
    x[key] = 0
    assert np.array_equal(backend.to_numpy(whole), x)


def test_the_host_cannot_read_the_device_by_a_slip(site: Path) -> None:
    program = "import ctypes, numpy; from porthal_flint.backend import Flint; x = Flint().from_numpy(numpy.ones(4)); "
    run_it = [sys.executable, "-c", program + "print(Flint().to_numpy(x)[0], flush=True); ctypes.string_at(x.address, 8)"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(run_it, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("1.0\n", -signal.SIGSEGV)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_what_the_device_refuses_is_one_sentence(flint: Any) -> None:
    backend, host = flint.Flint(), np.zeros(4, np.float32)
    x = backend.from_numpy(host)
    refused = {
        r"the device is out of memory: 34359738368 bytes do not fit into its \d+ beside what is in use; free arrays first":
            lambda: backend.empty((2**31, 4), "float32"),
        r"flint_free got 0x5, which is no allocation: give an address from flint_malloc once":
            lambda: flint.device.flint_free(5),
        r"16 bytes at 0x[0-9a-f]+ are not in an allocation of the device: give arrays of the device that are alive":
            lambda: flint.device.flint_add(host.ctypes.data, x, x, 4, 0),
        r"16 bytes at \S+ are not in an allocation of the device: give arrays of the device that are alive":
            lambda: backend.to_numpy(flint.Array(x.address + 2**40, (4,), (4,), "float32", x.owner)),
        r"7 is no kind of number: give 0 for float32, 1 for bfloat16":
            lambda: flint.device.flint_add(x, x, x, 4, 7),
    }  # fmt: skip
    for sentence, call in refused.items():
        with pytest.raises(flint.DeviceError, match=f"^{sentence}$"):
            call()
    assert backend.to_numpy(x).tolist() == [0, 0, 0, 0]


def test_wrong_use_of_arrays_is_one_sentence(flint: Any) -> None:
    backend = flint.Flint()
    x = backend.from_numpy(np.zeros((2, 3), np.float32))
    with pytest.raises(UsageError, match=r"^cannot reshape \[2, 3\] to \[4\]: give sizes of the same product$"):
        x.reshape(4)
    with pytest.raises(UsageError, match=r"^3 indices are too many for an array of shape \[2, 3\]$"):
        x[0, 0, 0]
    with pytest.raises(UsageError, match=r"^cannot copy int32\[2, 3\] into float32\[2, 3\]$"):
        backend.write(x, backend.from_numpy(np.zeros((2, 3), np.int32)))
    with pytest.raises(UsageError, match=r"^flint has no device '1': expected 'flint' alone$"):
        flint.Flint("1")
    assert backend.refuses_array(np.zeros(1)) == "ndarray, expected an array of flint"


def test_a_case_that_takes_all_memory_costs_itself_alone(flint: Any) -> None:
    class Greedy(flint.Flint):
        name = "greedy"

        def add(self, a: Any, b: Any) -> Any:
            flint.Array.new((2**40,), "float32")
            return super().add(a, b)

    result = replay("add,T=7,H=96,0", Greedy())
    assert result.verdict == "CRASH" and "the device is out of memory: 4398046511104 bytes" in result.message
