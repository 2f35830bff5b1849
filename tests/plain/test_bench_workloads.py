"""Workloads: every call of a step is there as often as the step makes it, as large as the bounds allow."""

import json
import math
from collections import Counter

import pytest

from porthal.bench.curve import crossing, curve, pairs
from porthal.bench.scale import Bounds, Sized
from porthal.bench.workloads import of_model, steps, workload
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.profiles import home_of
from porthal.hal import UsageError, contracts, recorded
from porthal.hal.calls import distinct
from porthal.model.checkpoint import Blank
from porthal.model.config import Config
from porthal.model.glm5 import Glm5
from porthal.model.load import DEMO, stepped, trace

GLM5 = Config.read(home_of())

def test_a_decode_step_makes_the_calls_that_trace_lists_without_drafts():
    traced = {(c.op, c.signature()): c.count for c in distinct(trace(GLM5, "bfloat16", 1, 8192))}
    made = {(c.op, c.signature()): c.count for c in distinct(stepped(GLM5, [(1, 8192)], "bfloat16"))}
    layers = GLM5.num_hidden_layers
    for call, count in made.items():
        if call[0] in ("mla_prolog", "indexer_topk", "sparse_mla", "mla_output"):
            assert (count, traced[call]) == (layers, layers + 1)  # trace lists the MTP layer too
    assert {op for op, _ in made} - {op for op, _ in traced} == {"check_finite"}


def test_a_verifying_step_drafts_with_the_mtp_layer():
    calls = distinct(stepped(GLM5, [(4, 8192)] * 2, "bfloat16", drafts=3))
    rows = {c.operands["x"]["shape"][0]: c.count for c in calls if c.op == "linear" and c.results["y"]["shape"][1] == 154880}
    assert rows == {2: 3, 8: 1}  # three drafts for each, then all rows at once
    assert sum(c.count for c in calls if c.op == "mla_prolog") == GLM5.num_hidden_layers + 3  # two drafts, and the true rows


def test_steps_go_as_far_as_the_context():
    assert [s.context for s in steps("decode", 8192)] == [1024, 8192] * 3
    assert [s.group for s in steps("decode", 1000)][1:] == [f"decode, {n} requests, context 1000" for n in (8, 64)]
    assert [s.requests[0] for s in steps("prefill", 4096)] == [Request(512, 4096), Request(4096, 4096)]
    assert list(steps("verify", 4096, drafts=False)) == []
    with pytest.raises(UsageError, match="unknown step 'train'"):
        list(steps("train", 1))


def test_half_a_billion_parameters_in_steps_of_one_request():
    made = workload("half", ["prefill", "verify"], "", Bounds())
    assert list(dict.fromkeys(row.group for row in made.rows)) == [
        "prefill, 1024 rows, context 1k", "prefill, 4096 rows, context 4k", "verify, 1 request, 3 drafts, context 1k"
    ]  # fmt: skip
    assert made.dtype == "bfloat16" and made.whole is not None and made.whole.config is not None
    assert (made.whole.requests, made.whole.drafts) == ((Request(4, 1024),), 3)
    sizes: dict[str, int] = {}

    class Sizes(Blank):
        def read(self, name, shape, rows):
            sizes[name] = math.prod(shape)
            return super().read(name, shape, rows)

    recorded(lambda ops: Glm5(made.whole.config, Sizes(), ops))
    main = sum(n for name, n in sizes.items() if not name.startswith("model.layers.8."))
    assert main == 497_347_584 + 7 * 32  # what transformers counts, and the routers' biases
    with pytest.raises(UsageError, match="unknown step 'train'"):
        workload("half", ["train"], "", Bounds())


@pytest.fixture(scope="module")
def decode():
    return of_model("glm5", GLM5, ["decode"], "bfloat16", Bounds())


def test_every_row_can_be_replayed_by_its_token(decode):
    for case in {row.case for row in decode.rows}:
        assert Case.from_token(case.token) == case


def test_every_call_is_within_the_bounds_or_as_small_as_it_goes(decode):
    over = [row for row in decode.rows if seconds(row.case) > 1.5 * Bounds().seconds]
    assert over == []


def test_what_is_scaled_says_so_and_counts_for_more(decode):
    for group, context in (("decode, 1 request, context 8k", 8192), ("decode, 1 request, context 128k", 131072)):
        counts = Counter(op for op, _ in stepped(GLM5, [(1, context)], "bfloat16"))
        for op, count in counts.items():
            rows = [row for row in decode.rows if row.group == group and row.case.op == op]
            whole = sum(row.calls for row in rows)
            assert (whole > count) == any("stand for one" in row.scaled for row in rows) and whole >= count
    lone = next(r for r in decode.rows if r.case.op == "moe_layer" and r.group == "decode, 1 request, context 1k")
    assert "E 8 of 256" in lone.scaled  # the others are not read


def test_requests_are_left_out_in_proportion():
    [spec] = {s for op, s in stepped(GLM5.shallow(), [(1, 32768)] * 64, "bfloat16") if op == "sparse_mla"}
    whole = Sized.of("sparse_mla", spec, (Request(1, 32768),) * 64)
    cut = whole.within(Bounds(memory=2**30))
    assert cut.case.batch == "16*1/32768" and cut.stands_for == 4.0 and cut.scaled == "16 of 64 requests, 4 calls stand for one"
    assert whole.stands_for == 1.0 and whole.scaled == ""
    assert cut.bytes <= 2**30 < whole.bytes


