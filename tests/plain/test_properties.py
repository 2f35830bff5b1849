"""Any legal token builds and any other text is refused; what properties find is small, repeatable and fits in a file."""

import hashlib
import importlib
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from porthal.backends.reference.backend import Reference
from porthal.cli.app import app
from porthal.conformance import run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import FAR
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.call import repeated
from porthal.conformance.execution.outcome import Outcome
from porthal.conformance.judgement.call import judge
from porthal.conformance.runner.check import check
from porthal.conformance.runner.properties import search
from porthal.hal import Batch, Pages, Selection, Unavailable, UsageError, Weight, contracts, create
from tests.tokens import is_case_or_refused, passed, texts


def backend(**members):
    return type("Made", (Reference,), {"name": "made", "base": "reference", **members})()


# -- tokens ----------------------------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts())
def test_text_is_a_case_or_refused_in_one_sentence(text):
    """More of them in tests/proof."""
    assert is_case_or_refused(text)


LINEAR = "linear,T=2,K=3,N=4"
TOPK = "topk,T=5,k=16,batch=mixed"
REFUSED = {
    "liner,T=2,0": "unknown op 'liner', did you mean 'linear'[?]$",
    "fft,T=2,0": "is not a case token: unknown op 'fft', known are add, ",
    f"{LINEAR},x:bf16": "its last part is 'x:bf16', expected the seed, a whole number from 0 to 4294967296$",
    "linear": "is not a case token: expected op,name=value,...,seed as a report prints it, or the path of a saved .npz$",
    f"{LINEAR},view=\n,0": "is not a case token: expected op",
    "linear,0": "linear: it lacks T, K, N$",
    "topk,0": "topk: it lacks T, k, batch, block_size$",
    "linear,T=-2,K=3,N=4,0": "linear: T is -2, expected a whole number from 0 to 1048576$",
    "linear,T=1e3,K=3,N=4,0": "T is 1e3, expected a whole number from 0 to 1048576$",
    "linear,T=2000000,K=3,N=4,0": "T is 2000000, expected a whole number from 0 to 1048576$",
    "linear,T=,K=3,N=4,0": "T is empty, expected a whole number",
    "rms_norm,T=2,H=4,eps=nan,0": "eps is nan, expected a finite number$",
    f"{LINEAR},T=3,0": "linear: T is given twice$",
    f"{LINEAR},via=a,via=b,0": "via is given twice$",
    f"{LINEAR},via=,0": "via= names no provider$",
    f"{LINEAR},x:int8,0": "x is int8, expected one of float32, bfloat16, float16$",
    f"{LINEAR},w:fp16,0": "w is float16, expected float32$",
    f"{LINEAR},q:bf16,0": "q is not an operand, expected one of x, w$",
    f"{LINEAR},q~normal,0": "q is not an operand, expected one of x, w$",
    f"{TOPK},block_size=16,batch:fp32,0": "batch is not an operand with a dtype, expected scores$",
    f"{LINEAR},x~nope,0": "nope is not a value generator for x, expected one of normal, small, large, ",
    f"{TOPK},block_size=0,0": "block_size is 0, expected 1 to 1024$",
    f"{TOPK},block_size=1025,0": "it requires block_size to be 1 to 1024$",
    f"{TOPK},block_size=16,batch=long,0": "batch is given twice$",
    "topk,T=5,k=16,batch=nope,block_size=16,0": "'nope' is not a composition, expected one of decode, .* or requests such",
    "kv_write,T=1,A=8,B=8,batch=1/1,block_size=16,-second,0": "second cannot be left out, expected second with b$",
    "rms_norm,T=2,0": "lacks H",
    "rms_norm,T=2,H=0,0": "H is 0",
    "rms_norm,T=2,T=3,H=4,0": "given twice",
    "rms_norm,T=2,H=4,K=4,0": "K is not one of its sizes, expected one of T, H$",
    "rms_norm,T=2,H=4,x:int32,0": "x is int32, expected one of float32, bfloat16, float16$",
    "rms_norm,T=2,H=4,x~routed,0": "routed is not a value generator for x",
    "rms_norm,T=2,H=4,batch=mixed,0": "takes no batch",
    "rms_norm,T=2,H=4,-weight,0": "weight cannot be left out, expected every operand$",
    "rms_norm,T=1000000,H=1000000,0": "numbers, expected at most",
    "rms_norm,T=2,H=4,eps=0.0,0": "requires eps to be 1e-12 to 1$",
    "topk,T=2,k=1,block_size=16,0": "lacks batch",
    "topk,T=2,k=1,batch=1/4,block_size=16,0": "1 query rows, expected T = 2",
    "topk,T=2,k=1,batch=2/1,block_size=16,0": "at least its own query rows",
    "topk,T=10,k=1,batch=9/9+1/1,block_size=16,0": "come first",
    "topk,T=2,k=1,batch=1/40+1/40/4,block_size=16,0": "shares 4 pages with the one before, expected at most 3",
    "kv_write,T=2,A=8,B=8,batch=1/40+1/40/3,block_size=16,0": "shares 3 pages with the one before, expected at most 2",
    "kv_write,T=2,A=8,B=8,batch=crowd,block_size=16,0": "share pages, which this op would write",
    "take_rows,T=0,H=4,M=0,fault=range,0": "no index",
    "select_rows,M=3,T=0,k=4,0": "nothing to point to",
    "moe_route,T=2,E=4,k=5,scale=1.0,0": "requires k to be 1 to 4$",
}


