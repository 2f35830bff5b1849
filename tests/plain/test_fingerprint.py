"""What a kernel is handed keeps what it holds: the suite sees a changed leaf in every form that a backend may choose."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal.backends.reference.backend import Reference
from porthal.conformance import Report
from porthal.conformance.cases.case import Case
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.execution.fingerprint import WHOLE, Fingerprint
from porthal.conformance.runner.check import check
from porthal.hal import Selection, Weight, contracts, create

TOPK = "topk,T=7,k=7,batch=mixed,block_size=64,0"
LINEAR = "linear,T=7,K=96,N=7,x:fp32,0"
SELECT = "select_rows,T=7,k=16,M=4,0"
MLA = "sparse_mla,T=3,N=1,C=32,R=8,k=16,scale=0.25,q_latent:fp32,batch=mixed,block_size=64,0"


@dataclass
class Packed:
    """A native form with everything that can be walked, a memo among it."""

    rows: Any
    blocks: list[Any]
    scale: float = 1.0
    memo: dict[str, Any] = field(default_factory=dict)
    table: Any = None


class Pair(NamedTuple):
    indices: Any
    length: Any
    more: dict[str, Any]


def truth(op: str, *operands: Any, **attrs: Any) -> Any:
    return create("reference").derive(contracts()[op])(*operands, **attrs)


class Packing(Reference):
    """Packs weights and selections in forms of its own, plans hold a table, and pages an entry beside the fields."""

    name = "packing"

    def plan(self, batch: Any) -> Any:
        return batch.with_native(Packed(batch.kv_len.copy(), [batch.block_table.copy()]))

    def prepare(self, spec: Any, read: Any, into: Any = None) -> Any:
        w = np.ascontiguousarray(read(slice(None)))
        return Weight(spec, Packed(w, [w[:1].copy()]))

    def from_logical(self, spec: Any, arrays: Any, into: Any = None) -> Any:
        made = super().from_logical(spec, arrays, into)
        if into is not None:  # has all the rest
            return made
        if isinstance(made, Selection):
            return Selection(spec, Pair(*made.native, {"order": np.arange(3)}))
        made.native["scales"] = np.ones(3, np.float32)
        return made

    def to_logical(self, operand: Any) -> Any:
        if isinstance(operand, Weight):
            return {"w": operand.native.rows}
        return super().to_logical(operand)

    def rows(self, selection: Any) -> Any:
        return super().rows(replace(selection, native=selection.native[:2]))

    def spoil(self, operand: Any) -> None:
        """What a kernel of a subclass does to its operands."""

    def linear(self, x: Any, w: Any, *, out: str = "x") -> Any:
        y = truth("linear", x, replace(w, native=w.native.rows), out=out)
        self.spoil(w)
        return y

    def topk(self, scores: Any, batch: Any, *, k: int) -> Any:
        sel = truth("topk", scores, batch, k=k)
        self.spoil(batch)
        return sel

    def select_rows(self, sel: Any, rows: Any) -> Any:
        found = truth("select_rows", replace(sel, native=self.rows(sel)), rows)
        self.spoil(sel)
        return found

    def sparse_mla(self, q_latent: Any, q_rope: Any, kv: Any, sel: Any, batch: Any, *, scale: float) -> Any:
        o = truth("sparse_mla", q_latent, q_rope, kv, replace(sel, native=self.rows(sel)), batch, scale=scale)
        self.spoil(kv)
        return o


def verdict(token: str, spoil: Any) -> tuple[str, str]:
    made = type("Spoiling", (Packing,), {"name": "spoiling", "spoil": lambda self, operand: spoil(operand)})()
    result = check(Case.from_token(token), Bindings(made))
    return result.verdict, result.message


def added(native: Any) -> None:
    native.memo["table"] = np.ones(3)
    native.table = np.zeros(2)
    native.late = 3


def test_a_plan_may_gain_memos_and_an_untouched_operand_passes() -> None:
    for token in (LINEAR, TOPK, SELECT, MLA):
        assert verdict(token, lambda operand: None) == ("PASS", "")
    assert verdict(TOPK, lambda batch: added(batch.native)) == ("PASS", "")
    assert verdict(LINEAR, lambda w: added(w.native)) == ("PASS", "")


def put(target: Any, at: Any, value: Any) -> Any:
    target[at] = value


@pytest.mark.parametrize(
    ("token", "spoil", "said"),
    [
        (TOPK, lambda b: put(b.native.rows, 0, 9), "batch batch.native.rows changed at [0]"),
        (TOPK, lambda b: put(b.native.blocks[0], (0, 0), 9), "batch batch.native.blocks[0] changed at [0, 0]"),
        (TOPK, lambda b: put(b.visible, 1, 0), "batch batch.visible changed at [1]"),
        (TOPK, lambda b: put(b.kv_len, 0, 0), "batch batch.kv_len changed at [0]"),
        (TOPK, lambda b: setattr(b.native, "scale", 2.0), "batch batch.native.scale is float 2.0, it was float 1.0"),
        (TOPK, lambda b: b.native.blocks.append(1), "batch batch.native.blocks has 2 entries, it had 1"),
        (TOPK, lambda b: b.native.__dict__.pop("rows"), "batch batch.native.rows is gone"),
        (TOPK, lambda b: setattr(b.native, "rows", b.native.rows[:2]),
         "batch batch.native.rows is int32 [2], it was int32 [4]"),
        (LINEAR, lambda w: put(w.native.blocks[0], (0, 3), 9), "weight w.blocks[0] changed at [0, 3]"),
        (LINEAR, lambda w: put(w.native.rows, (2, 3), 9), "weight w.rows changed at [2, 3]"),
        (SELECT, lambda s: put(s.native.indices, (0, 1), 9), "selection sel.indices changed at [0, 1]"),
        (SELECT, lambda s: s.native.more.update(order=np.arange(1, 4)), "selection sel.more['order'] changed at [0]"),
        (MLA, lambda kv: put(kv.native["scales"], 1, 9), "pages kv['scales'] changed at [1]"),
        (MLA, lambda kv: put(kv.native["c"], (0, 0), 9), "pages kv.c changed at [0, 0]"),
    ],
)  # fmt: skip
def test_a_changed_leaf_is_a_mutation(token: str, spoil: Any, said: str) -> None:
    assert verdict(token, spoil) == ("FAIL_MUTATED", said)


def test_a_kernel_gets_no_array_of_the_suites() -> None:
    """What it does to a batch does not reach the reference, nor the next call."""
    seen = []

    class Chip(Reference):
        name = "chip"

        def topk(self, scores: Any, batch: Any, *, k: int) -> Any:
            seen.append(batch.kv_len.copy())
            sel = truth("topk", scores, batch, k=k)
            batch.kv_len[:] = 0
            return sel

    check(Case.from_token(TOPK), Bindings(Chip()))
    assert len(seen) > 2 and all((lengths > 0).all() for lengths in seen)


def test_what_cannot_be_read_is_said() -> None:
    class Sealed:
        __slots__ = ("w",)

    class Opaque(Packing):
        name = "opaque"
        linear = Packing.linear

        def prepare(self, spec: Any, read: Any, into: Any = None) -> Any:
            made = super().prepare(spec, read, into)
            made.native.memo["sealed"] = Sealed()
            return made

    result = check(Case.from_token(LINEAR), Bindings(Opaque()))
    assert (result.verdict, result.note) == ("PASS", "not read back: Sealed in weight w")
    report = Report.of(Opaque(), "bring-up", [result])
    assert report.unread == [
        "1 cases of linear with what is not read back beyond its logical form, so that nobody knows whether it changed: "
        "Sealed in weight w"
    ]
    assert report.unread[0] in report.html()


@given(st.integers(0, 2 * WHOLE), st.booleans())
def test_large_arrays_are_compared_by_hash(at: int, changed: bool) -> None:
    x = np.zeros(2 * WHOLE + 1, np.uint8)
    before = Fingerprint(create("reference"), (x,), "w")
    x[at] = changed
    assert before.change(Fingerprint(create("reference"), (x,), "w")) == ("w[0] changed" if changed else "")


def test_a_cycle_ends() -> None:
    held: dict[str, Any] = {"x": np.ones(2)}
    held["self"] = held
    found = Fingerprint(create("reference"), held, "plan")
    assert list(found.leaves) == ["plan['x']"] and not found.unread
