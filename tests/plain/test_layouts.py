"""Block tables longer than a request needs, and operands laid out as other kernels hand them over."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.legal import LAYOUTS
from porthal.conformance.cases.plan import cases
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.level import LEVELS
from porthal.conformance.runner.check import check
from porthal.hal import Pages, UsageError, contracts, create

BATCHED = [op for op, contract in contracts().items() if contract.signature.of_kind("Batch")]
WIDE = [op for op, contract in contracts().items() if any(len(o.dims) == 3 for o in contract.signature.of_kind("array"))]


def backend(**members: Any) -> Any:
    return type("Made", (Reference,), {"name": "made", **members})()


def truth(op: str, *operands: Any, **attrs: Any) -> Any:
    return create("reference").derive(contracts()[op])(*operands, **attrs)


def planned(op: str, level: str = "bring-up", **fields: str) -> list[Case]:
    found = [c for c in cases(contracts()[op], level) if all(getattr(c, n) == v for n, v in fields.items())]
    assert found, op
    return found


@pytest.mark.parametrize("op", BATCHED)
def test_every_request_holds_more_pages_than_it_needs(op: str) -> None:
    """In every level's plan; what only drafts have written is NaN where a call does not write."""
    assert all(planned(op, level, batch="drafts") for level in LEVELS)
    token = re.sub(r",view=\w+|,\w+%\w+", "", planned(op, batch="drafts")[0].token)
    inputs = build(Case.from_token(re.sub(r"block_size=\d+", "block_size=64", re.sub(r"\bT=\d+", "T=9", token))))
    batch = inputs.batch
    assert batch is not None and (batch.kv_len == 0).any() and (batch.kv_len % batch.block_size > 0).any()
    need, held = -(-batch.kv_len // batch.block_size), (batch.block_table >= 0).sum(1)
    assert (held > need).all() and len(set(held - need)) > 1
    assert ((batch.kv_len % batch.block_size == 0) & (batch.kv_len > 0)).any()
    for value in inputs.operands.values():
        if isinstance(value, Pages) and not contracts()[op].signature.mutated:
            left = [p for r in range(batch.R) for p in batch.block_table[r, need[r] : held[r]]]
            field = next(iter(value.native.values())).reshape(value.spec.n_blocks, -1)
            assert left and np.isnan(field[left].astype(np.float32)).all()


def test_a_kernel_that_reads_its_whole_table_is_caught() -> None:
    def sparse_mla(self: Any, q_latent: Any, q_rope: Any, kv: Pages, sel: Any, batch: Any, *, scale: float) -> Any:
        o = truth("sparse_mla", q_latent, q_rope, kv, sel, batch, scale=scale)
        pages = kv.native["c"].reshape(kv.spec.n_blocks, kv.spec.block_size, -1)
        read = pages[batch.block_table[batch.block_table >= 0], 0].astype(np.float32)
        return o if np.isfinite(read).all() else np.zeros_like(o)

    made = Bindings(backend(sparse_mla=sparse_mla))
    token = "sparse_mla,T=5,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch={},block_size=64,0"
    plan = [Case.from_token(token.format(batch)) for batch in ("decode", "drafts")]
    assert [check(case, made).verdict for case in plan] == ["PASS", "FAIL_VALUE"]


@pytest.mark.parametrize("op", WIDE)
def test_every_op_with_three_axes_meets_head_major_operands_and_slices(op: str) -> None:
    for view in LAYOUTS[:2]:
        for case in planned(op, view=view):
            assert check(case, Bindings(create("reference"))).verdict == "PASS"


SEEN: dict[str, Any] = {}


def strides(op: str, view: str) -> list[Any]:
    """What a kernel of op is handed first: the strides of its first two arrays in elements, and how far they are apart."""
    first = [o.name for o in contracts()[op].signature.of_kind("array")][:2]

    def kernel(self: Any, *operands: Any, **attrs: Any) -> Any:
        named, _ = contracts()[op].arrange(operands, attrs)
        a, b = (named[name] for name in first)
        at = [x.__array_interface__["data"][0] for x in (a, b)]
        SEEN.setdefault(view, [[s // a.itemsize for s in a.strides], b.shape, (at[1] - at[0]) // a.itemsize])
        return truth(op, *operands, **attrs)

    SEEN.clear()
    case = Case.from_token(f"{op},T=7,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,view={view},0")
    assert check(case, Bindings(backend(**{op: kernel}))).verdict == "PASS"
    return list(SEEN[view])


def test_layouts_are_what_they_are_called() -> None:
    heads, _, _ = strides("sparse_mla", "heads")
    assert heads == [512, 7 * 512, 1]
    slices, _, _ = strides("sparse_mla", "slices")
    assert slices == [(8 + 3) * 512, 512, 1]
    joint, _, apart = strides("sparse_mla", "joint")
    assert (joint, apart) == ([8 * 576, 576, 1], 512)


def test_a_write_into_the_neighbour_is_seen() -> None:
    def add(self: Any, a: Any, b: Any) -> Any:
        y = truth("add", a, b)
        if a.base is not None and a.base is b.base:
            a.base[0, a.shape[1]] = 7
        return y

    result = check(Case.from_token("add,T=7,H=96,a:fp32,view=joint,0"), Bindings(backend(add=add)))
    assert (result.verdict, result.message) == ("FAIL_MUTATED", "input a beside b changed at [0, 96]")


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("rms_norm,T=7,H=96,x:fp32,view=heads,0", "view heads needs an array of 3 axes"),
        ("linear,T=7,K=96,N=7,x:fp32,view=slices,0", "view slices needs an array of 3 axes"),
        ("moe_permute,T=7,H=96,k=8,E=16,x:fp16,view=joint,0", "view joint needs two arrays whose rows can lie side by side"),
    ],
)
def test_a_layout_that_an_op_cannot_have_is_refused(token: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"{said}$"):
        Case.from_token(token)
