"""Arrays of any library: a right kernel is never accused for what its arrays are like."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import LAYOUTS, elements
from porthal.conformance.cases.plan import cases, large
from porthal.conformance.diff.model import lockstep
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.traits import left_out, unasked, verify
from porthal.conformance.report.report import Report
from porthal.conformance.report.results import Result
from porthal.conformance.report.waivers import Waiver
from porthal.conformance.runner.check import check
from porthal.conformance.runner.runs import replay, run
from porthal.conformance.runner.workers import Bounds
from porthal.hal import (
    Backend,
    Pages,
    Rows,
    Selection,
    SelectionSpec,
    Traits,
    UsageError,
    Weight,
    WeightSpec,
    bind,
    contracts,
    create,
    limits,
)
from porthal.hal.numerics import FLUSHED


class Value:
    """An array without assignment, whose slices are copies; it is no NumPy array."""

    __array_ufunc__ = None  # NumPy does not compute with it

    def __init__(self, x: Any) -> None:
        self._x = np.array(x, order="C")
        self._x.flags.writeable = False
        self.shape, self.dtype = self._x.shape, self._x.dtype

    def __getitem__(self, key: Any) -> Value:
        return Value(self._x[key])

    def reshape(self, *shape: int) -> Value:
        return Value(self._x.reshape(*shape))


class Functional(Reference):
    """A chip with such arrays: four ops of its own, all others inherited from NumPy."""

    name = "functional"
    traits = Traits(mutable=False, views_alias=False, strides=False)

    def from_numpy(self, x: Any) -> Any:
        return Value(x)

    def to_numpy(self, x: Any) -> Any:
        assert isinstance(x, Value)
        return x._x.copy()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return Value(np.empty(shape, dtype))

    def refuses_array(self, x: Any) -> str | None:
        return None if isinstance(x, Value) else f"{type(x).__name__}, expected a Value"

    def rms_norm(self, x: Any, weight: Any, *, eps: float) -> Any:
        wide = x._x.astype(np.float64)
        y = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight._x.astype(np.float64)
        return Value(y.astype(np.float32).astype(x.dtype))

    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        y = x._x.astype(np.float32) @ w.native._x.astype(np.float32).T
        return Value(y.astype(x.dtype if out == "x" else out))

    def topk(self, scores: Any, batch: Any, *, k: int) -> Selection:
        indices = np.full((batch.T, k), -1, np.int32)
        for t, n in enumerate(batch.visible):
            row = np.where(np.isnan(scores._x[t, :n]), -np.inf, scores._x[t, :n])
            found = np.argsort(-row, kind="stable")[:k]
            indices[t, : len(found)] = found
        length = np.minimum(batch.visible, k).astype(np.int32)
        return Selection(SelectionSpec(batch.T, k), Rows(Value(indices), Value(length)))

    def kv_write(self, pages: Pages, batch: Any, first: Any, second: Any = None) -> Pages:
        rows = batch.slots >= 0
        for (name, _), values in zip(pages.spec.fields, (first, second)):
            field = pages[name]._x.copy()
            field[batch.slots[rows]] = values._x[rows]
            pages.native[name] = Value(field)
        return pages


OWN = ("rms_norm", "linear", "topk", "kv_write")


def small(backend: Backend, op: str) -> list[Result]:
    """The results of an op's bring-up cases, without the large ones."""
    bindings = Bindings(backend)
    return [check(case, bindings) for case in cases(contracts()[op]) if elements(case) < 2**19]


@pytest.mark.parametrize("op", [*OWN, "silu_mul", "indexer_topk", "sparse_mla"])
def test_immutable_arrays_of_another_library_pass(op: str) -> None:
    results = small(Functional(), op)
    assert [r.explain() for r in results if r.failed] == []
    assert {r.verdict for r in results} <= {"PASS", "LEFT_OUT"} and len(results) > 10
    asked = [r for r in results if r.tested and r.status != "refusal"]
    foreign = "composed" if op == "indexer_topk" else "inherited"
    assert {r.status for r in asked if "%" not in r.token} == {"own" if op in OWN else foreign}
    quantised = {r.status for r in asked if "%" in r.token}  # no kernel of the chip takes a scheme
    assert quantised == ({foreign} if contracts()[op].schemes else set())