@pytest.mark.parametrize("token", REFUSED)
def test_refusals_say_why(token):
    with pytest.raises(UsageError, match=REFUSED[token]):
        Case.from_token(token)


def test_rotated_widths_must_be_even():
    """Found by properties: the rope inside cannot turn an odd number of elements."""
    for token, sentence in (
        ("index_prolog,T=1,Q=8,H=8,G=1,D=8,theta=1e6,width=3,batch=1/1,block_size=16,0", "width to be 2 to 8 in steps of 2"),
        ("mla_prolog,T=1,H=8,Q=8,N=1,D=8,C=8,R=3,theta=1e6,eps=1e-5,batch=1/1,block_size=16,0", "R to be even"),
    ):
        with pytest.raises(UsageError, match=sentence):
            Case.from_token(token)


def test_requests_of_a_token_share_pages():
    batch = build(Case.from_token("kv_write,T=9,A=8,B=8,batch=1/40+1/80/2+7/50/2,block_size=16,0")).batch
    assert batch.q_len.tolist() == [1, 1, 7] and batch.kv_len.tolist() == [40, 80, 50]
    first, second, third = batch.block_table
    assert first[:2].tolist() == second[:2].tolist() == third[:2].tolist()
    assert len(set(first[2:3]) | set(second[2:5]) | set(third[2:4])) == 6


def test_every_copied_page_exists():
    """Found by properties: M pages were cut to the 6 that the cache had."""
    inputs = build(Case.from_token("page_copy,M=17,A=8,B=8,block_size=16,0"))
    assert len(set(inputs.operands["target"].tolist())) == 17 < inputs.operands["pages"].spec.n_blocks


def bytes_of(value):
    arrays = value.leaves() if isinstance(value, (Batch, Selection, Pages, Weight)) else (value,)
    return b"".join(np.ascontiguousarray(a).tobytes() for a in arrays if a is not None)


PINNED = {
    "linear,T=3,K=7,N=5,x:bf16,x~large,0": "12a73ee536ad1674",
    "moe_experts,T=5,H=4,I=3,E=3,k=2,first_expert=1,x:fp16,ids~wild,0": "5318d7480e4e58a6",
    "sparse_mla,T=3,N=2,C=8,R=4,k=5,scale=0.5,batch=1/9+2/30/0,block_size=16,sel~short,0": "b1628a3a68deec38",
    "mla_prolog,T=4,H=6,Q=4,N=2,D=4,C=8,R=4,theta=10000.0,eps=1e-05,h:fp32,batch=mixed,block_size=64,7": "d1ff8f1ca3d81b5c",
    "sample,T=6,V=11,logits:bf16,logits~ties,0": "90bbbcda53a87d49",
    "grouped_gemm,M=12,K=3,N=2,E=5,x~denormal,counts~skewed,0": "c1b1d3b638c5312e",
}


@pytest.mark.parametrize("token", PINNED)
def test_inputs_are_the_same_bits_on_every_machine(token):
    found = hashlib.sha256(b"".join(bytes_of(v) for v in build(Case.from_token(token)).operands.values()))
    assert found.hexdigest()[:16] == PINNED[token]


# -- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(contracts()))
def test_drawn_cases_are_legal_and_differ(op):
    drawn = search(contracts()[op], 12, passed)
    assert len({r.token for r in drawn}) == len(drawn) >= 8


