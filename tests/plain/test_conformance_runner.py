"""The engine: what it counts, reports and repeats, and that nothing tested is no success."""

import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime
from html import escape as html_escape
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import Report, replay, run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution import distant
from porthal.conformance.execution.bindings import Bindings, parts
from porthal.conformance.execution.call import ABREAST
from porthal.conformance.execution.placing import MARGIN, poison, poisoned
from porthal.conformance.level import SUITE
from porthal.conformance.report.facts import Facts
from porthal.conformance.report.report import SCHEMA
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.conformance.verdicts import Judgement
from porthal.hal import Backend, Need, UsageError, Weight, at_least, contracts, create, limits, one_of
from tests import inner


def backend(base=Reference, **members):
    return type("Made", (base,), {"name": "made", **members})()


def truth(op):
    """The reference's kernel as a method."""
    return lambda self, *args, **attrs: create("reference").derive(contracts()[op])(*args, **attrs)


def test_the_reference_passes_what_it_defines():
    report = run("reference", ["rms_norm", "topk", "kv_write", "moe_route", "argmax", "page_copy", "sample"])
    assert report.failures == []
    assert report.exit_code == 0 and report.ok
    assert {r.status for r in report.results} == {"own", "refusal"}
    assert all((r.status == "refusal") is ("fault=" in r.token) for r in report.results)


def test_a_kernel_that_always_raises_passes_nothing():
    """What refuses a wrong call is the check before the kernel."""

    def add(self, a, b):
        raise RuntimeError("no such core")

    report = run(backend(add=add), ["add"])
    assert {r.status for r in report.results if r.verdict == "PASS"} == {"refusal"}
    assert not any(r.own for r in report.results if r.verdict == "PASS")
    assert report.summary.endswith(f"cases passed ({len(report.results) - len(report.failures)} refusals); "
                                   f"{len(report.failures)} FAIL_ERROR")
    line = add.__code__.co_firstlineno + 1
    assert {r.message for r in report.failures} >= {
        f"RuntimeError: no such core; raised in the kernel add at {__file__}:{line}"
    }
    assert f"{__file__}:{line}" in report.html() and f"{__file__}:{line}" in report.junit()


def test_an_error_of_the_suite_is_told_from_one_of_the_kernel(monkeypatch):
    monkeypatch.setattr("porthal.conformance.execution.call.disturbed", None)
    (result, *_) = run(backend(add=truth("add")), ["add"]).results
    assert result.verdict == "NOT_JUDGED"
    assert re.fullmatch(r"TypeError: .* not callable; raised in the suite at .*/execution/call\.py:\d+", result.message)
    monkeypatch.undo()
    case = Case.from_token("add,T=2,H=96,a:fp32,0")
    wrong = lambda self, a, b: [1]  # noqa: E731
    said = check(case, Bindings(backend(add=wrong))).message
    assert said == (
        "UsageError: add returned list for y, expected a NumPy array; "
        f"the kernel is at {__file__}:{wrong.__code__.co_firstlineno}"
    )


def test_the_line_of_a_kernel_is_its_own_and_not_that_of_what_it_calls():
    def helper(scores):
        return np.argpartition(scores, 10**6)

    def topk(self, scores, batch, *, k):
        return helper(scores)

    messages = [r.message for r in run(backend(topk=topk), ["topk"]).failures if "kth" in r.message]
    place = f"raised in the kernel topk at {__file__}:{helper.__code__.co_firstlineno + 1}"
    assert messages and all(message.endswith(place) for message in messages)


def test_nothing_tested_is_no_success():
    assert Report.of(create("reference"), "bring-up", []).exit_code == 2
    nothing = run(backend(Backend), ["rms_norm"])
    assert {r.verdict for r in nothing.results} == {"UNCLAIMED"}
    assert nothing.exit_code == 2 and nothing.summary.startswith("nothing of made was tested yet: 0 of ")
    inherited = run(backend(), ["rms_norm"])
    assert inherited.exit_code == 2 and not inherited.failures
    assert {r.status for r in inherited.results} == {"inherited", "refusal"}
    assert "cases passed (" in inherited.summary and inherited.summary.startswith("nothing of made was tested yet: ")


