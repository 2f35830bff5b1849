"""Batch: what it derives, against loops over plain lists, and what it refuses; how operands get to a backend."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porthal.backends.reference.backend import Reference
from porthal.hal import Backend, Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec, UsageError, Weight, WeightSpec
from porthal.hal.operands import kind_of


class Request(NamedTuple):
    q_len: int
    kv_len: int
    pages: list[int]


class Step(NamedTuple):
    requests: list[Request]
    block_size: int

    def build(self) -> Batch:
        q_lens, kv_lens, tables = zip(*self.requests) if self.requests else ((), (), ())
        return Batch.build(q_lens, kv_lens, tables, self.block_size)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Requests in any order, with padded ones, ones without query rows, and pages held ahead of need."""
    size = draw(st.sampled_from([1, 2, 3, 16, 64]))
    free = iter(range(1000))
    requests = []
    for _ in range(draw(st.integers(0, 6))):
        q_len = draw(st.integers(0, 12))
        kv_len = draw(st.just(0) | st.integers(q_len, q_len + 40))
        pages = [next(free) for _ in range(-(-kv_len // size) + draw(st.integers(0, 2)))]
        requests.append(Request(q_len, kv_len, pages))
    return Step(requests, size)


def same(actual: Any, expected: list[int], dtype: str) -> None:
    assert actual.dtype == dtype
    assert actual.tolist() == expected


@settings(deadline=None, max_examples=150)
@given(steps())
def test_derived_fields_by_loops(step: Step) -> None:
    batch = step.build()
    owner, positions, visible, slots, last = [], [], [], [], []
    for r, (q_len, kv_len, pages) in enumerate(step.requests):
        for i in range(q_len):
            owner.append(r)
            at = kv_len - q_len + i if kv_len else 0
            positions.append(at)
            visible.append(at + 1 if kv_len else 0)
            slots.append(pages[at // step.block_size] * step.block_size + at % step.block_size if kv_len else -1)
        last.append(len(owner) - 1 if q_len else -1)
    assert len(step.requests) == batch.R
    assert len(owner) == batch.T
    assert batch.max_kv == max((r.kv_len for r in step.requests), default=0)
    same(batch.q_len, [r.q_len for r in step.requests], "int32")
    same(batch.row_request, owner, "int32")
    same(batch.positions, positions, "int32")
    same(batch.visible, visible, "int32")
    same(batch.slots, slots, "int64")
    same(batch.last_rows, last, "int32")
    assert len({s for s in slots if s >= 0}) == len([s for s in slots if s >= 0])  # no slot is written twice
    decoding = 0
    while decoding < batch.R and step.requests[decoding].q_len <= 8:
        decoding += 1
    assert batch.n_decode == decoding
    for r, (q_len, kv_len, pages) in enumerate(step.requests):
        held = [pages[at // step.block_size] * step.block_size + at % step.block_size for at in range(kv_len)]
        same(batch.slots_of(r), held, "int64")
        if q_len and kv_len:  # the step's own rows are the last ones held
            assert held[-q_len:] == batch.slots[batch.row_request == r].tolist()


@settings(deadline=None, max_examples=50)
@given(steps())
def test_build_lays_out_the_three_arrays(step: Step) -> None:
    batch = step.build()
    cu_q = [0]
    for r in step.requests:
        cu_q.append(cu_q[-1] + r.q_len)
    widest = max((len(r.pages) for r in step.requests), default=0)
    table = [r.pages + [-1] * (widest - len(r.pages)) for r in step.requests]
    for array, expected in zip(batch.leaves(), (cu_q, [r.kv_len for r in step.requests], table)):
        same(array, expected, "int32")
    assert batch.block_table.shape == (len(table), widest)


def test_an_empty_batch() -> None:
    batch = Batch.build([], [], [], 64)
    assert (batch.R, batch.T, batch.max_kv, batch.n_decode) == (0, 0, 0, 0)
    for name in ("q_len", "row_request", "positions", "visible", "slots", "last_rows"):
        assert getattr(batch, name).shape == (0,), name
    assert batch.block_table.shape == (0, 0)


def test_only_padded_requests_and_no_pages() -> None:
    batch = Batch.build([2, 0], [0, 0], [[], []], 4)
    same(batch.slots, [-1, -1], "int64")
    same(batch.visible, [0, 0], "int32")
    same(batch.last_rows, [1, -1], "int32")


def test_slots_beyond_32_bits() -> None:
    batch = Batch.build([1], [1], [[2**31 - 1]], 64)
    same(batch.slots, [(2**31 - 1) * 64], "int64")
    same(batch.slots_of(0), [(2**31 - 1) * 64], "int64")


@pytest.mark.parametrize(("q_lens", "expected"), [([], 0), ([8, 1], 2), ([9], 0), ([8, 9, 1], 1), ([0, 3, 8, 9], 3)])
def test_decoding_requests_have_at_most_eight_rows(q_lens: list[int], expected: int) -> None:
    assert Batch.build(q_lens, q_lens, [[0]] * len(q_lens), 16).n_decode == expected


def ints(*values: Any, dtype: str = "int32") -> Any:
    return np.array(values, dtype)


GOOD = {"cu_q": ints(0, 2), "kv_len": ints(5), "block_table": ints([3, 1, -1]), "block_size": 4}

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cu_q": [0, 2]}, "Batch.cu_q is list: expected a NumPy int32 array"),
    ({"kv_len": ints(5, dtype="int64")}, "Batch.kv_len is int64: expected a NumPy int32 array"),
    ({"block_table": ints([3.0, 1.0], dtype="float32")}, "Batch.block_table is float32: expected a NumPy int32 array"),
    ({"block_size": 0}, "Batch.block_size is 0: expected at least 1 slot per page"),
    ({"cu_q": ints(0)}, "Batch.cu_q is [0]: expected 2 rising counts from 0"),
    ({"cu_q": ints()}, "Batch.cu_q is []: expected 2 rising counts from 0"),
    ({"cu_q": ints(1, 2)}, "Batch.cu_q is [1, 2]: expected 2 rising counts from 0"),
    (
        {"cu_q": ints(0, 3, 2), "kv_len": ints(5, 5), "block_table": ints([0, 1], [2, 3])},
        "Batch.cu_q is [0, 3, 2]: expected 3 rising counts from 0",
    ),
    (
        {"block_table": ints([0, 1], [2, 3])},
        "Batch.block_table has shape [2, 2]: expected 1 rows of page ids, one per request",
    ),
    ({"block_table": ints(3)}, "Batch.block_table has shape [1]: expected 1 rows of page ids, one per request"),
    (
        {"kv_len": ints(1)},
        "request 0 has 2 query rows but kv_len 1: kv_len counts the step's own rows too (0 only for a padded request)",
    ),
    (
        {"cu_q": ints(0, 1, 1), "kv_len": ints(1, -1), "block_table": ints([0], [1])},
        "request 1 has 0 query rows but kv_len -1: kv_len counts the step's own rows too (0 only for a padded request)",
    ),
    ({"kv_len": ints(9)}, "request 0 needs 3 pages for kv_len 9: its block table has 2"),
    ({"block_table": np.zeros((1, 0), np.int32)}, "request 0 needs 2 pages for kv_len 5: its block table has 0"),
    (
        # A hole before the last page needed; the request blamed is the one that has it.
        {"cu_q": ints(0, 1, 2), "kv_len": ints(4, 5), "block_table": ints([7, -1, -1], [8, -1, 9])},
        "request 1 needs 2 pages for kv_len 5: its block table has 1",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_a_contradictory_batch_is_refused_in_one_sentence(change: dict[str, Any], message: str) -> None:
    Batch(**GOOD)
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Batch(**(GOOD | change))


@pytest.mark.parametrize(
    ("q_lens", "kv_lens", "tables", "message"),
    [
        (
            [1, 1],
            [1],
            [[0]],
            "Batch got 2 query lengths, 1 key lengths and 1 page lists: give one of each per request",
        ),
        ([1], [1], [], "Batch got 1 query lengths, 1 key lengths and 0 page lists: give one of each per request"),
        ([-1], [1], [[0]], "Batch.cu_q is [0, -1]: expected 2 rising counts from 0"),
        ([1], [9], [[0, 1]], "request 0 needs 3 pages for kv_len 9: its block table has 2"),
    ],
)
def test_build_refuses_lists_that_do_not_fit(q_lens: Any, kv_lens: Any, tables: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Batch.build(q_lens, kv_lens, tables, 4)


def test_a_batch_is_frozen_and_planned_once() -> None:
    batch = Batch(**GOOD)
    with pytest.raises(FrozenInstanceError):
        batch.block_size = 8  # type: ignore[misc]
    planned = batch.with_native("plan")
    assert (batch.native, planned.native) == (None, "plan")
    assert all(a is b for a, b in zip(planned.leaves(), batch.leaves()))


def test_leaves_come_in_the_order_of_the_fields() -> None:
    spec = PagesSpec((("c", 2), ("kp", 1)), "float32", n_blocks=3, block_size=4)
    assert spec.slots == 12
    pages = Pages(spec, {"kp": "second", "c": "first", "joint": "a backend's own"})
    assert pages.leaves() == ("first", "second")
    assert pages["joint"] == "a backend's own"
    assert Selection(SelectionSpec(1, 2), Rows("i", "n")).leaves() == ("i", "n")
    assert Selection(SelectionSpec(1, 2), "opaque").leaves() == ("opaque",)
    assert Weight(WeightSpec("linear", "w", (2, 3), "float32"), "packed").leaves() == ("packed",)
    assert len({spec, PagesSpec((("c", 2), ("kp", 1)), "float32", 3, 4)}) == 1  # static and hashable


# -- on a backend ----------------------------------------------------------------------------------------------------

CACHE = PagesSpec((("c", 2), ("kp", 1)), "float32", n_blocks=1, block_size=2)


def cache(value: float) -> dict[str, Any]:
    return {name: np.full((CACHE.slots, width), value, np.float32) for name, width in CACHE.fields}


def test_what_a_kernel_writes_to_its_operands_does_not_reach_the_logical_ones() -> None:
    weight = Weight(WeightSpec("linear", "w", (2, 3), "float32"), np.ones((2, 3), np.float32))
    pages = Pages(CACHE, cache(1))
    weight.place(Backend()).native[...] = 7
    pages.place(Backend())["c"][...] = 7
    assert (weight.native == 1).all()
    assert (pages["c"] == 1).all()


@pytest.mark.parametrize("backend", [Backend(), Reference()])
def test_an_operand_is_overwritten_in_place(backend: Backend) -> None:
    pages = backend.from_logical(CACHE, cache(1))
    before = dict(pages.native)
    assert backend.from_logical(CACHE, cache(2), pages) is pages
    for name in before:
        assert pages.native[name] is before[name], name
        assert (before[name] == 2).all()


def test_a_selections_row_without_content_points_nowhere() -> None:
    selection = Selection(SelectionSpec(2, 2), Rows(ints([4, 5], [6, -1]), ints(2, 1)))
    moved = selection.with_rows(ints(-1, 1, 0))
    assert moved.spec == SelectionSpec(3, 2)
    assert moved.native.indices.tolist() == [[-1, -1], [6, -1], [4, 5]]
    assert moved.native.length.tolist() == [0, 1, 2]


def test_pages_are_changed_where_one_field_is() -> None:
    pages = Pages(CACHE, cache(1))
    changed = pages.mapped(lambda array: array + 1 if array is pages["kp"] else array)
    assert (changed["kp"] == 2).all() and changed["c"] is pages["c"]
    assert pages.mapped(lambda array: array) is pages


def test_a_batch_carried_elsewhere_is_planned_there() -> None:
    class Plans(Backend):
        def plan(self, batch: Batch) -> Batch:
            return batch.with_native(batch.native or "planned here")

    foreign = Batch(**GOOD, native="planned elsewhere")
    assert foreign.carry(Backend(), Plans()).native == "planned here"
    assert foreign.carry(Plans(), Backend()).native is None


def test_the_kind_of_a_spec() -> None:
    assert kind_of(CACHE) is Pages
    assert kind_of(SelectionSpec(1, 2)) is Selection
    with pytest.raises(UsageError, match=r"^dict describes no kind of operand: expected one of WeightSpec, PagesSpec, "):
        kind_of({"shape": (1,)})