def test_what_is_left_out_is_counted_and_says_why() -> None:
    left = [r for r in small(Functional(), "rms_norm") if r.verdict == "LEFT_OUT"]
    assert {r.token.split("view=")[1].split(",")[0] for r in left} == {"columns", "far", "rows", "transposed"}
    assert all(r.message == f"view={r.token.split('view=')[1].split(',')[0]} is a dense copy on functional, whose arrays "
               "have no strides" for r in left)
    assert not any(r.tested or r.failed for r in left)


def test_what_a_case_is_not_asked_is_said() -> None:
    captures = "whether calls can be captured as a graph and replayed, because the backend captures none"
    assert unasked(Reference()) == (captures,)
    assert len(unasked(Functional())) == 3 and unasked(Functional())[-1] == captures


def test_a_replay_gives_the_verdict_of_the_run() -> None:
    backend = Functional()
    for result in small(backend, "kv_write"):
        assert replay(result.token, backend).verdict == result.verdict, result.token


def test_a_model_runs_on_them(tmp_path: Any) -> None:
    from porthal.model.load import load

    ids = list(b"def get(self")
    binding = bind(backend=Functional(), fallback="error")
    assert binding.choices["silu_mul"].status == "inherited"
    assert load(binding=binding).generate(ids, 5) == load(binding=bind("reference")).generate(ids, 5)


def test_the_model_in_lockstep_finds_nothing_and_repairs_what_a_wrong_kernel_wrote() -> None:
    right = lockstep(bind(backend=Functional(), fallback="error"), list(b"def get(self"), decode=1)
    assert right.at_fault is None, right.at_fault

    class Wrong(Functional):
        name = "wrong"

        def kv_write(self, pages: Pages, batch: Any, first: Any, second: Any = None) -> Pages:
            return Functional.kv_write(self, pages, batch, Value(first._x * 2), second)

    wrong = lockstep(bind(backend=Wrong(), fallback="error"), list(b"def get(self"), decode=1)
    assert wrong.at_fault is not None and wrong.at_fault.op == "kv_write"
    assert {call.op for call in wrong.calls if call.fault} == {"kv_write"}  # what reads the repaired cache is right


def test_an_inherited_kernel_says_that_arrays_are_carried_to_it() -> None:
    choices = bind(backend=Functional(), fallback="error").choices
    assert choices["silu_mul"].reason == "operands are carried to arrays of reference and back"
    assert choices["linear"].reason == "" and bind("cpu").choices["silu_mul"].reason == ""


def test_static_shapes_ask_for_no_other_shape() -> None:
    (case,) = (c for c in cases(contracts()["add"]) if c.token == "add,T=7,H=96,a:fp32,0")
    first = build(case).operands["a"][0]
    shapes: set[tuple[int, ...]] = set()

    class Static(Reference):
        name = "static"
        traits = Traits(static_shapes=True)
        moved = 0  # what it adds where the first row is another

        def add(self, a: Any, b: Any) -> Any:
            shapes.add(a.shape)
            y = self.empty(a.shape, str(a.dtype))
            y[...] = a + b + (0 if np.array_equal(a[0], first) else self.moved)
            return y

    assert check(case, Bindings(Static())).verdict == "PASS" and shapes == {(7, 96)}
    wrong = Bindings(type("Wrong", (Static,), {"name": "wrong", "moved": 1})())
    assert check(case, wrong).message.startswith("among other rows")


def test_weights_take_new_values() -> None:
    binding = bind(backend=Functional(), fallback="error")
    for op, operand in (("linear", "w"), ("grouped_gemm", "w")):  # packed for an own kernel, and for an inherited one
        old, new = (np.random.default_rng(n).standard_normal((3, 4, 5)[op == "linear" :]).astype(np.float32) for n in (1, 2))
        spec = WeightSpec(op, operand, old.shape, "float32")
        weight = binding.prepare(spec, lambda i, a=old: a[i])
        assert np.array_equal(binding.to_logical(weight)["w"], old)
        weight = binding.prepare(spec, lambda i, a=new: a[i], into=weight)
        assert np.array_equal(binding.to_logical(weight)["w"], new)


