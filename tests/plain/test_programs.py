"""Sequences of calls: what a kernel keeps that it should read again shows in a later step, which the verdict names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.plan import HELD, cases
from porthal.conformance.cases.programs import PROGRAMS, programs
from porthal.conformance.cases.steps import first, grown, other, rearranged, regrown, scenario, shorter
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.sequence import steps
from porthal.conformance.judgement.saved import read, save
from porthal.conformance.level import LEVELS
from porthal.conformance.report.results import Result
from porthal.conformance.runner.check import check
from porthal.hal import Batch, Rows, Selection, Weight, contracts, create, limits

LINEAR = "linear,T=3,K=24,N=8,x:fp32,seq=update,0"
MLA = "sparse_mla,T=3,N=1,C=32,R=8,k=16,scale=0.25,q_latent:fp32,batch={},block_size=16,seq={},0"
TOPK = "topk,T=7,k=7,batch=mixed,block_size=64,seq={},0"
ROPE = "rope,T=3,N=2,D=64,theta=10000.0,layout=half,start=0,width=64,x:fp32,batch=mixed,block_size=16,seq=plans,0"
REUSE = "sparse_mla,T=7,N=2,C=32,R=8,k=16,scale=0.25,q_latent:fp32,batch=drafts,block_size=16,seq=reuse,0"


def backend(**members: Any) -> Any:
    return type("Made", (Reference,), {"name": "made", **members})()


def truth(op: str, *operands: Any, **attrs: Any) -> Any:
    return create("reference").derive(contracts()[op])(*operands, **attrs)


def told(token: str, **members: Any) -> tuple[str, str]:
    """The verdict on a program, and its message."""
    result = check(Case.from_token(token), Bindings(backend(**members)))
    return result.verdict, result.message


# -- what there is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(contracts()))
def test_every_program_of_an_op_is_planned_at_every_level_and_passes(op: str) -> None:
    bench = Bindings(create("reference"))
    for level in LEVELS:
        planned = [case for case in cases(contracts()[op], level) if case.seq]
        assert {case.seq for case in planned} >= set(programs(contracts()[op])) - {"held"}
        assert [Case.from_token(case.token) for case in planned] == planned
    for case in (case for case in cases(contracts()[op]) if case.seq):
        result = check(case, bench)
        assert (result.verdict, result.status) == ("PASS", "own"), (case.token, result.message)


def test_results_of_three_sizes_are_held() -> None:
    for op in ("rms_norm", "linear", "sparse_mla", "topk", "moe_permute"):
        held = [case for case in cases(contracts()[op], "standard") if case.seq == "held"]
        shapes = {contracts()[op].results(first(case).spec)[0][1] for case in held}
        sizes = sorted({2 * int(np.prod(shape)) for shape in shapes})
        assert len(sizes) == len(HELD) and all(least < size < 2.2 * least for size, least in zip(sizes, HELD)), op


def test_programs_fit_their_ops() -> None:
    known = {op: set(programs(contract)) for op, contract in contracts().items()}
    assert known["add"] == {"update", "held"} and known["page_copy"] == {"update"}
    assert known["sparse_mla"] == set(PROGRAMS) - {"models"}
    assert known["mla_prolog"] == {"update", "plans", "drafts", "held", "models"}
    assert {op for op, found in known.items() if "reuse" in found} == {"indexer_topk", "select_rows", "sparse_mla"}


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("add,T=2,H=7,seq=dance,0",
         "'dance' is not a program, expected one of update, plans, rewrite, drafts, held, models, reuse"),
        ("add,T=2,H=7,seq=reuse,0", "it has no program 'reuse', expected one of update, held"),
        ("add,T=2,H=7,view=rows,seq=update,0", "a program takes its operands as they are, without rows"),
        ("add,T=2,H=7,seq=update,fault=shape,0", "a program takes its operands as they are, without shape"),
        ("add,T=2,H=7,seq=,0", "seq= names no program"),
    ],
)  # fmt: skip
def test_an_unknown_program_is_one_sentence(token: str, said: str) -> None:
    with pytest.raises(Exception, match=f"^case token '{token}' does not describe a call of add: {said}$"):
        Case.from_token(token)


# -- what a step is called with ----------------------------------------------------------------------------------------


def test_batches_of_a_program() -> None:
    batch = Batch.build([1, 1, 1, 9], [5, 0, 33, 40], [[4, 6], [2], [0, 1, 3], [7, 8, 9, 5]], 16)
    turned = rearranged(batch)
    assert (turned.R, turned.T, turned.max_kv) == (batch.R, batch.T, batch.max_kv)
    assert turned.kv_len.tolist() == [33, 0, 5, 40] and turned.block_table.max() == batch.block_table.max()
    assert sorted(turned.block_table[turned.block_table >= 0]) == list(range(10)) and turned.block_table[0, 0] != 0
    short = shorter(batch)
    assert short.kv_len.tolist() == [1, 0, 16, 23] and np.array_equal(short.block_table, batch.block_table)
    after = grown(batch)
    assert (after.kv_len.tolist(), after.q_len.tolist()) == ([6, 0, 34, 41], [1, 1, 1, 1])


def test_steps_have_values_of_their_own_and_the_first_is_the_plain_call() -> None:
    case = Case.from_token(LINEAR)
    plain = first(Case.from_token(LINEAR.replace(",seq=update", "")))
    assert np.array_equal(first(case).operands["x"], plain.operands["x"])
    two = other(case, 1)
    assert two.spec.key() == plain.spec.key()
    assert (two.operands["x"] != plain.operands["x"]).any() and (two.operands["w"].native != plain.operands["w"].native).any()


def test_a_cache_is_written_anew_behind_what_was_kept() -> None:
    case = Case.from_token(MLA.format("prefill", "drafts"))
    one = first(case)
    assert one.batch
    two = other(case, 1, one.batch)
    short = shorter(one.batch)
    kept = regrown(one.operands["kv"], two.operands["kv"], short)
    seen = short.slots_of(0)
    assert np.array_equal(kept.native["c"][seen], one.operands["kv"].native["c"][seen])
    beyond = np.setdiff1d(one.batch.slots_of(0), seen)
    assert np.array_equal(kept.native["c"][beyond], two.operands["kv"].native["c"][beyond])


def test_a_program_carries_its_cache_forward() -> None:
    """The second write sees what the first has written, on the device and for the judge."""
    token = "kv_write,T=3,A=128,B=64,pages:fp32,batch=mixed,block_size=16,seq=drafts,0"
    one, two, _ = steps(Bindings(create("reference")), Case.from_token(token))
    written = one.inputs.batch.slots[one.inputs.batch.slots >= 0]  # type: ignore[union-attr]
    given, found = one.inputs.operands, two.inputs.operands["pages"].native["a"]
    assert np.array_equal(found[written], given["first"])
    assert not np.array_equal(given["pages"].native["a"][written], given["first"])


# -- what a kernel keeps -----------------------------------------------------------------------------------------------


def test_weights_packed_by_their_address() -> None:
    packed: dict[int, Any] = {}

    def linear(self: Any, x: Any, w: Any, *, out: str = "x") -> Any:
        held = packed.setdefault(w.native.__array_interface__["data"][0], (w.native.copy(), w.native))[0]
        return truth("linear", x, Weight(w.spec, held), out=out)

    plain = LINEAR.replace(",seq=update", "")
    assert told(plain, linear=linear) == ("PASS", "")
    verdict, message = told(LINEAR, linear=linear)
    assert verdict == "FAIL_VALUE" and message.startswith("step 2 (new values in the same memory): y[")


def test_a_prepare_that_ignores_into() -> None:
    def prepare(self: Any, spec: Any, read: Any, into: Any = None) -> Any:
        return into or Reference.prepare(self, spec, read)

    def linear(self: Any, x: Any, w: Any, *, out: str = "x") -> Any:
        return truth("linear", x, w, out=out)

    verdict, message = told(LINEAR, prepare=prepare, linear=linear)
    assert verdict == "FAIL_VALUE"
    assert message.startswith("step 2: prepare(into=) has not written the new values: w.w[0, 0] should be ")
    assert ", it is " in message


def test_pages_remembered_by_their_object() -> None:
    known: dict[int, Any] = {}

    def sparse_mla(self: Any, q_latent: Any, q_rope: Any, kv: Any, sel: Any, batch: Any, *, scale: float) -> Any:
        found, _ = known.setdefault(id(kv.native["c"]), (copy.deepcopy(kv), kv))
        return truth("sparse_mla", q_latent, q_rope, found, sel, batch, scale=scale)

    verdict, message = told(MLA.format("mixed", "rewrite"), sparse_mla=sparse_mla)
    assert verdict == "FAIL_VALUE" and message.startswith("step 2 (the pages rewritten): o[")


def test_lengths_remembered_by_shape() -> None:
    known: dict[Any, Any] = {}

    def topk(self: Any, scores: Any, batch: Any, *, k: int) -> Any:
        return truth("topk", scores, known.setdefault((batch.T, batch.R, batch.max_kv), batch), k=k)

    verdict, message = told(TOPK.format("plans"), topk=topk)
    assert verdict == "FAIL_VALUE" and message.startswith("step 3 (a second plan): sel row ")


def test_a_memo_in_the_plan_without_its_attributes() -> None:
    def plan(self: Any, batch: Any) -> Any:
        return batch.with_native({})

    def rope(self: Any, x: Any, batch: Any, *, theta: float, **attrs: Any) -> Any:
        return truth("rope", x, batch, theta=batch.native.setdefault("theta", theta), **attrs)

    verdict, message = told(ROPE, plan=plan, rope=rope)
    assert verdict == "FAIL_VALUE" and message.startswith("step 6 (the first plan with theta=1000000.0): y[")
    keyed = lambda self, x, batch, **attrs: truth("rope", x, batch, **{**attrs, **batch.native.setdefault(str(attrs), attrs)})  # noqa: E731
    assert told(ROPE, plan=plan, rope=keyed) == ("PASS", "")


def test_a_length_read_off_the_table() -> None:
    """As if a request were as long as its pages allow: right where it is, within its last page, for the last row."""

    def topk_of(self: Any, iq: Any, w: Any, keys: Any, batch: Any, *, k: int, scale: float) -> Any:
        tables = [[p for p in row if p >= 0] for row in batch.block_table.tolist()]
        last = batch.kv_len - 16 * (-(-batch.kv_len // 16) - 1)  # slots in use of a page
        seen = np.where(batch.kv_len > 0, [16 * (len(t) - 1) for t in tables] + last, 0)
        longer = Batch.build(batch.q_len.tolist(), seen.tolist(), tables, 16)
        with np.errstate(all="ignore"):
            return truth("indexer_topk", iq, w, keys, longer, k=k, scale=scale)

    token = "indexer_topk,T=7,G=2,D=32,k=5,scale=0.25,iq:fp32,batch={},block_size=16{},0"
    assert told(token.format("mixed", ""), indexer_topk=topk_of)[0] == "PASS"
    assert told(token.format("drafts", ""), indexer_topk=topk_of)[0].startswith("FAIL")
    verdict, message = told(token.format("mixed", ",seq=drafts"), indexer_topk=topk_of)
    assert verdict.startswith("FAIL") and message.startswith("step 2 (drafts dropped): ")


def test_a_large_result_in_memory_that_is_used_again() -> None:
    pool: dict[Any, Any] = {}

    def add(self: Any, a: Any, b: Any) -> Any:
        y = truth("add", a, b)
        if y.nbytes < 2**16:
            return y
        held = pool.setdefault((y.shape, y.dtype), np.empty_like(y))
        held[...] = y
        return held

    assert told("add,T=64,H=1024,a:fp32,0", add=add) == ("PASS", "")
    verdict, message = told("add,T=64,H=1024,a:fp32,seq=held,0", add=add)
    assert verdict == "FAIL_WROTE_OUTSIDE"
    said = "step 2 (other values in the same shape): the call changed a result of step 1 that is still held: y["
    assert message.startswith(said)


def test_one_workspace_per_op_for_all_shapes() -> None:
    """A later call of another shape writes over a result that is a part of the workspace."""
    space = np.empty(2**20, np.float32)

    def add(self: Any, a: Any, b: Any) -> Any:
        y = truth("add", a, b)
        if y.dtype != np.float32 or y.size < 2**14:
            return y
        turned = space[: y.size] if len(y) % 2 else space[2**18 :][: y.size]
        turned[...] = y.reshape(-1)
        return turned.reshape(y.shape)

    message = told("add,T=64,H=1024,a:fp32,seq=held,0", add=add)[1]
    assert "that is still held" in message


def test_weights_kept_by_shape_and_state_of_all_instances() -> None:
    token = "linear,T=3,K=24,N=8,x:fp32,seq=models,0"

    def by_shape(self: Any, x: Any, w: Any, *, out: str = "x") -> Any:
        return truth("linear", x, vars(self).setdefault(f"w{w.spec.shape}", w), out=out)

    verdict, message = told(token, linear=by_shape)
    assert verdict == "FAIL_VALUE" and message.startswith("step 2 (others of their shape): y[")
    shared: dict[Any, Any] = {}

    def by_number(self: Any, x: Any, w: Any, *, out: str = "x") -> Any:
        mine = vars(self).setdefault("known", {})
        number = mine.setdefault(id(w), (len(mine), w))[0]  # of an instance, but the table belongs to all
        return truth("linear", x, shared.setdefault(number, w), out=out)

    verdict, message = told(token, linear=by_number)
    assert verdict == "FAIL_VALUE" and message.startswith("step 3 (a second instance of the backend): y[")


@pytest.mark.parametrize("op", ["indexer_topk", "select_rows", "sparse_mla"])
def test_a_selection_is_used_by_later_steps_and_layers(op: str) -> None:
    token = {
        "indexer_topk": "indexer_topk,T=7,G=2,D=32,k=16,scale=0.25,iq:fp32,batch=drafts,block_size=16,seq=reuse,0",
        "select_rows": "select_rows,T=7,k=16,M=4,seq=reuse,0",
        "sparse_mla": REUSE,
    }[op]
    ran = steps(Bindings(create("reference")), Case.from_token(token))
    found = [(step.inputs.contract.name, step.inputs.spec.dims["T"]) for step in ran]
    requests = found[-2][1]
    assert found == [("kv_write", 7), ("indexer_topk", 7), ("sparse_mla", 7), ("select_rows", 7), ("kv_write", requests),
                     ("sparse_mla", requests), ("indexer_topk", requests), ("sparse_mla", 7)]  # fmt: skip
    assert requests < 7
    assert {role: case.op for role, case in scenario(Case.from_token(token)).items()} == {
        "write": "kv_write", "select": "indexer_topk", "attend": "sparse_mla", "pick": "select_rows",
    }  # fmt: skip


def test_a_selection_that_is_the_top_ks_own_memory() -> None:
    held: list[Any] = []

    def indexer_topk(self: Any, iq: Any, w: Any, keys: Any, batch: Any, *, k: int, scale: float) -> Any:
        sel = truth("indexer_topk", iq, w, keys, batch, k=k, scale=scale)
        if not held:
            held.extend(np.full_like(x, -1) for x in sel.native)
        for place, x in zip(held, sel.native):
            place[: len(x)] = x
        return Selection(sel.spec, Rows(*(place[: len(x)] for place, x in zip(held, sel.native))))

    verdict, message = told(REUSE, indexer_topk=indexer_topk)
    assert verdict == "FAIL_WROTE_OUTSIDE"
    assert message.startswith("step 7 (indexer_topk a step later): the call changed a result of step 2 that is still held: sel")


# -- what is reported --------------------------------------------------------------------------------------------------


def test_a_program_is_own_where_every_step_is() -> None:
    """A kernel that does not take the shape of one step leaves that step to the one that it inherits."""
    held = "topk,T=7,k=7,batch=mixed,block_size=64,seq=held,0"
    own = lambda self, scores, batch, *, k: truth("topk", scores, batch, k=k)  # noqa: E731
    assert check(Case.from_token(held), Bindings(backend(topk=own))).status == "own"
    assert check(Case.from_token(held), Bindings(backend(topk=limits(T=7)(own)))).status == "inherited"


def test_a_program_is_replayed_and_its_bad_step_saved(tmp_path: Path) -> None:
    def linear(self: Any, x: Any, w: Any, *, out: str = "x") -> Any:
        y = truth("linear", x, w, out=out)
        return y + (w.native[0, 0] == marked)

    marked = other(Case.from_token(LINEAR), 1).operands["w"].native[0, 0]
    made, came = backend(linear=linear), list[Any]()
    result = replay(LINEAR, made, returned=came.append)
    assert isinstance(result, Result) and result.message.startswith("step 2 (new values in the same memory): y[")
    (got,) = came
    file = save(got.inputs, got, tmp_path, "case", "made")
    again = read(file)
    assert np.array_equal(again.operands["w"].native, other(Case.from_token(LINEAR), 1).operands["w"].native)
    assert replay(again, made).verdict == "FAIL_VALUE"
