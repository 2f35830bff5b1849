"""A saved call is the call bit for bit, needs NumPy alone to be measured, and is judged again as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.cli.app import app
from porthal.conformance import replay
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs, observed
from porthal.conformance.cases.legal import FAR, PAST_2G, elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.judgement.saved import read, save
from porthal.conformance.report.results import Result
from porthal.hal import Backend, Batch, UsageError, contracts, create, widen

ALONE = """
import runpy, sys
runpy.run_path(sys.argv[1])
assert not {"porthal", "ml_dtypes", "torch"} & set(sys.modules)
"""
NORM = "rms_norm,T=3,H=5,x:bf16,0"


def cheapest(op: str) -> list[str]:
    """The smallest case of every combination of dtypes and left out operands."""
    found: dict[Any, Case] = {}
    for case in sorted(cases(contracts()[op]), key=elements):
        plain = not (case.fault or case.distinct or case.seq or case.capture or case.view in (FAR, PAST_2G))
        if plain and dict(case.dims).get(case.contract.rows, 1):
            found.setdefault((case.dtypes, case.absent), case)
    return [case.token for case in found.values()]


def backend(**members: Any) -> Backend:
    return type("Made", (Reference,), {"name": "made", "base": "reference", **members})()


def off(self: Any, x: Any, weight: Any, *, eps: float = 1e-5) -> Any:
    y = create("reference").derive(contracts()["rms_norm"])(x, weight, eps=eps)
    return y * np.array(1.5, y.dtype)


def saved(call: str | Inputs, chip: Backend, folder: Path) -> tuple[Path, Result]:
    got: dict[str, Any] = {}
    result = replay(call, chip, returned=got.update)
    inputs = build(Case.from_token(call)) if isinstance(call, str) else call
    return save(inputs, got, folder, "case", str(chip)), result


def printed(file: Path) -> list[str]:
    command = [sys.executable, "-I", "-c", ALONE, file.with_suffix(".py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def bits(value: Any) -> Any:
    """All that an operand is."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, Batch):
        return [bits(array) for array in value.leaves()], value.block_size
    native = value and value.native
    parts = native.values() if isinstance(native, dict) else native if isinstance(native, tuple) else [native]
    return value and (type(value), value.spec, [bits(part) for part in parts])


def figures(result: Result) -> Any:
    return result.token, result.explain(), result.worst, result.at, result.ratio, result.z


# -- round trip ------------------------------------------------------------------------------------------------------


@pytest.fixture
def uncompressed(monkeypatch):
    """Packing takes longer than all the rest; the command's tests do it."""
    monkeypatch.setattr(np, "savez_compressed", np.savez)


@pytest.mark.parametrize("op", sorted(contracts()))
def test_what_is_read_is_what_was_saved(op, tmp_path, uncompressed):
    for token in cheapest(op):
        inputs = build(Case.from_token(token))
        file, result = saved(token, create("reference"), tmp_path)
        again = read(file)
        assert (again.case, again.attrs, again.spec, again.origin) == (inputs.case, inputs.attrs, inputs.spec, "")
        assert {n: bits(v) for n, v in again.operands.items()} == {n: bits(v) for n, v in inputs.operands.items()}
        assert figures(replay(again, create("reference"))) == figures(result)
        keys = {key.partition("/")[2].partition(".")[0] for key in np.load(file) if key.startswith("got/")}
        assert keys == {r.name for r in inputs.contract.signature.results}


@pytest.mark.parametrize("op", sorted(contracts()))
def test_a_call_that_was_met_is_read_and_judged_as_it_was(op, tmp_path, uncompressed):
    for token in cheapest(op):
        planned = build(Case.from_token(token))
        inputs = observed(planned.contract, planned.operands, planned.attrs)
        file, result = saved(inputs, create("reference"), tmp_path)
        again = read(file)
        assert (again.case, again.spec, again.origin) == (inputs.case, inputs.spec, op)
        assert {n: bits(v) for n, v in again.operands.items()} == {n: bits(v) for n, v in inputs.operands.items()}
        assert result.verdict == "PASS", (token, result.message)
        assert figures(replay(again, create("reference"))) == figures(result)


def test_a_verdict_is_the_same_again(tmp_path):
    file, result = saved(NORM, backend(rms_norm=off), tmp_path)
    assert result.verdict == "FAIL_VALUE"
    assert figures(replay(read(file), backend(rms_norm=off))) == figures(result)
    assert replay(read(file), create("reference")).verdict == "PASS"


# -- the script ------------------------------------------------------------------------------------------------------


