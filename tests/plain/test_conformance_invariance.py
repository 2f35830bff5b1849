"""The same rows among others, and the same call again: what must follow the rows, and what must not change at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import elements
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.invariance import disturbed, restored
from porthal.conformance.judgement.golden import Golden
from porthal.conformance.runner.check import check
from porthal.hal import Operand, contracts, create

# Their rows are written elsewhere, counted, or sorted among each other.
ROWS_DEPEND = {"grouped_gemm", "moe_permute", "moe_unpermute", "page_copy"}


def home(op: str, **fields: Any) -> Case:
    wanted = {"batch": "mixed"} if any(o.kind == "Batch" for o in contracts()[op].signature.operands) else {}
    plain = (c for c in cases(contracts()[op]) if c.dims and c.dims[0][1] == 7 and not (c.fault or c.view or c.recipes))
    return min((c for c in plain if all(getattr(c, k) == v for k, v in {**wanted, **fields}.items())), key=elements)


def logical(results: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.parts() if isinstance(v, Operand) else v for k, v in results.items()
    }


def flat(results: dict[str, Any]) -> list[Any]:
    parts = [list(v.values()) if isinstance(v, dict) else [v] for v in results.values()]
    return [array for part in parts for array in part]


def backend(**kernels: Callable[..., Any]) -> Any:
    return type("Made", (Reference,), {"name": "made", **kernels})()


def truth(op: str) -> Callable[..., Any]:
    return lambda self, *args, **attrs: create("reference").derive(contracts()[op])(*args, **attrs)


def test_all_other_ops_work_row_by_row() -> None:
    assert {op for op in contracts() if disturbed(build(home(op))) is None} == ROWS_DEPEND


@pytest.mark.parametrize("op", sorted(set(contracts()) - ROWS_DEPEND))
def test_references_follow_their_rows(op: str) -> None:
    inputs = build(home(op))
    call, to = disturbed(inputs) or pytest.fail("nothing to disturb")
    before = logical(Golden(inputs).results())
    after = restored(call, logical(Golden(call).results()), to)
    for a, b in zip(flat(before), flat(after), strict=True):
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_one_row_is_poisoned_and_the_others_go_in_reverse() -> None:
    inputs = build(home("rms_norm"))
    call, to = disturbed(inputs) or pytest.fail("nothing to disturb")
    x, moved = inputs.operands["x"], call.operands["x"]
    assert len(moved) == len(x) + 1 and np.array_equal(moved[to], x)
    assert (np.diff(to) < 0).all()
    assert np.isnan(moved[np.setdiff1d(np.arange(len(moved)), to)].astype(np.float64)).all()
    assert call.spec.dims["T"] == len(x) + 1 and inputs.spec.dims["T"] == len(x)


def test_requests_keep_their_cache_and_those_that_decode_come_first() -> None:
    inputs = build(Case.from_token("indexer_scores,T=17,G=8,D=128,scale=0.0156,iq:bf16,batch=mixed,block_size=64,0"))
    call, to = disturbed(inputs) or pytest.fail("nothing to disturb")
    old, new = inputs.batch, call.batch
    assert old is not None and new is not None
    assert new.R == old.R + 1 and new.T == old.T + 1
    assert new.n_decode == old.n_decode + 1
    assert np.array_equal(new.slots[to], old.slots) and np.array_equal(new.visible[to], old.visible)
    assert new.visible[np.setdiff1d(np.arange(new.T), to)].tolist() == [0]


def test_draws_are_disturbed_by_a_copy_since_they_need_numbers() -> None:
    call, _ = disturbed(build(home("sample"))) or pytest.fail("nothing to disturb")
    assert not np.isnan(call.operands["logits"].astype(np.float64)).any()


# -- kernels ---------------------------------------------------------------------------------------------------------


def leaking(self: Any, x: Any, w: Any, **attrs: Any) -> Any:
    """Padding multiplied by zero."""
    return truth("linear")(self, x, w, **attrs) + (0 * x.astype(np.float32).sum()).astype(x.dtype)


def anchored(self: Any, x: Any, w: Any, **attrs: Any) -> Any:
    """The first row is computed with the second's first element."""
    x = x.copy()
    x[0, :1] = x[1:2, 0] if len(x) == 8 else x[0, :1]
    return truth("linear")(self, x, w, **attrs)


@pytest.mark.parametrize("kernel", [leaking, anchored])
def test_a_row_that_depends_on_others_is_found(kernel: Any) -> None:
    result = check(home("linear", dtypes=(("x", "float32"),)), Bindings(backend(linear=kernel)))
    assert result.verdict == "FAIL_VALUE"
    assert result.message.startswith("among other rows, one of them poisoned: y[")