def test_drawn_cases_go_where_no_plan_goes():
    tokens = [r.token for op in ("kv_write", "topk", "moe_experts") for r in search(contracts()[op], 80, passed)]
    for wanted in (f"view={FAR}", "view=transposed", "ids~wild", "ids~repeated", "block_size=1", "T=0,"):
        assert any(wanted in t for t in tokens), wanted
    batches = [r.split("/") for t in tokens for p in t.split(",") if p.startswith("batch=") for r in p[6:].split("+")]
    assert any(len(r) == 3 for r in batches)
    assert any(r[0] == "0" and r[1] != "0" for r in batches) and any(r[0] != "0" and r[1] == "0" for r in batches)


def test_the_seed_decides():
    first, again, other = ([r.token for r in search(contracts()["rope"], 10, passed, seed)] for seed in (1, 1, 2))
    assert first == again != other


def test_drawn_cases_keep_to_the_dtypes():
    drawn = search(contracts()["linear"], 10, passed, dtypes=["float16"])
    assert drawn and all("x:fp16" in r.token for r in drawn)


def off_from_five_columns(self, x, weight, *, eps=1e-5):
    y = create("reference").derive(contracts()["rms_norm"])(x, weight, eps=eps)
    return y * np.array(1 if x.shape[1] < 5 else 1.5, y.dtype)


def test_what_fails_is_the_smallest_that_does():
    made = backend(rms_norm=off_from_five_columns)
    report = run(made, ["rms_norm"], dtypes=["bfloat16"], properties=40)
    smallest = report.failures[-1]
    assert smallest.token == "rms_norm,T=1,H=5,x:bf16,0" and smallest.verdict == "FAIL_VALUE"
    assert "replay 'rms_norm,T=1,H=5,x:bf16,0'" in report.replay(smallest)
    assert check(Case.from_token(smallest.token), Bindings(made)).message == smallest.message


def test_drawn_cases_run_in_workers():
    plan = len(cases(contracts()["cast"]))
    report = run("reference", ["cast"], properties=5)
    assert report.ok and len(report.results) == plan + 5


@pytest.mark.parametrize("op", ["rms_norm", "topk", "kv_write", "sparse_mla", "moe_experts", "page_copy"])
def test_the_reference_has_every_property(op):
    bench = Bindings(create("reference"))
    drawn = search(contracts()[op], 8, lambda case: check(case, bench), seed=3)
    assert [r.message for r in drawn if r.failed] == []


def test_without_hypothesis_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "porthal.conformance.runner.properties")
    with pytest.raises(Unavailable, match="pip install"):
        importlib.import_module("porthal.conformance.runner.properties")


@pytest.mark.parametrize(
    "token",
    [
        "linear,T=20,K=256,N=64,x:bf16,x~denormal,w~integer,0",
        "rms_norm,T=20,H=64,x:bf16,x~denormal,0",
        "silu_mul,T=20,I=64,x:fp32,x~denormal,0",
    ],
)
def test_chips_may_take_denormals_for_zeros(token):
    """Found by properties: bfloat16 products of PyTorch on x86 are zero then."""
    inputs = build(Case.from_token(token))
    x = inputs.operands["x"]
    zeros = {"y": np.zeros((20, 64), x.dtype)}
    assert judge(inputs, Outcome(zeros, zeros)).verdict == "PASS"
    twice = {"y": np.full((20, 64), 2.0**-100, x.dtype)}
    assert judge(inputs, Outcome(twice, twice)).verdict == "FAIL_VALUE"


def test_the_command_draws_cases(capsys):
    with pytest.raises(SystemExit) as left:
        app(["conform", "--backend", "reference", "--op", "take_rows", "--properties", "5", "--seed", "2"], "porthal")
    assert not left.value.code
    assert f"{len(cases(contracts()['take_rows'])) + 5} of" in capsys.readouterr().out


def test_far_rows_are_far():
    strides = []

    def add(self, a, b):
        strides.append(a.strides[0])
        return create("reference").derive(contracts()["add"])(a, b)

    made = backend(add=add)
    inputs = build(Case.from_token(f"add,T=5,H=3,view={FAR},0"))
    outcome = repeated(Bindings(made).bound(inputs).binding, inputs)
    assert judge(inputs, outcome).verdict == "PASS"
    assert min(strides) * 4 >= 2**31
