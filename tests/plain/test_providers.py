"""Several kernels of one chip for an op: mixins, claims by class of shapes, and a test of each of them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay, run
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
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
    one_of,
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


def test_a_call_runs_on_the_kernel_of_its_weight_dtype_and_attributes() -> None:
    """Calls that differ in nothing but that, one after the other."""

    def kernel(provider: str, **claims: Any) -> Any:
        stated = {key: claims.pop(key) for key in ("dtypes", "tie") if key in claims}
        mark = limits(provider=provider, **stated, **claims)
        return type(provider, (), {"linear": mark(lambda self, x, w, *, out="x": product(provider, x, w, out))})

    def called(chip: Any, *calls: tuple[int, str, str]) -> list[str]:
        specs = [CallSpec({"T": 2, "K": 4, "N": n}, {"x": x, "w": x}, {"out": out}, {"w": "none"}) for n, x, out in calls]
        ops = bind(backend=chip(), profile={"linear": specs}, overrides={})
        CALLED.clear()
        for n, x, out in calls:
            one = narrow(np.ones((n, 4)), x)
            ops.linear(one[:2], ops.prepare(WeightSpec("linear", "w", (n, 4), x), one.__getitem__), out=out)
        return [provider for provider, _ in CALLED]

    wide, slim = kernel("wide", N=multiple_of(128)), kernel("slim", N=at_most(100), tie="any")
    short, long = kernel("short", dtypes={"x": one_of("bfloat16")}), kernel("long", dtypes={"x": one_of("float32")})
    same, float_out = kernel("same", out=one_of("x")), kernel("float_out", out=one_of("float32"))
    Sizes = type("Sizes", (wide, slim, Reference), {"name": "sizes"})
    Dtypes = type("Dtypes", (short, long, Reference), {"name": "dtypes"})
    Outs = type("Outs", (same, float_out, Reference), {"name": "outs"})
    assert called(Sizes, (128, "float32", "x"), (7, "float32", "x")) == ["wide", "slim"]
    assert called(Dtypes, (8, "bfloat16", "x"), (8, "float32", "x")) == ["short", "long"]
    assert called(Outs, (8, "bfloat16", "x"), (8, "bfloat16", "float32")) == ["same", "float_out"]
    profile = {"linear": [spec(2), replace(spec(2), dims={"T": 2, "K": 4, "N": 128})]}
    ops = bind(backend=Sizes(), profile=profile, overrides={})
    assert ops.choices["linear"].tie == "any"
    one = np.ones((99, 4), np.float32)
    with pytest.raises(NotClaimed, match=r"^linear on sizes is bound for other shapes: "):
        ops.linear(one[:2], Weight(WeightSpec("linear", "w", (99, 4), "float32"), one), out="x")


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


def test_calls_under_a_scheme_that_no_own_kernel_takes_are_the_bases() -> None:
    """One kernel would else be chosen for all that a model calls, and a chip's own for one scheme never."""
    claim = limits(provider="coded", schemes="fp8_block", N=at_most(9))
    coded = type("Coded", (), {"linear": claim(lambda self, x, w, *, out="x": x)})
    both = type("Both", (coded, Reference), {"name": "both"})
    held = replace(DECODE, schemes={"w": "fp8_block"})
    profiles = [{"linear": [DECODE, held]}, {"linear": [held]}]
    choices = [bind(backend=both(), profile=profile, overrides={}).choices["linear"] for profile in profiles]
    assert [(c.status, c.owner, c.provider) for c in choices] == [("inherited", "reference", ""), ("own", "both", "coded")]
    assert choices[0].reason == "coded where w is fp8_block"
    wide = replace(held, dims={**held.dims, "N": 10})
    choice = bind(backend=both(), profile={"linear": [DECODE, held, wide]}, overrides={}).choices["linear"]
    assert (choice.status, choice.owner) == ("inherited", "reference")


def test_a_provider_can_be_asked_for() -> None:
    ops = bind(backend=Chip(), profile={"linear": [spec(4)]}, overrides={"linear": "via=many.gemm"})
    assert ops.choices["linear"].provider == "many.gemm"
    with pytest.raises(NotClaimed, match=r"^chip has no kernel for linear via 'cublas': its providers are few.gemv, many"):
        bind(backend=Chip(), overrides={"linear": "via=cublas"})
    with pytest.raises(NotClaimed, match=r"chip does not claim linear \(many.gemm: T = 1, the kernel takes at least 2\)"):
        bind(backend=Chip(), profile={"linear": [spec(1)]}, overrides={"linear": "via=many.gemm"}, fallback="error")


class Third:
    @limits(provider="third.gemm", T=at_least(2))
    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        return product("third", x, w, out)


# -- in conformance ----------------------------------------------------------------------------------------------------


def test_every_provider_that_claims_a_case_is_tested() -> None:
    class TwiceAndOne:
        """Wrong for zeros and for numbers of any size."""

        @limits(provider="many.gemm", T=at_least(2))
        def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
            return product("many", x, w, out) * 2 + 1

    class Wrong(FewRows, TwiceAndOne, Reference):
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


def test_three_providers_are_each_tested_once_where_they_take_a_case() -> None:
    report = run(type("Three", (FewRows, ManyRows, Third, Reference), {"name": "three"})(), ["linear"])
    for token in {r.token for r in report.results if not any(part in r.token for part in (",via=", ",fault=", "%"))}:
        rows = Case.from_token(token).dims[0][1]
        able = {p for p, takes in (("few.gemv", rows <= 8), ("many.gemm", rows >= 2), ("third.gemm", rows >= 2)) if takes}
        ran = [r.provider for r in report.results if Case.from_token(r.token).stream == token]
        assert sorted(ran) == sorted(able)
    assert report.levels["linear"].level == "bring-up"


