"""The suite is tested: what is planted is found, what is honest is accepted."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import elements
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.check import check
from porthal.conformance.selftest import compiled, planting
from porthal.conformance.selftest.planting import SCORED, Defect, defects, edited, plant, plantable, planted
from porthal.conformance.selftest.run import (
    COSTLY,
    LEVEL,
    SEEDS,
    Score,
    Trial,
    attempt,
    plan,
    sampled,
    self_test,
    tasks,
)
from porthal.conformance.selftest.variants import variants
from porthal.hal import UsageError, contracts, create

ROOT = Path(__file__).resolve().parents[2]

def test_every_op_has_planted_defects_and_honest_variants():
    planted_in = {d.op for d in defects()}
    assert planted_in == {v.op for v in variants()} == set(contracts())
    assert len(defects()) >= 80
    assert len({d.kind for d in defects()}) >= 25
    assert LEVEL == "standard"


def test_exceptions_are_explained():
    for d in defects():
        assert set(d.dtypes) <= set(SCORED) and d.dtypes, d.key
        assert bool(d.why) == (d.dtypes != SCORED), d.key
        assert d.old != d.new, d.key
        if d.equivalent:
            assert d.equivalent.count(" ") > 8, d.key
    assert sum(bool(d.equivalent) for d in defects()) < len(defects()) / 20


def test_every_edit_applies():
    for d in defects():
        assert d.native or planted(d).name == "planted"
        assert edited(d.source, ((d.old, d.new),), d.key)
    for v in variants():
        if v.source in compiled.SOURCES:
            assert edited(v.source, v.edits, v.key)
        elif v.edits:
            plant(v.key, v.source, *v.edits)


def test_an_edit_that_no_longer_applies_is_an_error():
    with pytest.raises(UsageError, match="x: its snippet stands 0 times in backend, expected once"):
        edited("backend", (("no such line", ""),), "x")
    with pytest.raises(UsageError, match="expected once; renew it: 'return'"):
        edited("backend", (("return", ""),), "x")


def test_planting_leaves_the_real_backend_alone():
    from porthal.backends.torch import backend

    before = dict(vars(backend)), dict(vars(backend.Torch))
    made = planted(next(d for d in defects() if d.source == "ranking"))
    assert type(made) is not backend.Torch
    assert (dict(vars(backend)), dict(vars(backend.Torch))) == before


# -- in C++ ------------------------------------------------------------------------------------------------------------


def test_cpp_is_compiled_as_the_real_kernels_are():
    from porthal.backends.cpu import _native

    assert set(_native.isas()) <= set(compiled.ISA)
    build = (compiled.HERE / "CMakeLists.txt").read_text()
    assert [flag for flag in (*compiled.OPTIONS[1:4], *compiled.ISA["avx512bf16"].split()) if flag not in build] == []


def test_cpp_that_does_not_compile_is_an_error(monkeypatch):
    broken = Defect("topk", "broken", "none", "*low = *high = keys[0];", "*low = *high = lost;", source="selection.cpp")
    with pytest.raises(UsageError, match=r"^topk/broken: the edited source does not compile; renew the edit: .*lost"):
        planted(broken)
    with pytest.raises(UsageError, match=r"x: its snippet stands 0 times in selection\.cpp, expected once"):
        edited("selection.cpp", (("no such line", ""),), "x")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("HERE", Path("/nowhere")), "their sources are not part of a wheel; run the self-test in a clone"),
        (("_compiler", lambda: ["no-c++"]), "there is no C++ compiler 'no-c++'; install one, or name it in CXX"),
    ],
)
def test_what_keeps_cpp_from_being_planted_is_said_in_one_sentence(monkeypatch, change, why):
    native = {d.key for d in defects() if d.native and d.op == "topk"}
    assert native & {key for _, key, *_ in tasks(["topk"])}
    monkeypatch.setattr(compiled, *change)
    monkeypatch.setattr("porthal.conformance.selftest.run.tasks", lambda ops, quick: [])
    score = self_test(["topk"], workers=1)
    assert score.summary.endswith(f"; {len(native)} defects in C++ were not planted: {why}")
    assert not native & {key for _, key, *_ in tasks(["topk"])} and not native & set(score.equivalent)
    assert [d for d in plantable(["topk"])] == [d for d in defects() if d.op == "topk" and not d.native]
    assert self_test(["embedding"], workers=1).unplanted == ""


# -- a sample of the score; tests/proof has the rest -------------------------------------------------------------------


@pytest.mark.parametrize("op", contracts())
def test_the_first_defect_of_each_op_is_caught(op):
    defect = next(d for d in defects() if d.op == op and not d.native and not d.equivalent)
    trial = attempt(("defect", defect.key, defect.scored[0], 0))
    assert Case.from_token(trial.token).op == op
    assert trial.verdict.startswith("FAIL"), f"{defect.key} after {trial.cases} cases"


def plain_and_rounded(contract):
    return not (contract.decomposition or contract.exact or contract.choice or contract.signature.of_kind("Batch"))


@pytest.mark.parametrize("op", [op for op, contract in contracts().items() if plain_and_rounded(contract)])
def test_an_honest_variant_of_each_op_on_arrays_and_weights_passes(op):
    honest = [v for v in variants() if v.op == op]
    variant = next((v for v in honest if v.edits), honest[0])
    trial = attempt(("variant", variant.key, "", 0))
    assert (trial.token, trial.message) == ("", "") and trial.cases >= 5


def test_the_score_of_an_op_is_taken_in_workers():
    score = self_test(["select_rows"], quick=True, workers=1)
    assert score.exit_code == 0, score.summary
    assert len(score.caught) == len([t for t in tasks(["select_rows"], quick=True) if t[0] == "defect"]) > 1
    assert len(score.passed) >= 6


# -- the score ---------------------------------------------------------------------------------------------------------


def test_a_kernel_without_a_defect_escapes_and_one_with_it_does_not(monkeypatch):
    whole = "return _rows_or_zero(x, rows)\n"
    same = Defect("take_rows", "nothing", "none", whole, "return _rows_or_zero(x, rows + 0)\n")
    gone = Defect("take_rows", "raises", "error", whole, "raise RuntimeError\n")
    monkeypatch.setattr(planting, "defects", lambda: (same, gone))
    monkeypatch.setattr("porthal.conformance.selftest.run.defects", lambda: (same, gone))
    escaped = attempt(("defect", same.key, "bfloat16", 0))
    caught = attempt(("defect", gone.key, "bfloat16", 0))
    assert not escaped.token and escaped.cases > 20
    assert caught.verdict == "FAIL_ERROR" and caught.token.startswith("take_rows,") and caught.cases == 1


def test_the_score_fails_on_escapes_alarms_and_idleness():
    good = Trial("add", "x", "float32", 0, "add,T=1,0", "FAIL_VALUE", "", 1, 0.0)
    bad = Trial("add", "x", "float32", 0, "", "", "", 9, 0.0)
    idle = Trial("add", "x", "float32", 0, "", "", "", 0, 0.0)
    assert Score((good,), (bad,), (), 0.0).exit_code == 0
    assert Score((bad,), (bad,), (), 0.0).exit_code == 1
    assert Score((good,), (good,), (), 0.0).exit_code == 1
    assert Score((good,), (idle,), (), 0.0).exit_code == 1


def test_seeds_make_other_cases_and_all_have_their_turn():
    first, second = sampled("linear", 0), sampled("linear", 1)
    assert {c.seed for c in first} == {0} and {c.seed for c in second} == {1}
    assert {c.token for c in first}.isdisjoint(c.token for c in second)
    turns = {c.token.rpartition(",")[0] for seed in range(20) for c in sampled("linear", seed)}
    everything = {c.token.rpartition(",")[0] for c in plan("linear") if elements(c) <= COSTLY}
    assert turns == everything


def test_the_page_speaks_of_what_is_planted_now():
    """Its figures are those of a whole run; after a change of defects or variants it must be made again."""
    page = (Path(__file__).parents[2] / "docs" / "self-test.md").read_text(encoding="utf-8")
    planted_now, honest = tasks(), [v for v in variants() if not v.isa]  # instruction sets are the machine's
    for op in contracts():
        mine = [t for t in planted_now if t[0] == "defect" and t[1].startswith(f"{op}/")]
        counts = [sum(t[2] == dtype for t in mine) for dtype in ("float32", "bfloat16", "")]
        cells = [f"{n}/{n}" if n else "" for n in counts]
        row = next(line for line in page.splitlines() if line.startswith(f"| {op} | ")).split(" | ")
        passed, of = map(int, row[4].split("/"))
        assert row[1:4] == cells, op
        assert passed == of >= SEEDS * sum(v.op == op for v in honest), op


def test_unknown_ops_are_refused():
    with pytest.raises(UsageError, match="unknown op 'softmax'"):
        tasks(["softmax"])


def test_truncation_and_a_rounded_weight_are_seen_beside_permitted_roundings():
    """Both hide in what a norm may round; the first leans to one side, the second is the same in all rows."""
    for name in ("truncates", "weight-in-the-dtype-of-x"):
        trial = attempt(("defect", f"rms_norm/{name}", "bfloat16", 0))
        assert trial.verdict == "FAIL_VALUE", name


@pytest.mark.parametrize(
    "token",
    [
        "mla_prolog,T=2,H=256,Q=128,N=8,D=32,C=512,R=64,theta=1000000.0,eps=0.5,h:fp16,h~denormal,q_a~equal,q_norm~equal,"
        "q_b~equal,kv_a~equal,kv_norm~denormal,w_uk~equal,kv~equal,batch=prefill,block_size=64,0",
        "mla_prolog,T=2,H=256,Q=128,N=8,D=32,C=512,R=64,theta=1000000.0,eps=1e-05,h:fp16,h~denormal,q_a~equal,q_norm~equal,"
        "q_b~equal,kv_a~denormal,kv_norm~equal,w_uk~equal,kv~equal,batch=prefill,block_size=64,0",
        "mla_prolog,T=2,H=256,Q=128,N=8,D=32,C=512,R=64,theta=1000000.0,eps=0.5,h:fp16,q_a~equal,q_norm~denormal,h~equal,"
        "q_b~equal,kv_a~equal,kv_norm~equal,w_uk~equal,kv~equal,batch=prefill,block_size=64,0",
        "mla_prolog,T=2,H=256,Q=128,N=8,D=32,C=512,R=64,theta=1000000.0,eps=0.5,h:fp16,q_b~denormal,h~equal,q_a~equal,"
        "q_norm~equal,kv_a~equal,kv_norm~equal,w_uk~equal,kv~equal,batch=prefill,block_size=64,0",
        "index_prolog,T=78,Q=1,H=1,G=8,D=8,theta=1000000.0,width=6,qr:bf16,h~zeros,batch=0/0+65/72+13/0,block_size=16,"
        "view=broadcast,0",
        "index_prolog,T=65,Q=2,H=1,G=5,D=13,theta=1000000.0,width=6,qr:bf16,qr~equal,batch=0/0+65/65,block_size=16,"
        "view=columns,0",
        "mtp_input,T=1,H=6,eps=1e-05,e:bf16,enorm:fp32,hnorm:fp32,e~equal,g~equal,enorm~equal,hnorm~equal,eh_proj~ties,0",
        "silu_mul,T=6,I=2,x:fp32,x~large,view=transposed,0",
        "moe_route,T=1,E=8,k=2,scale=2.5,n_group=2,logits~large,bias~negative,view=broadcast,0",
        "moe_experts,T=1,H=4,I=6,E=1,k=2,x:fp32,weights~ties,0",
        "moe_experts,T=20,H=5,I=1,E=1,k=1,x:fp16,w13~small,w2~small,0",
        "mla_prolog,T=25,H=1,Q=1,N=1,D=1,C=1,R=64,theta=1000000.0,eps=1e-05,h:bf16,h~equal,q_b~equal,kv~zeros,"
        "batch=0/0+25/25,block_size=16,0",
        "indexer_topk,T=29,G=14,D=1,k=1,scale=0.015625000000000003,iq:fp32,keys~equal,batch=0/0+29/29,block_size=1,0",
        "linear,T=255,K=1,N=513,x:bf16,w~denormal,0",
    ],
)
def test_what_no_machine_can_tell_is_no_mistake(token):
    """Roundings that all results share, as every number is alike; rows that differ by rotation alone; sums that cancel, or
    underflow where the chip may flush; groups of experts that differ by less than float32 resolves; equal keys whose
    products are summed in another order in the last column of a tile."""
    result = check(Case.from_token(token), Bindings(create("torch")), "standard")
    assert result.verdict == "PASS", result.explain()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_a_self_test_that_is_stopped(number):
    program = [sys.executable, "-c", "from porthal.cli import main; main()", "self-test", "--op", "linear", "--workers", "2"]
    heard = partial(signal.signal, number, signal.SIG_DFL) if number != signal.SIGKILL else None
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as stopped:
        first = stopped.stderr.readline()  # a trial is done, and the workers are at others
        children = Path(f"/proc/{stopped.pid}/task/{stopped.pid}/children").read_text().split()
        stopped.send_signal(number)
        rest = stopped.stderr.read()
    assert re.fullmatch(r"1/\d+ linear( \d+:\d\d left)?\n", first) and "Traceback" not in rest, rest
    assert stopped.returncode == (-number if number == signal.SIGKILL else 128 + number)
    until = time.monotonic() + 10
    while time.monotonic() < until and any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)
    assert len(children) >= 2 and not [child for child in children if Path(f"/proc/{child}").exists()]