def test_a_saved_call_is_measured_without_porthal(tmp_path):
    file, result = saved(NORM, backend(rms_norm=off), tmp_path / "new")
    script = file.with_suffix(".py").read_text()
    assert "porthal" not in script and len(script.splitlines()) < 18
    title, line = printed(file)
    assert title == f"{NORM} on made: permitted is 4 times the error budget"
    worst = float(line.split("worst by ")[1].split()[0])
    assert line.startswith("y: 15 of 15 differ") and worst == pytest.approx(result.worst, rel=0.01)
    kept, inputs = np.load(file), build(Case.from_token(NORM))
    np.testing.assert_array_equal(kept["in/x"], widen(inputs.operands["x"]))
    assert kept["dtype/x"] == "bfloat16" and kept["attr/eps"] == 1e-5
    assert np.abs(kept["got/y"] / kept["golden/y"] - 1.5).max() < 0.01


@pytest.mark.parametrize(
    "token",
    [
        "kv_write,T=3,A=4,B=2,batch=1/9+2/30,block_size=16,0",
        "indexer_topk,T=3,G=2,D=8,k=4,scale=0.5,batch=1/9+2/30,block_size=16,0",
        "moe_route,T=3,E=9,k=2,scale=1.0,0",
        "grouped_gemm,M=12,K=3,N=2,E=5,0",
        "select_rows,M=3,T=4,k=4,0",
        "argmax,T=3,V=9,logits~special,0",
    ],
)
def test_every_kind_of_result_is_measured(tmp_path, token):
    lines = printed(saved(token, create("reference"), tmp_path)[0])[1:]
    results = contracts()[token.partition(",")[0]].signature.results
    assert {line.partition(":")[0].partition(".")[0] for line in lines} == {r.name for r in results}
    assert all(float(line.split("worst by ")[1].split()[0]) <= 1 for line in lines), lines


def test_a_saved_batch_is_the_batch(tmp_path):
    token = "sparse_mla,T=3,N=2,C=8,R=4,k=5,scale=0.5,batch=1/9+2/30,block_size=16,0"
    kept, inputs = np.load(saved(token, create("reference"), tmp_path)[0]), build(Case.from_token(token))
    for name in ("cu_q", "kv_len", "block_table", "block_size"):
        np.testing.assert_array_equal(kept[f"in/batch.{name}"], getattr(inputs.batch, name))
    np.testing.assert_array_equal(kept["in/kv.c"], widen(inputs.operands["kv"]["c"]))
    np.testing.assert_array_equal(kept["in/sel.indices"], inputs.operands["sel"].native.indices)


# -- what a broken kernel gives --------------------------------------------------------------------------------------

ROUTE = "moe_route,T=3,E=9,k=2,scale=1.0,0"


def routed(id: float, dtype: Any = np.int32, k: int = 2, weights: tuple[int, ...] = (2,)) -> Any:
    def kernel(self: Any, logits: Any, *_: Any, **__: Any) -> Any:
        return np.full((len(logits), k), id, dtype), np.zeros((len(logits), *weights), np.float32)

    return kernel


@pytest.mark.parametrize(
    ("token", "kernel", "verdict", "line"),
    [
        (NORM, lambda *_, **__: 1 / 0, "FAIL_ERROR", "y: nothing came back, expected (3, 5)"),
        (NORM, lambda self, x, w, **_: x[:, :4], "FAIL_SHAPE", "y: (3, 4) came back, expected (3, 5)"),
        (NORM, lambda self, x, w, **_: x.astype(np.float64), "FAIL_DTYPE", "y: 15 of 15 differ"),
        (ROUTE, routed(99), "FAIL_VALUE", "ids.scores: 6 of 6 differ"),
        (ROUTE, routed(-1), "FAIL_VALUE", "ids.scores: 6 of 6 differ"),
        (ROUTE, routed(0, k=3), "FAIL_SHAPE", "ids.scores: nothing came back, expected (3, 2)"),
        (ROUTE, routed(0, np.float32), "FAIL_DTYPE", "ids.scores: "),
        (ROUTE, routed(0, weights=()), "FAIL_SHAPE", "weights: (3,) came back, expected (3, 2)"),
    ],
)
def test_whatever_came_back_is_saved(token, kernel, verdict, line, tmp_path):
    file, result = saved(token, backend(**{token.partition(",")[0]: kernel}), tmp_path)
    assert result.verdict == verdict
    assert any(found.startswith(line) for found in printed(file)), printed(file)
    assert replay(read(file), create("reference")).verdict == "PASS"


def test_none_is_no_result(tmp_path):
    file = save(build(Case.from_token(NORM)), {"y": np.array(None)}, tmp_path, "case", "made")
    assert printed(file)[1] == "y: nothing came back, expected (3, 5)"
    assert read(file).case.token == NORM


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(capsys):
    """(exit code, stdout, stderr) of `porthal replay`."""

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            app(["replay", *map(str, args)], prog_name="porthal")
        return left.value.code or 0, *capsys.readouterr()

    return call