def test_a_failure_counts_more_than_nothing_tested():
    results = [Result.of(Case("add"), Judgement("NOT_JUDGED", "no reference"), None, 0.0)]
    assert Report.of(create("reference"), "bring-up", results).exit_code == 1


def test_own_kernels_serve_what_they_claim_and_the_rest_is_inherited():
    kernel = limits(dtypes={"x": one_of("bfloat16")}, H=96)(truth("rms_norm"))
    report = run(backend(rms_norm=kernel), ["rms_norm"])
    own = [r for r in report.results if r.status == "own"]
    inherited = [r for r in report.results if r.status == "inherited"]
    refused = [r for r in report.results if r.status == "refusal"]
    assert report.ok and own and inherited and len(own) + len(inherited) + len(refused) == len(report.results)
    assert all("x:bf16" in r.token and "H=96" in r.token for r in own)
    assert all("fault=" in r.token for r in refused)
    assert {r.owner for r in inherited} == {"reference"}
    assert f"{len(own)} own, {len(inherited)} inherited" in report.summary


def test_unclaimed_calls_are_no_failures():
    kernel = limits(dtypes={"x": one_of("bfloat16")})(truth("rms_norm"))
    report = run(backend(Backend, rms_norm=kernel), ["rms_norm"], dtypes=["bfloat16", "float16"])
    assert report.ok
    assert {r.verdict for r in report.results if "x:fp16" in r.token} == {"UNCLAIMED"}
    assert {r.verdict for r in report.results if "x:bf16" in r.token} == {"PASS"}


def test_own_kernels_that_no_case_ran_are_named():
    """A limit that nothing meets, a provider of two that takes no call, data that no case has; not what was not asked for."""
    few = type("Few", (), {"topk": limits(provider="few.topk", k=at_least(10**7))(truth("topk"))})
    many = type("Many", (), {"topk": limits(provider="many.topk")(truth("topk"))})
    picky = limits(needs={"a": Need("no number at all", lambda a: False)})(truth("add"))
    members = {"name": "made", "rms_norm": limits(H=97)(truth("rms_norm")), "add": picky, "argmax": truth("argmax")}
    made = type("Made", (few, many, Reference), {**members, "take_rows": limits(H=97)(truth("take_rows"))})()
    bindings, asked = Bindings(made), ("argmax", "rms_norm", "topk", "add")
    smallest = [min((c for c in cases(contracts()[op]) if not c.fault and not c.view), key=elements) for op in asked]
    report = Report.of(made, "bring-up", [check(case, bindings) for case in smallest])
    assert report.exit_code == 0 and report.untried == ("rms_norm", "topk (few.topk)", "add")
    line = "3 own kernels that no case ran: rms_norm, topk (few.topk), add"
    assert line in map(str, report.table().renderables) and f"{line}. " in report.html()
    assert json.loads(report.json())["untried"] == ["rms_norm", "topk (few.topk)", "add"]
    assert Report.from_json(report.json()) == report
    one = run(made, ["rms_norm"], dtypes=["float16"])
    assert "1 own kernel that no case ran: rms_norm" in map(str, one.table().renderables) and one.exit_code == 2


def test_a_kernel_that_ended_its_process_ran():
    """Where nobody knows whose kernel it was, none is said to have had no case."""
    ended = Result.of(Case("add"), Judgement("CRASH", "gone"), None, 0.0)
    facts = Facts.of(backend(add=truth("add")))
    assert facts.kernels == {"add": ("",)}
    assert Report.of(facts, "bring-up", [ended]).untried == ()
    left = Result.of(Case("add"), Judgement("LEFT_OUT", "dense"), None, 0.0)
    assert Report.of(facts, "bring-up", [replace(left, status="own")]).untried == ("add",)


def test_composites_claim_their_parts_call_by_call():
    """A part's own kernel that refuses the call is passed over, as it would be in a model."""
    made = backend(linear=limits(N=1)(lambda *a, **k: pytest.fail("called outside its limits")))
    case = next(c for c in cases(contracts()["mla_output"]) if not c.fault)
    assert check(case, Bindings(made)).verdict == "PASS"
    found = parts(build(case))
    assert sorted(found) == ["head_linear", "linear", "mla_output"]
    assert found["linear"][0].dims["N"] == dict(case.dims)["H"]