# -- traits that do not hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend, said",
    [
        (type("Claims", (Functional,), {"traits": Traits()}), "cannot write into its own arrays"),
        (
            type("Copies", (Functional,), {"traits": Traits(mutable=False, views_alias=False)}),
            "have no views with strides",
        ),
        (type("Shares", (Reference,), {"traits": Traits(views_alias=False)}), "share memory: state traits = "),
        (type("Dense", (Reference,), {"traits": Traits(strides=False)}), "slices with gaps are views on "),
        (
            type("Frozen", (Reference,), {"traits": Traits(mutable=False, views_alias=False)}),
            "can be overwritten: state traits = ",
        ),
    ],
)
def test_a_trait_that_does_not_hold_is_one_sentence(backend: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        verify(backend())
    assert str(error.value).count("\n") == 0 and backend.__name__ in str(error.value)


def test_immutable_arrays_have_no_views_that_share_memory() -> None:
    with pytest.raises(UsageError, match="views_alias=False"):
        Traits(mutable=False)


def test_only_views_are_left_out() -> None:
    planned = [case for contract in contracts().values() for case in cases(contract, "standard")]
    left = [case for case in planned if left_out(case, Functional())]
    assert {case.view for case in left} == {"columns", "rows", "transposed", *LAYOUTS, "far", "beyond"}
    assert not [case for case in planned if left_out(case, Reference())]


def test_calls_in_a_models_own_sizes_are_made_dense_where_arrays_have_no_strides() -> None:
    chip = Functional()
    viewed = [case for contract in contracts().values() for case in large(contract, "bring-up") if case.view]
    assert len(viewed) > 20 and not [case.token for case in viewed if left_out(case, chip)]
    for view in ("columns", "slices", "heads"):
        case = next(case for case in viewed if case.view == view)
        assert check(case, Bindings(chip)).verdict == "PASS"


# -- rows that nobody specifies, numbers that a chip reads as zero -----------------------------------------------------


def test_rows_beyond_the_counts_may_hold_anything_in_every_call() -> None:
    fill = iter(range(1, 10**9))

    class Grouped(Reference):
        name = "grouped"

        def grouped_gemm(self, x: Any, w: Weight, counts: Any) -> Any:
            y = self.empty((len(x), w.spec.shape[1]), str(x.dtype))
            y[...] = next(fill)
            start = 0
            for e, n in enumerate(counts):
                y[start : start + n] = x[start : start + n].astype(np.float32) @ w.native[e].astype(np.float32).T
                start += n
            return y

    results = small(Grouped(), "grouped_gemm")
    assert [r.explain() for r in results if r.failed] == []
    assert sum(r.own and r.verdict == "PASS" for r in results) > 20


def flushing(traits: Traits) -> Backend:
    """A right chip that reads numbers below the normal range as zero."""

    def read(x: Any) -> Any:
        return np.where(np.abs(x.astype(np.float64)) < FLUSHED, 0, x)

    def drawn(op: str) -> Any:
        right = create("reference").derive(contracts()[op])
        return limits()(lambda self, logits, *rest: right(read(logits).astype(logits.dtype), *rest))

    class Flushing(Reference):
        name = "flushing"

        @limits()
        def argmax(self, logits: Any) -> Any:
            ids = self.empty((len(logits),), "int32")
            ids[...] = np.argmax(np.where(np.isnan(logits), -np.inf, read(logits)), axis=1)
            return ids

        @limits()
        def topk(self, scores: Any, batch: Any, *, k: int) -> Selection:
            indices, length = self.empty((batch.T, k), "int32"), np.minimum(batch.visible, k).astype(np.int32)
            indices[...] = -1
            for t, n in enumerate(batch.visible):
                row = read(scores[t, :n])
                indices[t, : length[t]] = np.argsort(-np.where(np.isnan(row), -np.inf, row), kind="stable")[:k]
            return Selection(SelectionSpec(batch.T, k), Rows(indices, length))

        sample, speculative_verify = drawn("sample"), drawn("speculative_verify")

    Flushing.traits = traits
    return Flushing()


def denormal(op: str, operand: str) -> list[Any]:
    return [c for c in cases(contracts()[op], "standard") if (operand, "denormal") in c.recipes]


@pytest.mark.parametrize(
    "op, operand", [("argmax", "logits"), ("topk", "scores"), ("sample", "logits"), ("speculative_verify", "logits")]
)
def test_a_chip_that_flushes_may_choose_among_what_it_reads_as_zero(op: str, operand: str) -> None:
    found: dict[bool, list[Result]] = {}
    for flushes in (True, False):
        bindings = Bindings(flushing(Traits(flushes_denormals=flushes)))
        found[flushes] = [check(case, bindings, "standard") for case in denormal(op, operand)]
    assert found[True] and {r.verdict for r in found[True]} == {"PASS"}, found[True][0].explain()
    assert "FAIL_VALUE" in {r.verdict for r in found[False]}  # who does not say so must see them


def test_a_wrong_choice_fails_on_a_chip_that_flushes() -> None:
    last: Any = lambda self, logits: np.full(len(logits), logits.shape[1] - 1, np.int32)  # noqa: E731
    right = type(flushing(Traits(flushes_denormals=True)))
    bindings = Bindings(type("Wrong", (right,), {"name": "wrong", "argmax": last})())
    results = [check(case, bindings) for case in cases(contracts()["argmax"]) if not case.fault]
    assert sum(r.verdict == "FAIL_VALUE" for r in results) > 5


# -- a replay gives the verdict of the run -----------------------------------------------------------------------------


def test_the_replay_command_has_the_bounds_of_the_run() -> None:
    report = run("reference", ["add"], bounds=Bounds(1, 60, 1.5))
    assert report.replay(report.results[0]).endswith(" --backend reference --timeout 60 --memory 1.5")
    usual = run("reference", ["add"], bounds=Bounds(1))
    assert usual.replay(usual.results[0]).endswith(" --backend reference")
    assert Report.from_json(report.json()) == report


def test_a_replay_is_waived_as_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = type("Wrong", (Reference,), {"name": "wrong", "add": lambda self, a, b: a + a})()
    known = (Waiver("unsupported", "add,T=7,*", "for a reason"),)
    monkeypatch.setattr("porthal.conformance.runner.runs.waivers", lambda backend: known)
    monkeypatch.setattr("porthal.conformance.report.facts.waivers", lambda backend: known)
    ran = run(backend, ["add"]).results
    assert {r.verdict for r in ran if r.token.startswith("add,T=7,")} >= {"WAIVED"}
    assert {r.verdict for r in ran} >= {"WAIVED", "FAIL_VALUE"}
    for result in ran[:12]:
        again = replay(result.token, backend)
        assert (again.verdict, again.reason) == (result.verdict, result.reason)


def test_static_shapes_ask_for_no_other_request_either() -> None:
    case = next(c for c in cases(contracts()["rope"]) if dict(c.dims)["T"] == 7 and not (c.fault or c.view or c.recipes))
    inputs = build(case)
    assert inputs.batch is not None
    seen: set[tuple[int, int]] = set()

    class Static(Reference):
        name = "static"
        traits = Traits(static_shapes=True)

        def rope(self, x: Any, batch: Any, **attrs: Any) -> Any:
            seen.add((batch.T, batch.R))
            return self.derive(contracts()["rope"])(x, batch, **attrs)  # type: ignore[misc]

    assert check(case, Bindings(Static())).verdict == "PASS"
    assert seen == {(inputs.batch.T, inputs.batch.R)}


@pytest.mark.parametrize("backend", [Reference(), type("Plain", (Backend,), {"name": "plain"})()])
def test_a_weight_takes_new_values_in_its_own_memory(backend: Backend) -> None:
    old, new = (np.random.default_rng(n).standard_normal((4, 5)).astype(np.float32) for n in (1, 2))
    spec = WeightSpec("linear", "w", old.shape, "float32")
    held = backend.prepare(spec, lambda i: old[i].copy())
    native = held.native
    assert backend.prepare(spec, lambda i: new[i], into=held) is held and held.native is native
    assert np.array_equal(backend.to_logical(held)["w"], new)
