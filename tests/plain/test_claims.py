"""What a class says about its kernels: names and limits that mean nothing, kernels that wrap another, needs of data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay, run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.hal import (
    Backend,
    Batch,
    DataNotTaken,
    Need,
    NotClaimed,
    PagesSpec,
    Selection,
    SelectionSpec,
    UsageError,
    Weight,
    WeightSpec,
    any_of,
    at_least,
    at_most,
    bind,
    contracts,
    dtype,
    limits,
    multiple_of_bytes,
    narrow,
    one_of,
    per_dtype,
    same_as,
    widen,
)


def kernel(*args: Any, **attrs: Any) -> Any:
    raise AssertionError("it is not called")


def stating(**stated: Any) -> Any:
    return limits(**stated)(lambda *args, **attrs: None)


# -- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rms_nrom", "rms_norm"),
        ("topK", "topk"),
        ("Linear", "linear"),
        ("rmsnorm", "rms_norm"),
        ("moe_expert", "moe_experts"),
        ("concatt", "concat"),
        ("rope_", "rope"),
        ("from_nunpy", "from_numpy"),
        ("prepar", "prepare"),
    ],
)
@pytest.mark.parametrize("value", [kernel, None])
def test_a_name_that_is_almost_one_of_an_op_or_service_is_refused(name: str, meant: str, value: Any) -> None:
    chip = type("Chip", (Reference,), {"name": "chip", name: value})
    with pytest.raises(UsageError, match=rf"^Chip\.{name} is almost '{meant}': give it that name, or one that begins with _$"):
        chip()
    mixin = type("Vendor", (), {name: value})
    with pytest.raises(UsageError, match=rf"^Vendor\.{name} is almost '{meant}'"):
        type("Chip", (mixin, Reference), {"name": "chip"})()


def test_a_class_with_a_constructor_of_its_own_is_looked_at_too() -> None:
    chip = type("Chip", (Reference,), {"name": "chip", "__init__": lambda self, device: None, "trait": None})
    with pytest.raises(UsageError, match=r"^Chip\.trait is almost 'traits'"):
        chip("")


@pytest.mark.parametrize("name", ["_rms_nrom", "devices", "names", "warm_up", "norm", "flash_topk", "rms_norm", "_topk"])
def test_helpers_and_private_names_are_allowed(name: str) -> None:
    assert type("Chip", (Reference,), {"name": "chip", name: kernel})().name == "chip"


def test_limits_on_what_is_no_op_are_refused() -> None:
    chip = type("Chip", (Reference,), {"name": "chip", "root_mean_square": stating(T=8)})
    with pytest.raises(UsageError, match=r"^Chip\.root_mean_square has limits but is no op: known are add, add_rms_norm, "):
        chip()


# -- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "stated", "message"),
    [
        ("topk", {"kk": at_most(8)}, "limits 'kk', expected one of R, S, T, block_size, k"),
        ("topk", {"dtypes": {"z": "float32"}}, "limits the dtype of 'z', expected one of scores"),
        ("rms_norm", {"dtypes": {"y": "float32"}}, "limits the dtype of 'y', expected one of x, weight"),
        ("rms_norm", {"dtypes": {"x": same_as("z")}}, "limits what depends on the dtype of 'z', expected one of x, weight"),
        ("rms_norm", {"H": multiple_of_bytes(16, "y")}, "limits what depends on the dtype of 'y', expected one of x, weight"),
        (
            "kv_write",
            {"A": per_dtype("pages", float32=multiple_of_bytes(16, of="second"))},
            "limits what depends on the dtype of 'second', expected one of pages, first",  # the second may be absent
        ),
        ("linear", {"needs": {"w": Need("no NaN", np.isfinite)}}, "limits the values of 'w', expected one of x"),
        ("linear", {"schemes": "fp8_bloc"}, "limits schemes to 'fp8_bloc', expected one of none, .*"),
        ("linear", {"dtypes": {"x": one_of("bf16")}}, "limits the dtype of x to 'bf16', expected one of float64, .*"),
        ("linear", {"dtypes": {"x": any_of(one_of("half"))}}, "limits the dtype of x to 'half', expected one of float64, .*"),
        ("topk", {"k": 2048.5}, "limits k to 2048.5, expected whole numbers"),
    ],
)
def test_a_limit_on_what_the_op_does_not_have_is_refused(op: str, stated: Any, message: str) -> None:
    chip = type("Chip", (Reference,), {"name": "chip", op: stating(**stated)})
    with pytest.raises(UsageError, match=rf"^Chip\.{op} {message}$"):
        chip()


def test_every_fact_that_a_call_has_can_be_limited() -> None:
    for op, contract in contracts().items():
        typed = [o.name for o in contract.signature.operands if o.typed]
        stated = dict.fromkeys(contract.facts(), at_least(0)) | {"dtypes": dict.fromkeys(typed, one_of("float32"))}
        assert type("Chip", (Reference,), {"name": "chip", op: stating(**stated)})().name == "chip"


# -- kernels that wrap another -------------------------------------------------------------------------------------------


class Few(Reference):
    name = "few"

    @limits(provider="few.topk", tie="any", k=at_most(4))
    def topk(self, scores: Any, batch: Batch, *, k: int) -> Selection:
        raise AssertionError("it is not called")

    def refuses(self, op: str, kernel: Any, spec: Any) -> str | None:
        """A rule beside the limits."""
        odd = kernel.provider == "few.topk" and spec.attrs["k"] % 2
        return "k is odd" if odd else super().refuses(op, kernel, spec)


class Wrapped(Few):
    name = "wrapped"

    def topk(self, scores: Any, batch: Batch, *, k: int) -> Selection:
        return super().topk(scores, batch, k=k)


class Narrower(Few):
    name = "narrower"

    @limits(provider="narrow.topk", k=at_least(2))
    def topk(self, scores: Any, batch: Batch, *, k: int) -> Selection:
        return (lambda: super(Narrower, self).topk(scores, batch, k=k))()


class Anew(Few):
    name = "anew"

    def topk(self, scores: Any, batch: Batch, *, k: int) -> Selection:
        assert super().empty((1,), "int32").shape == (1,)  # another method of the base
        raise AssertionError("it is not called")


@pytest.mark.parametrize(
    ("chip", "taken", "refused", "tie"),
    [
        (Wrapped, (2, 4), {6: "k = 6, the kernel takes at most 4", 3: "k is odd"}, "any"),
        (Narrower, (2, 4), {6: "k = 6, the kernel takes at most 4", 1: "k = 1, the kernel takes at least 2"}, "lowest"),
        (Anew, (1, 6), {}, "lowest"),
    ],
)
def test_a_kernel_that_calls_super_keeps_the_limits_of_what_it_calls(
    chip: type[Backend], taken: tuple[int, ...], refused: dict[int, str], tie: str
) -> None:
    def choice(k: int) -> Any:
        operands = {"scores": np.ones((1, 3), np.float32), "batch": Batch.build([1], [3], [[0]], 16)}
        spec = contracts()["topk"].spec(operands, {"k": k})
        return bind(backend=chip(), profile={"topk": [spec]}, overrides={}).choices["topk"]

    assert {(choice(k).status, choice(k).owner, choice(k).tie) for k in taken} == {("own", chip.name, tie)}
    for k, reason in refused.items():
        assert choice(k).status != "own" and reason in choice(k).reason


def test_a_checked_call_is_held_to_the_limits_of_what_is_wrapped() -> None:
    ops = bind(backend=Wrapped(), overrides={}, check=True)
    with pytest.raises(NotClaimed, match=r"^topk on wrapped does not take this call: k = 6, the kernel takes at most 4; bind"):
        ops.topk(np.ones((1, 3), np.float32), Batch.build([1], [3], [[0]], 16), k=6)
    with pytest.raises(NotClaimed, match=r"k is odd"):
        ops.topk(np.ones((1, 3), np.float32), Batch.build([1], [3], [[0]], 16), k=3)


# -- data ----------------------------------------------------------------------------------------------------------------

CALLED: list[str] = []
EXPERTS = Need("no -1", lambda ids: ids >= 0)  # npu_moe_finalize_routing, vLLM's and ZenTorch's kernels index with them
WRITTEN = Need("a slot for every row", lambda batch: (batch.slots >= 0).all())  # npu_scatter_nd_update_
IDS = np.array([[0, 1], [1, 0]], np.int32)
HOLES = np.array([[0, -1], [1, 0]], np.int32)


class Permutes:
    @limits(provider="lib.permute", needs={"ids": EXPERTS})
    def moe_permute(self, x: Any, ids: Any, *, E: int, first_expert: int = 0) -> Any:
        CALLED.append("permute")
        local = (ids >= first_expert) & (ids < first_expert + E)
        taken = np.where(ids < 0, first_expert, np.where(local, ids, -1))  # -1 is taken for the first expert
        rows, counts, source = contracts()["moe_permute"].reference(widen(x), taken, E=E, first_expert=first_expert)
        return narrow(rows, dtype(x)), counts, source


class Writes:
    @limits(provider="lib.write", needs={"batch": WRITTEN})
    def kv_write(self, pages: Any, batch: Batch, first: Any, second: Any = None) -> Any:
        CALLED.append("write")
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            pages[name][batch.slots] = rows
        return pages


class Chip(Permutes, Writes, Reference):
    name = "chip"


def test_data_that_a_kernel_does_not_take_goes_to_the_next_kernel() -> None:
    ops, x = bind(backend=Chip(), overrides={}), np.ones((2, 3), np.float32)
    choice = ops.choices["moe_permute"]
    assert (choice.status, choice.provider, choice.reason) == ("own", "lib.permute", "only ids with no -1, read at each call")
    CALLED.clear()
    before = ops.backend.host_copies
    assert ops.moe_permute(x, IDS, E=2)[2].tolist() == [0, 3, 1, 2]
    assert ops.backend.host_copies == before + 1  # what lies on the device is read back, and counted
    assert ops.moe_permute(x, HOLES, E=2)[2].tolist() == [0, 3, 2, -1]
    assert CALLED == ["permute"]


def test_what_else_a_kernel_states_is_kept() -> None:
    mark = limits(needs={"a": Need("numbers", np.isfinite)})(lambda self, a, b: a + b)
    mark.batch_invariant = True
    ops = bind(backend=type("Chip", (Reference,), {"name": "chip", "add": mark})(), overrides={})
    assert ops.add.batch_invariant is True


def test_a_condition_on_the_batch_costs_no_copy() -> None:
    ops = bind(backend=Chip(), overrides={})
    rows, before = np.ones((2, 4), np.float32), ops.backend.host_copies
    CALLED.clear()
    for kv_lens, tables in (([2], [[1]]), ([0], [[]])):  # the second is padding
        pages = ops.alloc_pages(PagesSpec((("k", 4),), "float32", 2, 16))
        ops.kv_write(pages, ops.plan(Batch.build([2], kv_lens, tables, 16)), rows)
        assert pages["k"].sum() == (8 if kv_lens == [2] else 0)
    assert CALLED == ["write"] and ops.backend.host_copies == before


def test_a_condition_on_a_selection_is_about_its_logical_form() -> None:
    # npu_sparse_flash_attention leaves rows that select nothing undefined.
    some = Need("a position in every row", lambda sel: sel["length"] > 0)
    chip = type("Chip", (Reference,), {"name": "chip", "select_rows": limits(needs={"sel": some})(lambda self, sel, rows: sel)})
    ops = bind(backend=chip(), overrides={"select_rows": "chip"}, divert=False)
    for length, taken in (([1, 2], True), ([0, 2], False)):
        parts = {"indices": np.zeros((2, 2), np.int32), "length": np.array(length, np.int32)}
        sel = ops.from_logical(SelectionSpec(2, 2), parts)
        if taken:
            assert ops.select_rows(sel, np.array([0], np.int32)) is sel
        else:
            with pytest.raises(DataNotTaken, match=r"data: the kernel takes sel with a position in every row$"):
                ops.select_rows(sel, np.array([0], np.int32))


def test_where_nothing_can_take_over_the_call_is_refused() -> None:
    x = np.ones((2, 3), np.float32)
    said = r"^moe_permute on chip does not take this data: ids\[0, 1\] is -1, the kernel takes ids with no -1$"
    for ops in (
        bind(backend=Chip(), overrides={"moe_permute": "via=lib.permute"}),
        bind(backend=Chip(), overrides={}, divert=False),
    ):
        assert ops.moe_permute(x, IDS, E=2)[1].tolist() == [2, 2]
        with pytest.raises(DataNotTaken, match=said):
            ops.moe_permute(x, HOLES, E=2)


def test_a_wrapper_keeps_the_needs_of_what_it_calls() -> None:
    class Wrapper(Chip):
        name = "wrapper"

        @limits(provider="wrapper")
        def moe_permute(self, x: Any, ids: Any, *, E: int, first_expert: int = 0) -> Any:
            return super().moe_permute(x, ids, E=E, first_expert=first_expert)

    ops = bind(backend=Wrapper(), overrides={})
    CALLED.clear()
    assert ops.moe_permute(np.ones((2, 3), np.float32), HOLES, E=2)[2].tolist() == [0, 3, 2, -1]
    assert ops.moe_permute(np.ones((2, 3), np.float32), IDS, E=2)[2].tolist() == [0, 3, 1, 2]
    assert CALLED == ["permute"] and ops.choices["moe_permute"].owner == "wrapper"


def test_only_a_kernel_with_the_same_packed_weights_takes_over() -> None:
    def gemm(name: str, **stated: Any) -> Any:
        def product(self: Any, x: Any, w: Weight, counts: Any) -> Any:
            CALLED.append(name)
            return np.float32(contracts()["grouped_gemm"].reference(x.astype(np.float64), w.native, counts))

        return type(name, (), {"grouped_gemm": limits(provider=name, **stated)(product)})

    # ZenTorch's fused experts raise where only one of them has rows.
    several = gemm("several", needs={"counts": Need("two or more experts with rows", lambda counts: (counts > 0).sum() > 1)})
    packing = type("Packing", (gemm("packing"),), {"prepare": lambda self, *args: Reference.prepare(self, *args)})
    for others, takes_over in (((gemm("any"),), "any"), ((), ""), ((packing,), "")):
        chip = type("Chip", (several, *others, Reference), {"name": "chip"})
        ops = bind(backend=chip(), overrides={})
        w = np.ones((2, 1, 3), np.float32)
        weight = ops.prepare(WeightSpec("grouped_gemm", "w", w.shape, "float32"), w.__getitem__)
        CALLED.clear()
        assert ops.grouped_gemm(w[:, 0], weight, np.array([1, 1], np.int32)).tolist() == [[3.0], [3.0]]
        one = w[:, 0], weight, np.array([0, 2], np.int32)
        if takes_over or not others:  # the reference packs as this class does
            assert ops.grouped_gemm(*one).tolist() == [[3.0], [3.0]]
            assert ["several", *filter(None, [takes_over])] == CALLED
        else:
            with pytest.raises(DataNotTaken, match=r"the kernel takes counts with two or more experts with rows$"):
                ops.grouped_gemm(*one)


def test_another_backend_that_borrows_the_kernel_is_told() -> None:
    class Other(Reference):
        name = "other"

    from porthal.hal import binding as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_shared", lambda name: Chip())
        ops = bind(backend=Other(), overrides={"moe_permute": "chip"})
    x = np.ones((2, 3), np.float32)
    assert ops.moe_permute(x, IDS, E=2)[2].tolist() == [0, 3, 1, 2]
    with pytest.raises(DataNotTaken, match=r"^moe_permute on chip does not take this data: ids\[0, 1\] is -1"):
        ops.moe_permute(x, HOLES, E=2)


# -- in conformance ------------------------------------------------------------------------------------------------------


def test_data_that_a_kernel_does_not_take_is_unclaimed_there() -> None:
    report = run(Chip(), ["moe_permute", "kv_write"])
    assert not report.failures
    by_op = {row.op: row for row in report.rows}
    for op, what in (("moe_permute", "ids with no -1"), ("kv_write", "batch with a slot for every row")):
        unclaimed = [r for r in by_op[op].results if r.verdict == "UNCLAIMED"]
        statuses = {r.status for r in by_op[op].results if "%" not in r.token}  # under schemes the base's kernels run
        assert statuses <= {"own", "refusal"} and {r.status for r in unclaimed} == {"own"}
        assert {r.message.partition(":")[0] for r in unclaimed} == {f"{op} on chip does not take this data"}
        assert f"{len(unclaimed)} unclaimed for their data: {op} takes {what}" in report.untaken
    needless = {"name": "needless", "moe_permute": lambda self, *args, **attrs: Permutes.moe_permute(self, *args, **attrs)}
    assert any("ids~holes" in r.token for r in run(type("Needless", (Chip,), needless)(), ["moe_permute"]).failures)


def test_further_calls_of_a_case_with_data_that_is_not_taken_are_left_out() -> None:
    """Reversed rows, which another thread and the next call have, are not rising any more."""
    rising = limits(needs={"a": Need("rising rows", lambda a: a[0, 0] <= a[-1, 0])})
    chip = type("Chip", (Reference,), {"name": "chip", "add": rising(lambda self, a, b: a + b)})()
    verdicts = set()
    for seed in range(6):
        case = Case.from_token(f"add,T=2,H=7,view=threads,{seed}")
        a = build(case).operands["a"]
        verdicts.add((bool(a[0, 0] <= a[1, 0]), replay(case.token, chip).verdict))
    assert verdicts == {(True, "PASS"), (False, "UNCLAIMED")}


def test_a_composition_is_unclaimed_for_the_data_of_its_parts() -> None:
    report = run(Chip(), ["moe_experts"])
    broken = {r.token: bool((build(Case.from_token(r.token)).operands["ids"] < 0).any()) for r in report.results}
    verdicts = {(broken[r.token] and ",fault=" not in r.token, r.verdict) for r in report.results}
    assert verdicts == {(True, "UNCLAIMED"), (False, "PASS")}
    count = report.rows[0].verdicts["UNCLAIMED"]
    assert report.untaken == [f"{count} unclaimed for their data: moe_permute takes ids with no -1"]


def test_what_a_kernel_raises_itself_is_a_failure_whatever_its_type() -> None:
    """A class with no needs that raises DataNotTaken or NotClaimed in a kernel claims the call all the same."""
    for kind in (DataNotTaken, NotClaimed):

        def add(self: Any, a: Any, b: Any, kind: Any = kind) -> Any:
            if len(a) >= 5:
                raise kind("no")
            return self.derive(contracts()["add"])(a, b)

        backend = type("Picky", (Reference,), {"name": "picky", "add": lambda self, a, b, add=add: add(self, a, b)})()
        report = run(backend, ["add"])
        assert {r.verdict for r in report.results} == {"PASS", "FAIL_ERROR"} and report.exit_code == 1