def test_a_part_has_to_take_every_shape_of_a_composite():
    inputs = build(Case.from_token("moe_layer,T=7,H=128,I=96,S=96,E=8,k=8,x:fp32,0"))
    assert [spec.dims["N"] for spec in parts(inputs)["linear"]] == [192, 128]
    for taken, foreign in (((192, 128), False), ((192,), True), ((128,), True)):
        made = backend(linear=limits(N=one_of(*taken))(truth("linear")))
        assert ("linear" in Bindings(made).bound(inputs).foreign) is foreign


@pytest.mark.parametrize(
    "token",
    [
        "mla_prolog,T=2,H=96,Q=32,N=1,D=32,C=64,R=8,theta=10000.0,eps=1e-05,h:fp32,batch=decode,block_size=4,view=beyond,0",
        "index_prolog,T=2,Q=32,H=96,G=1,D=32,theta=10000.0,width=8,qr:fp32,batch=decode,block_size=4,view=beyond,0",
        "grouped_gemm,M=16,K=40,N=24,E=3,x:fp32,view=beyond,0",
    ],
)
def test_far_caches_and_experts_give_what_near_ones_do(token, monkeypatch):
    """Only what has pages or experts lies far: other weights keep their shape."""
    monkeypatch.setattr(distant, "ELEMENTS", 2**14)
    case, shapes = Case.from_token(token), []

    def kernel(self, *operands, **attrs):
        shapes.append([o.spec.shape for o in operands if isinstance(o, Weight)])
        return truth(case.op)(self, *operands, **attrs)

    assert check(case, Bindings(backend(place="hardware", **{case.op: kernel}))).verdict == "PASS"
    near = [o.spec.shape for o in build(case).operands.values() if isinstance(o, Weight)]
    if case.op == "grouped_gemm":
        assert all((far[0] - 3) * prod(far[1:]) >= 2**14 for (far,) in shapes)
    else:
        assert all(far == near for far in shapes)


def test_progress_sees_every_case():
    seen = []
    report = run("reference", ["add"], progress=lambda done, of, result, left: seen.append((done, of, result, left)))
    assert {r.token for _, _, r, _ in seen} == {r.token for r in report.results}
    assert [d for d, *_ in seen] == list(range(1, len(seen) + 1)) and {of for _, of, *_ in seen} == {len(seen)}
    assert all(left > 0 for *_, left in seen[:-1]) and abs(seen[-1][3]) < 1e-6


def test_unknown_op_is_refused():
    with pytest.raises(UsageError, match="unknown op 'softmax'"):
        run("reference", ["softmax"])


def test_faults_must_be_answered_with_usage_errors():
    def answers(machine, op):
        return [check(case, Bindings(machine)) for case in cases(contracts()[op]) if case.fault]

    faults = answers(create("reference"), "embedding")
    assert {r.verdict for r in faults} == {"PASS"} and len(faults) == 4
    assert any("expected 0 to" in r.note for r in faults)

    def refuses_array(self, x):
        raise TypeError("no array of mine")

    faults = answers(backend(refuses_array=refuses_array), "take_rows")
    assert {r.verdict for r in faults} == {"FAIL_ERROR"}
    assert any(r.message.endswith("raised TypeError: no array of mine, expected a UsageError") for r in faults)


def test_a_batch_must_keep_its_bits():
    def topk(self, scores, batch, *, k):
        selection = truth("topk")(self, scores, batch, k=k)
        batch.kv_len[:1] += 1
        return selection

    case = Case.from_token("topk,T=5,k=7,batch=decode,block_size=64,0")
    assert check(case, Bindings(backend(topk=topk))).verdict == "FAIL_MUTATED"


def test_a_composition_has_the_tie_order_of_its_parts():
    def topk(self, scores, batch, *, k):
        selection = truth("topk")(self, scores, batch, k=k)
        for t, n in enumerate(selection.native.length):
            seen = scores[t, : batch.visible[t]]
            selection.native.indices[t, :n] = len(seen) - 1 - np.argsort(-seen[::-1], kind="stable")[:n]
        return selection

    plan = sorted(cases(contracts()["indexer_topk"]), key=elements)
    turned = next(case for case in plan if check(case, Bindings(backend(topk=topk))).failed)
    topk.tie = "any"
    report = run(backend(topk=topk), ["indexer_topk"])
    assert not report.failures and "own order of ties" in next(r.note for r in report.results if r.token == turned.token)