def test_a_kernel_that_does_not_take_the_poisoned_row_is_named() -> None:
    def choosy(self: Any, x: Any, w: Any, **attrs: Any) -> Any:
        if np.isnan(x.astype(np.float32)).any():
            raise ValueError("NaN")
        return truth("linear")(self, x, w, **attrs)

    result = check(home("linear"), Bindings(backend(linear=choosy)))
    message = f"among other rows, one of them poisoned: ValueError: NaN; raised in choosy at {__file__}:"
    assert result.verdict == "FAIL_ERROR" and result.message.startswith(message)


def test_bits_may_depend_on_the_batch_unless_the_kernel_declares_that_they_do_not() -> None:
    def linear(self: Any, x: Any, w: Any, **attrs: Any) -> Any:
        x, w = x.astype(np.float32), w.native.astype(np.float32)
        half = x.shape[1] // (2 if len(x) % 2 else 3)
        return x[:, :half] @ w[:, :half].T + x[:, half:] @ w[:, half:].T

    case = next(c for c in cases(contracts()["linear"]) if ("T", 7) in c.dims and c.dtype("x") == "float32" and not c.recipes)
    assert check(case, Bindings(backend(linear=linear)), "standard").verdict == "PASS"
    linear.batch_invariant = True  # type: ignore[attr-defined]
    result = check(case, Bindings(backend(linear=linear)), "standard")
    assert result.verdict == "FAIL_VALUE"
    assert result.message.endswith("among other rows, though the kernel declares that its results do not change")


def same(calls: list[Any]) -> int:
    """How many calls had the first one's operand: other calls are made among other rows, or to disturb results."""
    return sum(np.array_equal(call, calls[0]) for call in calls)


@pytest.mark.parametrize(("level", "runs"), [("bring-up", 2), ("standard", 3), ("strict", 50)])
def test_the_last_of_a_levels_runs_counts(level: Any, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong once, in the last run that the level asks for."""
    monkeypatch.setattr("porthal.conformance.execution.call.PATIENCE", 60.0)
    calls: list[Any] = []

    def add(self: Any, a: Any, b: Any) -> Any:
        calls.append(a.copy())  # what is called is overwritten afterwards
        y = truth("add")(self, a, b)
        if same(calls) == runs:
            y[2, 5] = 7
        return y

    result = check(home("add", dtypes=(("a", "float32"),)), Bindings(backend(add=add)), level)
    assert result.verdict == "FAIL_NONDETERMINISTIC"
    assert result.message.startswith("y[2, 5] is ") and result.message.endswith(", then 7.0 in another run on the same inputs")
    assert same(calls) == runs


def test_a_slow_kernel_runs_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("porthal.conformance.execution.call.PATIENCE", 0.0)
    calls: list[Any] = []

    def add(self: Any, a: Any, b: Any) -> Any:
        calls.append(a.copy())  # what is called is overwritten afterwards
        return truth("add")(self, a, b)

    assert check(home("add"), Bindings(backend(add=add)), "strict").verdict == "PASS"
    assert same(calls) == 2


@pytest.mark.parametrize(
    ("op", "operand", "call"), [("add", "b", 1), ("linear", "w", 1), ("add", "b", "other rows"), ("add", "b", "next")]
)
def test_what_any_of_the_calls_may_not_write_is_watched(op: str, operand: str, call: Any) -> None:
    """The second run, the run among other rows and the one that follows all count, as the first does."""
    calls = []

    def kernel(self: Any, x: Any, other: Any, **attrs: Any) -> Any:
        y = truth(op)(self, x, other, **attrs)
        poisoned_row = np.isnan(x.astype(np.float32)).any()
        n = "other rows" if poisoned_row else "next" if calls and not np.array_equal(x, calls[0]) else len(calls)
        calls.append(x.copy())
        if n == call:
            getattr(other, "native", other)[...] = 0
        return y

    dtypes = ((next(iter(contracts()[op].signature.operands)).name, "float32"),)
    result = check(home(op, dtypes=dtypes), Bindings(backend(**{op: kernel})))
    assert (result.verdict, operand in result.message) == ("FAIL_MUTATED", True)


def test_pages_with_as_many_slots_as_rows_keep_their_order() -> None:
    """63 rows and one poisoned, in a cache of 64 slots."""
    token = "kv_write,T=63,A=128,B=64,pages:bf16,batch=63/0,block_size=16,0"
    assert check(Case.from_token(token), Bindings(backend())).verdict == "PASS"