def test_the_command_saves_and_judges_again(command, tmp_path):
    token = "take_rows,T=4,H=3,M=2,0"
    code, out, err = command(token, "--backend", "reference", "--save", tmp_path)
    file, script = tmp_path / "case.npz", tmp_path / "case.py"
    assert code == 0 and out.startswith("PASS: take_rows by reference's own kernel")
    assert err == f"saved: `python {script}` measures it, `porthal replay {file}` judges it again\n"
    assert printed(file)[1] == "y: 0 of 6 differ, the worst by 0 times its budget, at flat index 0"
    before = file.read_bytes()
    assert command(file, "--backend", "reference") == (0, out, "")
    assert command(file, "--backend", "reference", "--save", tmp_path) == (0, out, err)
    assert read(file).case.token == token and len(file.read_bytes()) == len(before)


def test_the_command_saves_no_mistake(command, tmp_path):
    code, out, err = command("take_rows,T=4,H=3,M=2,fault=dtype,0", "--backend", "reference", "--save", tmp_path)
    assert (code, out) == (2, "") and "deliberate mistake" in err and not list(tmp_path.iterdir())


def test_the_command_cannot_write(command, tmp_path):
    (tmp_path / "file").touch()
    code, _, err = command(NORM, "--backend", "reference", "--save", tmp_path / "file")
    assert (code, err) == (2, f"porthal: cannot write {tmp_path / 'file' / 'case.npz'}: File exists\n")


# -- wrong files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return saved("kv_write,T=3,A=4,B=2,batch=1/9+2/30,block_size=16,0", create("reference"), folder)[0]


UNREAD = "expected a file that --save wrote"
WRONG = [
    (lambda kept: kept | {"schema": 99}, "does not hold a call for this porthal: its schema is 99, expected 1; save it again"),
    (lambda kept: kept | {"version": 99}, "does not hold a call for this porthal: its kv_write has version 99, expected 1"),
    (lambda kept: kept | {"op": "fft"}, "does not hold a call for this porthal: unknown op 'fft', known are add, "),
    (lambda kept: kept | {"token": "fft,0"}, "does not hold a call for this porthal: 'fft,0' is not a case token"),
    (lambda kept: kept | {"in/batch.cu_q": np.zeros(9)}, "does not hold a call for this porthal: Batch.cu_q is float64"),
    (lambda kept: kept | {"spec/pages": "{"}, "does not hold a call for this porthal: Expecting property name"),
    (lambda kept: kept | {"spec/pages": "[1]"}, "does not hold a call for this porthal: "),
    (lambda kept: {}, "lacks 'schema': save it again"),
]


@pytest.mark.parametrize(("change", "sentence"), WRONG)
def test_another_call_is_refused_in_a_sentence(change, sentence, good, command, tmp_path):
    file = tmp_path / "other.npz"
    np.savez(file, **change(dict(np.load(good))))
    code, out, err = command(file, "--backend", "reference")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"porthal: {file} {sentence}"), err


def test_every_missing_key_is_named(good, tmp_path):
    file, kept = tmp_path / "less.npz", dict(np.load(good))
    first = {"schema", "op", "version", "token", "dtype", "spec", "in", "attr"}
    results = {key for key in kept if key.startswith("dtype/pages.")}
    needed = [key for key in kept if key.partition("/")[0] in first and key not in results]
    assert len(needed) > 12
    for key in needed:
        np.savez(file, **{k: v for k, v in kept.items() if k != key})
        with pytest.raises(UsageError, match=f"^{file} lacks '{key}': save it again$"):
            read(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        (b"", "it is not a whole .npz"),
        (b"PK\x03\x04 is all", "it is not a whole .npz"),
        (b"text\n", "it is not a whole .npz"),
    ],
)
def test_other_bytes_are_refused_in_a_sentence(content, why, command, tmp_path):
    file = tmp_path / "other.npz"
    if content is not None:
        file.write_bytes(content)
    code, out, err = command(file, "--backend", "reference")
    assert (code, out, err) == (2, "", f"porthal: cannot read {file}: {why}; {UNREAD}\n")


def test_one_array_or_objects_are_refused(tmp_path):
    file = tmp_path / "other.npz"
    with open(file, "wb") as out:
        np.save(out, np.zeros(3))
    with pytest.raises(UsageError, match=UNREAD):
        read(file)
    np.savez(file, schema=np.array([object()]))
    with pytest.raises(UsageError, match=UNREAD):
        read(file)


def test_a_torn_or_bent_file_is_refused_in_a_sentence(good, tmp_path):
    file, whole = tmp_path / "torn.npz", good.read_bytes()
    for cut in range(0, len(whole), max(len(whole) // 50, 1)):
        file.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"it is not a whole \.npz"):
            read(file)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(200):
        bent = bytearray(whole)
        bent[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        file.write_bytes(bent)
        try:
            read(file)
        except UsageError:
            refused += 1
    assert refused > 100