def test_an_op_one_of_whose_providers_fails_has_no_level() -> None:
    class Off:
        @limits(provider="third.gemm", T=at_least(2))
        def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
            return product("third", x, w, out) + 1

    reached = run(type("Wrong", (FewRows, ManyRows, Off, Reference), {"name": "wrong"})(), ["linear"]).levels["linear"]
    assert (reached.level, reached.why) == ("none", "failed") and reached.passed == reached.required


def test_rows_among_others_are_compared_on_one_kernel() -> None:
    """Eight rows and one poisoned are another kernel's call, which may compute other bits."""
    few = type("Few", (), {})
    kernel = limits(provider="few.gemv", T=at_most(7))(lambda self, x, w, *, out="x": product("few", x, w, out))
    kernel.batch_invariant = True
    few.linear = kernel  # type: ignore[attr-defined]

    class Sums:
        @limits(provider="many.gemm", T=at_least(8))
        def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
            wide, columns = widen(x), widen(w.native).T
            y = sum(wide[:, i : i + 1] * columns[i] for i in range(x.shape[1]))
            return narrow(y, dtype(x) if out == "x" else out)

    report = run(type("Both", (few, Sums, Reference), {"name": "both"})(), ["linear"], dtypes=["float16"])
    assert [r.message for r in report.results if r.failed] == []


def test_a_token_of_a_provider_has_the_same_values() -> None:
    case = Case.from_token("linear,T=3,K=5,N=2,x:bf16,0")
    through = Case.from_token("linear,T=3,K=5,N=2,x:bf16,via=many.gemm,0")
    assert through == case.through("many.gemm") and through.stream == case.token
    a, b = build(case).operands, build(through).operands
    assert a["x"].tobytes() == b["x"].tobytes() and a["w"].native.tobytes() == b["w"].native.tobytes()


def test_providers_of_one_op_have_names_of_their_own() -> None:
    nameless = type("Nameless", (Reference,), {"name": "nameless", "add": lambda self, a, b: a})
    twice = type("Twice", (type("Mixin", (), {"add": lambda self, a, b: a}), nameless), {})
    assert Chip().alternatives() == {"linear": ("few.gemv", "many.gemm")}
    for wrong in ("gemm<4, 2>", " gemm", "gemm\n"):
        chip = type("Chip", (Reference,), {"name": "chip", "add": limits(provider=wrong)(lambda self, a, b: a)})
        with pytest.raises(UsageError, match=f"^chip names a provider {re.escape(repr(wrong))} for add: write it without"):
            chip()
    with pytest.raises(UsageError, match=r"^nameless has 2 kernels for add: give each a provider of its own$"):
        twice()


# -- kernels for one scheme of a weight ------------------------------------------------------------------------------


class OfCodes:
    """A library that takes int8 codes alone, [in, out]."""

    def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
        made = Reference.prepare(self, spec, read, into)  # type: ignore[arg-type]
        return made if not spec.quantised else Weight(spec, {**made.native, "codes": made.native["codes"].T})

    @limits(provider="few.bits", schemes="int8_channel")
    def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any:
        CALLED.append(("bits", len(x)))
        return narrow(widen(x) @ (w.native["codes"] * w.native["scale"][:, 0]), dtype(x))


class Coding(OfCodes, Reference):
    name = "coding"


CODES = replace(spec(2), schemes={"w": "int8_channel"})


def test_each_weight_goes_to_the_kernel_of_its_scheme_and_is_packed_for_it() -> None:
    ops = bind(backend=Coding(), profile={"linear": [spec(2), CODES]}, overrides={})
    choice = ops.choices["linear"]
    assert (choice.status, choice.owner, choice.reason) == ("inherited", "reference", "few.bits where w is int8_channel")
    plain = ops.prepare(WeightSpec("linear", "w", (3, 4), "float32"), np.ones((3, 4), np.float32).__getitem__)
    parts = {"codes": np.full((3, 4), 2, np.int8), "scale": np.ones((3, 1), np.float32)}
    coded = ops.prepare(WeightSpec("linear", "w", (3, 4), "float32", "int8_channel"), lambda index: parts)
    assert plain.native.shape == (3, 4) and coded.native["codes"].shape == (4, 3)
    CALLED.clear()
    x = np.ones((2, 4), np.float32)
    assert ops.linear(x, plain, out="x").tolist() == [[4.0] * 3] * 2 and CALLED == []
    assert ops.linear(x, coded, out="x").tolist() == [[8.0] * 3] * 2 and CALLED == [("bits", 2)]


def test_one_scheme_alone_needs_no_sharing() -> None:
    def choice(*specs: CallSpec) -> tuple[str, str]:
        made = bind(backend=Coding(), profile={"linear": specs}, overrides={}).choices["linear"]
        return made.status, made.provider

    assert choice(CODES) == ("own", "few.bits") and choice(spec(2)) == ("inherited", "")
    assert choice(spec(2), replace(CODES, schemes={"w": "int4_g32"})) == ("inherited", "")


def test_where_no_calls_are_known_a_kernel_of_codes_alone_is_not_taken() -> None:
    choice = bind(backend=Coding(), overrides={}).choices["linear"]
    assert choice.status == "inherited"
    assert choice.reason == "coding: it takes calls under one of int8_channel alone, and no such call is known"