def test_poison_surrounds_what_a_backend_allocates():
    machine = create("reference")
    with poisoned(machine) as blocks:
        out = machine.empty((2, 3), "float32")
        ids = machine.empty((2,), "int32")
        assert np.isnan(out).all() and (ids == poison("int32")).all()
        out[...] = 0
        assert blocks[0].trespass(machine) == ""
        out.base[MARGIN + 6] = 0
        assert blocks[0].trespass(machine) == f"memory beside an output changed at [{MARGIN + 6}]"
    assert "empty" not in vars(machine)


def test_a_result_that_is_a_view_of_an_input_is_refused():
    def cast(self, x, *, to):
        return x[:] if x.dtype == to else truth("cast")(self, x, to=to)

    failures = run(backend(cast=cast), ["cast"]).failures
    assert failures and {r.verdict for r in failures} == {"FAIL_WROTE_OUTSIDE"}
    plain = [r.message for r in failures if "seq=" not in r.token]
    assert plain and all(message.startswith("a result shares memory with an input: y[0, 0] is ") for message in plain)


def test_memory_that_a_result_gives_back_early_is_overwritten():
    class Pooled(Reference):
        name, freed = "pooled", None

        def empty(self, shape, dtype):
            given, self.freed = self.freed, None
            return given if given is not None and given.shape == shape else super().empty(shape, dtype)

        def add(self, a, b):
            self.freed = a + b
            return self.freed

    verdicts = {r.verdict for r in run(Pooled(), ["add"]).failures}
    assert verdicts == {"FAIL_VALUE"}


@pytest.mark.parametrize("own", [False, True])
def test_threads_have_no_state_in_common(own):
    """One workspace for all serves a single thread; threads at a time need one each. What differs from the main thread's
    result is always written after what equals it, and both before either is read."""
    places, together = threading.local() if own else SimpleNamespace(), threading.Barrier(ABREAST, timeout=30)

    def add(self, a, b):
        y = a + b
        if threading.current_thread() is threading.main_thread():
            add.alone = y.tobytes()
            return y
        first = y.tobytes() == add.alone
        if not first:
            together.wait()
        places.sum = y
        if first:
            together.wait()
        together.wait()
        return places.sum

    found = run(backend(add=add), ["add"])
    assert {r.token for r in found.failures} == (set() if own else {r.token for r in found.results if "threads" in r.token})
    assert {r.verdict for r in found.failures} <= {"FAIL_NONDETERMINISTIC"}


def test_a_kernel_that_returns_nothing_is_told_so():
    found = run(backend(add=lambda self, a, b: None), ["add"]).failures
    assert {(r.verdict, r.message.partition("; ")[0]) for r in found} == {
        ("FAIL_ERROR", "UsageError: add returned NoneType for y, expected a NumPy array")
    }


@pytest.mark.parametrize(
    ("op", "kernel", "said"),
    [
        ("add", lambda self, a, b: (a + b).tolist(), "add returned list for y, expected a NumPy array"),
        ("topk", lambda self, scores, batch, *, k: scores, "topk returned ndarray for sel, expected a Selection"),
        ("argmax", lambda self, logits: (logits, logits), "argmax returned 2 results, expected 1"),
    ],
)
def test_a_result_of_another_type_names_op_and_type(op, kernel, said):
    found = run(backend(**{op: kernel}), [op]).failures
    assert found and {(r.verdict, r.message.partition("; ")[0]) for r in found} == {("FAIL_ERROR", f"UsageError: {said}")}


def test_rows_lost_among_others_are_a_wrong_shape():
    def add(self, a, b):
        y = truth("add")(self, a, b)
        return y[:-2] if len(y) == 8 else y

    found = [r for r in run(backend(add=add), ["add"]).failures if r.verdict != "FAIL_ERROR"]
    assert found and {r.verdict for r in found} == {"FAIL_SHAPE"}
    assert found[0].message.startswith("among other rows, one of them poisoned: y has shape [6, ")


def test_replay_repeats_a_case_and_explains_it():
    def slightly_off(self, a, b):
        return truth("add")(self, a, b) * np.float32(1.01)

    made = backend(add=slightly_off)
    worst = run(made, ["add"], dtypes=["float32"]).failures[0]
    again = replay(worst.token, made)
    assert (again.verdict, again.message, again.worst) == (worst.verdict, worst.message, worst.worst)
    text = again.explain()
    assert text.startswith("FAIL_VALUE: add by made's own kernel") and "times its error budget" in text


