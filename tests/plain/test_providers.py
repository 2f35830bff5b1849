"""Several kernels of one chip for an op: mixins, claims by class of shapes, and a test of each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay, run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.inputs import build
from porthal.conformance.execution.bindings import Bindings
from porthal.hal import (
    CallSpec,
    NotClaimed,
    UsageError,
    Weight,
    WeightSpec,
    at_least,
    at_most,
    bind,
    contracts,
    dtype,
    limits,
    multiple_of,
    narrow,
    widen,
)

CALLED: list[tuple[str, int]] = []  # provider and rows


def product(provider: str, x: Any, w: Any, out: str) -> Any:
    CALLED.append((provider, len(x)))
    return narrow(widen(x) @ widen(w.native).T, dtype(x) if out == "x" else out)


class FewRows:
    """A library for decoding: at most 8 rows."""

    @limits(provider="few.gemv", T=at_most(8))
    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        return product("few", x, w, out)


class ManyRows:
    """A library for prefill: from 2 rows on."""

    @limits(provider="many.gemm", T=at_least(2))
    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        return product("many", x, w, out)


class Packing(ManyRows):
    """The same with a weight format of its own."""

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        return Reference.prepare(self, spec, read, into)  # type: ignore[arg-type]


class Chip(FewRows, ManyRows, Reference):
    name = "chip"


def spec(rows: Any) -> CallSpec:
    return CallSpec({"T": rows, "K": 4, "N": 3}, {"x": "float32", "w": "float32"}, {"out": "x"}, {"w": "none"})


DECODE, PREFILL = spec((1, 8)), spec((9, 4096))


def test_what_stands_above_the_first_backend_is_the_chips_own() -> None:
    kernels = [(k.owner, k.provider) for k in Chip().candidates(contracts()["linear"])]
    assert kernels == [("chip", "few.gemv"), ("chip", "many.gemm"), ("reference", "")]
    assert bind(backend=Chip(), overrides={}).choices["linear"].status == "own"


BOTH = "few.gemv or many.gemm"
ROWS = [(1, "few.gemv"), ((1, 8), "few.gemv"), ((9, 99), "many.gemm"), ((2, 99), BOTH), ((1, 4096), BOTH)]


@pytest.mark.parametrize(("rows", "provider"), ROWS)
def test_each_shape_goes_to_the_first_that_takes_it(rows: Any, provider: str) -> None:
    choice = bind(backend=Chip(), profile={"linear": [spec(rows)]}, overrides={}).choices["linear"]
    assert (choice.status, choice.provider) == ("own", provider)


@pytest.mark.parametrize("profile", [[DECODE, PREFILL], [spec((1, 4096))]])
def test_a_call_runs_on_the_kernel_of_its_rows(profile: list[CallSpec]) -> None:
    ops = bind(backend=Chip(), profile={"linear": profile}, overrides={})
    assert ops.choices["linear"].reason == "each shape goes to the first that takes it"
    weight = ops.prepare(WeightSpec("linear", "w", (3, 4), "float32"), np.ones((3, 4), np.float32).__getitem__)
    CALLED.clear()
    for rows in (1, 9, 8, 9, 1):
        assert ops.linear(np.ones((rows, 4), np.float32), weight, out="x").tolist() == [[4.0] * 3] * rows
    assert CALLED == [("few", 1), ("many", 9), ("few", 8), ("many", 9), ("few", 1)]
    with pytest.raises(NotClaimed, match=r"^linear on chip is bound for other shapes: "):
        ops.linear(np.ones((5000, 4), np.float32), weight, out="x")


def test_kernels_that_pack_a_weight_differently_are_not_combined() -> None:
    class Mixed(FewRows, Packing, Reference):
        name = "mixed"

    choice = bind(backend=Mixed(), profile={"linear": [DECODE, PREFILL]}, overrides={}).choices["linear"]
    assert (choice.status, choice.owner) == ("inherited", "reference")
    refused = "few.gemv: T = 9, the kernel takes at most 8; many.gemm: T = 1, the kernel takes at least 2"
    assert choice.reason.startswith(refused)


def test_rows_that_no_kernel_takes_or_that_alternate_leave_the_op_to_its_base() -> None:
    even = type("Even", (), {"linear": limits(provider="even", T=multiple_of(2))(lambda self, x, w, *, out="x": x)})
    odd = type("Odd", (FewRows, even, Reference), {"name": "odd"})
    for rows in ((1, 9), (1, 4096)):
        choice = bind(backend=odd(), profile={"linear": [spec(rows)]}, overrides={}).choices["linear"]
        assert choice.status == "inherited"
    choice = bind(backend=odd(), profile={"linear": [spec((1, 8))]}, overrides={}).choices["linear"]
    assert choice.provider == "few.gemv"


def test_a_provider_can_be_asked_for() -> None:
    ops = bind(backend=Chip(), profile={"linear": [spec(4)]}, overrides={"linear": "via=many.gemm"})
    assert ops.choices["linear"].provider == "many.gemm"
    with pytest.raises(NotClaimed, match=r"^chip has no kernel for linear via 'cublas': its providers are few.gemv, many"):
        bind(backend=Chip(), overrides={"linear": "via=cublas"})
    with pytest.raises(NotClaimed, match=r"chip does not claim linear \(many.gemm: T = 1, the kernel takes at least 2\)"):
        bind(backend=Chip(), profile={"linear": [spec(1)]}, overrides={"linear": "via=many.gemm"}, fallback="error")


# -- in conformance ----------------------------------------------------------------------------------------------------


def test_every_provider_that_claims_a_case_is_tested() -> None:
    class OffByOne:
        @limits(provider="many.gemm", T=at_least(2))
        def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
            return product("many", x, w, out) + 1

    class Wrong(FewRows, OffByOne, Reference):
        name = "wrong"

    backend = Wrong()
    report = run(backend, ["linear"])
    plain = [r for r in report.results if ",via=" not in r.token]
    second = [r for r in report.results if ",via=many.gemm," in r.token]
    assert len(plain) + len(second) == len(report.results) and all(r.verdict != "UNCLAIMED" for r in report.results)
    assert {r.verdict for r in plain if r.provider == "few.gemv"} == {"PASS"}
    assert {(r.provider, r.verdict) for r in second} == {("many.gemm", "FAIL_VALUE")}
    assert len({(r.token.replace(",via=many.gemm", ""), r.provider) for r in report.results}) == len(report.results)
    small = next(r for r in second if r.failed and "T=2," in r.token)
    assert replay(small.token, backend).message == small.message


def test_a_token_of_a_provider_has_the_same_values() -> None:
    case = Case.from_token("linear,T=3,K=5,N=2,x:bf16,0")
    through = Case.from_token("linear,T=3,K=5,N=2,x:bf16,via=many.gemm,0")
    assert through == case.through("many.gemm") and through.stream == case.token
    a, b = build(case).operands, build(through).operands
    assert a["x"].tobytes() == b["x"].tobytes() and a["w"].native.tobytes() == b["w"].native.tobytes()


def test_providers_of_one_op_have_names_of_their_own() -> None:
    nameless = type("Nameless", (Reference,), {"name": "nameless", "add": lambda self, a, b: a})
    twice = type("Twice", (type("Mixin", (), {"add": lambda self, a, b: a}), nameless), {})
    assert Bindings(Chip()).providers() == {"linear": ("few.gemv", "many.gemm")}
    with pytest.raises(UsageError, match=r"^nameless has 2 kernels for add: give each a provider of its own$"):
        Bindings(twice()).providers()