def test_an_op_that_only_writes_a_cache_is_one_call_at_all_contexts(decode):
    tokens = {row.case.token for row in decode.rows if row.case.op == "mla_prolog" and "T=8," in row.case.token}
    assert len(tokens) == 1


def test_an_op_that_no_step_calls_comes_by_itself(decode):
    rows = decode.only(["layer_norm"], Bounds()).rows
    assert [(r.step, dict(r.case.dims)["T"]) for r in rows] == [("alone", 1), ("alone", 8), ("alone", 64)]
    assert {row.case.op for row in decode.only(["argmax"], Bounds()).rows} == {"argmax"}
    with pytest.raises(UsageError, match="unknown op 'matmul'"):
        decode.only(["matmul"], Bounds())


def test_every_op_has_calls_that_can_be_built():
    small = Bounds(memory=2**20, seconds=0.02)
    for op in contracts():
        [first, *_] = of_model("demo", Config.read(DEMO), [], "float32", small).only([op], small).rows
        assert build(first.case).contract.name == op


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def traced(tmp_path, command_line):
    code, out, _ = command_line("trace", "--context", 300, "--json")
    assert code == 0
    file = tmp_path / "step.json"
    file.write_text(out)
    return file


def test_a_traced_step_is_a_workload(traced):
    found = workload(str(traced), ["decode"], "", Bounds())
    listed = json.loads(traced.read_text())
    assert found.name == "step" and found.dtype == "float32"
    assert sum(row.calls for row in found.rows) == pytest.approx(sum(c["count"] for c in listed))
    assert {row.case.op for row in found.rows} == {c["op"] for c in listed}
    assert next(row.case.batch for row in found.rows if row.case.op == "indexer_topk") == "1/300"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not JSON", "cannot be read as JSON"),
        ("{}", "lists no call"),
        ("[]", "lists no call"),
        ("[1]", "is of another schema"),
        ('[{"op": "matmul", "count": 1}]', "is of another schema"),
        ('{"benchmarks": []}', "is of another schema"),
        ('[{"op": "add", "count": 1, "attributes": {}, "operands": {"a": {"dtype": "", "shape": [1]}}}]', "another schema"),
        ('[{"op": "add", "count": 1, "attributes": {}, "operands": {}}]', "is of another schema"),
    ],
)
def test_another_file_is_refused_in_one_sentence(tmp_path, command_line, text, said):
    file = tmp_path / "file.json"
    file.write_text(text)
    code, out, err = command_line("bench", "--workload", file)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--workload", "glm6"], "unknown workload 'glm6'"),
        (["--step", "train"], "unknown step 'train'"),
        (["--op", "matmul"], "unknown op 'matmul'"),
        (["--threads", 4096], "--threads is 4096"),
        (["--memory", 0], "--memory is 0"),
        (["--curve", "--op", "topk"], "--curve has calls of its own"),
        (["--workload", "demo", "--op", "add", "--backend", "reference,reference"], "backend reference is given twice"),
        (["--workload", "demo", "--op", "add", "--backend", "nothing"], "unknown backend 'nothing'"),
    ],
)
def test_wrong_usage_is_one_sentence(command_line, options, said):
    code, out, err = command_line("bench", *options)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


def test_a_report_that_could_not_be_written_is_refused_before_anything_is_timed(command_line, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    code, out, err = command_line("bench", "--workload", "demo", "--json", tmp_path / "report.json")
    assert code == 2 and out == "" and "pip install 'porthal[bench]'" in err


# -- the curve -----------------------------------------------------------------------------------------------------------


def test_the_curve_has_three_calls_at_each_context():
    found = curve("bfloat16", Bounds())
    assert [row.step for row in found.rows] == ["indexer", "sparse", "dense"] * 8
    last = {row.step: dict(row.case.dims).get("k") for row in found.rows[-3:]}
    assert last == {"indexer": None, "sparse": 2048, "dense": 131072}


def test_sparse_attention_has_97_percent_fewer_pairs_at_128k():
    assert pairs(3, 8) == 6 and pairs(4, 2) == 1 + 2 + 2 + 2
    assert 1 - pairs(131072, 2048) / pairs(131072, 131072) == pytest.approx(0.97, abs=0.002)


def test_where_curves_cross():
    assert crossing([1, 2, 4], [4.0, 2.0, 1.0], [1.0, 2.0, 4.0]) == pytest.approx(2.0)
    assert crossing([1, 4], [4.0, 1.0], [1.0, 4.0]) == pytest.approx(2.0)
    assert crossing([1, 2], [1.0, 1.0], [2.0, 2.0]) == 1
    assert crossing([1, 2], [2.0, 2.0], [1.0, 1.0]) is None


def test_recorded_calls_are_of_the_step_alone():
    assert recorded(lambda ops: None) == []
    assert stepped(GLM5.shallow(), [(1, 64)], "float32")[0][0] == "embedding"