# -- report ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failed():
    def wrong(self, a, b):
        return a - b

    return run(backend(add=wrong), ["add", "take_rows"])


def test_json_returns_the_report(failed):
    data = json.loads(failed.json())
    assert (data["schema"], data["suite"], data["backend"], data["place"]) == (SCHEMA, SUITE, "made", "hardware")
    assert data["contracts"] == {"add": 1, "take_rows": 1} and data["exit_code"] == 1
    assert {"porthal", "python", "numpy"} <= set(data["environment"])
    assert Report.from_json(failed.json()) == failed


def test_table_names_each_failure_and_its_command(failed):
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(failed.table())
    text = console.export_text()
    shown = re.findall(r"porthal replay '(add,.*)' --backend made", text)
    counted = [int(n) for n in re.findall(r" in (\d+) cases? of add: ", text)]
    causes = [[r.token for r in cause] for cause in failed.causes]
    assert shown == [tokens[0] for tokens in causes]
    assert counted == [len(tokens) for tokens in causes] and max(counted) > 3 and sum(counted) == len(failed.failures)
    sizes = [[elements(Case.from_token(token)) for token in tokens] for tokens in causes]
    assert all(each == sorted(each) for each in sizes)
    assert "own" in text and "hardware" in text


def test_page_stands_alone(failed):
    page = failed.html()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", page)
    assert "prefers-color-scheme" in page and 'name="viewport"' in page
    causes = [len(cause) for cause in failed.causes]
    assert page.count("<details>") == len(causes) > 0
    assert all(html_escape(failed.replay(r)).replace("&#x27;", "&#39;") in page for r in failed.failures)
    assert "porthal replay &#39;add,T=" in page
    assert "failed of" in page and "passed" in page


def test_a_composites_failure_names_the_part_that_failed():
    def linear(self, x, w, *, out="x"):
        return -truth("linear")(self, x, w, out=out)

    report = run(backend(linear=linear), ["mla_output", "linear"])
    assert report.parts_at_fault("mla_output") == ["linear"] and report.parts_at_fault("linear") == []
    lines = [str(part) for part in report.table().renderables]
    assert "  mla_output is composed of linear, which failed as well: begin there" in lines
    assert "mla_output is composed of linear, which failed as well: begin there" in report.html()


def test_a_report_says_when_with_what_and_of_which_sources(failed):
    date = datetime.fromisoformat(failed.date)
    assert date.tzinfo and abs(time.time() - date.timestamp()) < 3600
    assert failed.command and failed.device == create("reference").describe() != ""
    assert set(failed.sources) == {"porthal"} and re.fullmatch("[0-9a-f]{12}", failed.sources["porthal"])
    assert set(Facts.of(create("reference")).sources) == {"porthal", "reference"}
    assert failed.date in failed.circumstances and failed.sources["porthal"] in failed.circumstances


def test_a_device_is_described_by_its_backend_in_one_line():
    def broken(self):
        raise OSError("no driver")

    assert Facts.of(backend(describe=lambda self: "chip 7,\n driver 1.2")).device == "chip 7, driver 1.2"
    assert Facts.of(backend(describe=broken)).device == "no description of the device: OSError: no driver"


# -- pytest ----------------------------------------------------------------------------------------------------------


def pytest_run(tmp_path, *options):
    """pytest in a process of its own; its last line says whether the runner was imported."""
    (tmp_path / "test_mine.py").write_text("def test_mine(): pass\n")
    code = "import sys, pytest; pytest.main(sys.argv[1:]); print('porthal.conformance.runner.workers' in sys.modules)"
    command = [sys.executable, "-c", code, *inner.options(*options)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout


def test_plugin_makes_one_test_per_case(tmp_path):
    out = pytest_run(tmp_path, "--porthal-backend=reference", "-k", "take_rows")
    expected = len(cases(contracts()["take_rows"]))
    assert f"{expected} passed" in out and out.strip().endswith("True"), out


def test_plugin_costs_nothing_without_its_option(tmp_path):
    out = pytest_run(tmp_path)
    assert "1 passed" in out and out.strip().endswith("False"), out
