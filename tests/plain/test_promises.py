"""What may not change: a choice among equals in any of many runs and in any batch, and bits where a kernel promises that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.call import REPLAYS
from porthal.conformance.execution.invariance import joined, split
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.report.report import Report
from porthal.conformance.runner.check import check
from porthal.hal import Rows, Selection, contracts, create

TIES = "topk,T=7,k=7,scores~ties,batch=mixed,block_size=64,0"
LONGEST = build(Case.from_token(TIES)).operands["batch"].max_kv
LINEAR = "linear,T=7,K=96,N=256,x:fp32,0"


def backend(**kernels: Any) -> Reference:
    return type("Made", (Reference,), {"name": "made", **kernels})()


def truth(op: str) -> Callable[..., Any]:
    return create("reference").derive(contracts()[op])


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("porthal.conformance.execution.call.PATIENCE", 60.0)


@pytest.mark.parametrize(("recipe", "runs"), [("scores~ties,", REPLAYS), ("", 2)])
def test_a_choice_among_equals_is_run_25_times(recipe: str, runs: int) -> None:
    calls = []

    def topk(self: Any, scores: Any, batch: Any, *, k: int) -> Selection:
        calls.append(scores.tobytes())
        sel = truth("topk")(scores, batch, k=k)
        if calls.count(calls[0]) == runs:
            sel.native.indices[:, :2] = sel.native.indices[:, 1::-1]
        return sel

    result = check(Case.from_token(TIES.replace("scores~ties,", recipe)), Bindings(backend(topk=topk)))
    assert (result.verdict, calls.count(calls[0])) == ("FAIL_NONDETERMINISTIC", runs)


def highest_ties(when: Callable[[Any], bool]) -> Any:
    """Of equal scores the highest positions where `when` holds for them, else the lowest."""

    def topk(self: Any, scores: Any, batch: Any, *, k: int) -> Selection:
        sel = truth("topk")(scores, batch, k=k)
        indices = np.full_like(sel.native.indices, -1)
        for t, n in enumerate(batch.visible):
            order = np.lexsort((-np.arange(n) if when(scores) else np.arange(n), -scores[t, :n]))
            indices[t, : min(n, k)] = order[:k]
        return Selection(sel.spec, Rows(indices, sel.native.length))

    topk.tie = "any"  # type: ignore[attr-defined]
    return topk


@pytest.mark.parametrize(
    ("when", "where"),
    [
        (lambda scores: True, ""),
        (lambda scores: len(scores) % 2 == 0, "among other rows"),
        (lambda scores: len(scores) < 2, "in a call of fewer rows"),
        (lambda scores: scores.shape[1] < LONGEST, "in a call of fewer rows"),
    ],
)
def test_an_order_of_ties_of_ones_own_may_not_depend_on_the_batch(when: Any, where: str) -> None:
    result = check(Case.from_token(TIES), Bindings(backend(topk=highest_ties(when))))
    if not where:
        assert (result.verdict, result.tie) == ("PASS", "any")
        return
    assert result.verdict == "FAIL_VALUE"
    assert f" in their place {where}: whatever the order of ties is, it may not depend on the batch" in result.message


@pytest.mark.parametrize("rows", [2, 4, 7, 8])
def test_one_row_alone_has_the_bits_that_it_has_among_others_where_that_is_promised(rows: int) -> None:
    """A kernel that is another one from so many rows on."""

    def linear(self: Any, x: Any, w: Any, **attrs: Any) -> Any:
        y = truth("linear")(x, w, **attrs)
        return y if len(x) < rows else np.nextafter(y, np.float32(0))

    assert check(Case.from_token(LINEAR), Bindings(backend(linear=linear))).verdict == "PASS"
    linear.batch_invariant = True  # type: ignore[attr-defined]
    result = check(Case.from_token(LINEAR), Bindings(backend(linear=linear)))
    where = "among other rows" if rows == 8 else "in a call of fewer rows"
    assert result.verdict == "FAIL_VALUE"
    assert result.message.endswith(f"{where}, though the kernel declares that its results do not change")


@pytest.mark.parametrize(
    "token",
    [
        LINEAR,
        TIES,
        "rope,T=7,N=2,D=64,theta=10000.0,layout=half,start=0,width=64,x:fp32,batch=mixed,block_size=64,0",
        "sparse_mla,T=7,N=2,C=512,R=64,k=16,scale=0.0625,q_latent:fp32,batch=mixed,block_size=64,0",
        "indexer_scores,T=5,G=8,D=128,scale=0.125,iq:fp32,batch=mixed,block_size=1,0",
        "moe_route,T=3,E=9,k=2,scale=1.0,0",
    ],
)
def test_a_call_that_is_split_is_the_same_call(token: str) -> None:
    inputs = build(Case.from_token(token))
    parts = split(inputs)
    assert len(parts) == 2
    found = [Golden(call).results() for call in (inputs, *parts)]
    whole, *apart = ({k: v.parts() if isinstance(v, Selection) else v for k, v in each.items()} for each in found)
    for name, value in joined(parts, apart).items():
        for part in value if isinstance(value, dict) else [...]:
            assert np.allclose(value[part], whole[name][part], rtol=1e-9, atol=1e-12)


def test_a_composition_promises_what_all_its_parts_do_and_the_report_says_who_does() -> None:
    def promising(op: str) -> Any:
        def kernel(self: Any, *args: Any, **attrs: Any) -> Any:
            return truth(op)(*args, **attrs)

        kernel.batch_invariant = True  # type: ignore[attr-defined]
        return kernel

    parts = {op: promising(op) for op in ("head_linear", "linear")}
    tokens = "mla_output,T=3,N=2,C=512,V=64,H=96,o:fp32,0", "add,T=7,H=96,a:fp32,0"
    lines = []
    for made in ({}, {"head_linear": parts["head_linear"]}, parts):
        chip = backend(mla_output=None, **made)
        results = [check(Case.from_token(token), Bindings(chip)) for token in tokens]
        assert [r.verdict for r in results] == ["PASS", "PASS"]
        assert [r.invariant for r in results] == [made == parts, False]
        report = Report.of(chip, "bring-up", results)
        assert Report.from_json(report.json()).results == report.results
        lines += report.unpromised
    nobody = "not promised by any kernel: that the bits of a row do not depend on the other rows"
    assert lines[:2] == [nobody] * 2
    assert lines[2] == "the bits of a row do not depend on the other rows: promised by mla_output, not by 1 other ops"
    assert [row.determinism for row in report.rows] == ["any batch", "run to run"]
    assert ">any batch</td>" in report.html() and ">run to run</td>" in report.html()
