"""Choosing kernels: own, inherited, composed, fallback; claims, policy, wraps and the checked fronts."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import porthal
from porthal.backends.reference.backend import Reference
from porthal.hal import (
    Backend,
    CallSpec,
    NotClaimed,
    Recorder,
    UsageError,
    Weight,
    WeightSpec,
    at_most,
    bind,
    contracts,
    create,
    limits,
    multiple_of,
    one_of,
)


class OnSmall(Reference):
    """A chip with two kernels: narrow rms_norm, and a topk whose tie order is its own."""

    name = "small"

    @limits(provider="small.norm", dtypes={"x": one_of("float32")}, H=at_most(64), T=multiple_of(1, at_most=8))
    def rms_norm(self, x: Any, weight: Any, *, eps: float = 1e-5) -> Any:
        return np.full_like(x, 7)

    @limits(provider="small.topk", tie="any")
    def topk(self, scores: Any, batch: Any, *, k: int) -> Any:
        return "small topk"


class Bare(Backend):
    """Claims nothing and inherits nothing."""

    name = "bare"


def spec(**dims: int | tuple[int, int]) -> CallSpec:
    return CallSpec(dims, {"x": "float32", "weight": "float32"}, {"eps": 1e-5}, {})


def test_a_bound_function_is_the_backends_own() -> None:
    backend = create("reference")
    ops = bind(backend=OnSmall())
    assert ops.rms_norm == ops.backend.rms_norm  # nothing between the model and the kernel
    assert bind(backend=backend).prepare is not None


def test_kernels_are_chosen_when_they_are_first_asked_for() -> None:
    asked: list[str] = []

    class Asked(OnSmall):
        def candidates(self, contract: Any) -> Any:
            asked.append(contract.name)
            return super().candidates(contract)

    ops = bind(backend=Asked(), profile={"rms_norm": [spec(T=1, H=8)]}, overrides={"add": "reference"})
    assert asked == ["rms_norm"]  # of add, the reference is asked
    assert ops.topk is ops.topk and ops.choices["topk"].status == "own" and asked == ["rms_norm", "topk"]
    assert list(ops.choices) == list(contracts()) and len(ops.choices) == len(contracts())
    assert sum(ops.counts().values()) == len(contracts()) and sorted(asked) == sorted(contracts().keys() - {"add"})
    with pytest.raises(AttributeError, match="has no op or service 'tokp'"):
        _ = ops.tokp


def test_own_inherited_and_composed_are_told_apart() -> None:
    ops = bind(backend=OnSmall())
    status = {op: c.status for op, c in ops.choices.items()}
    assert [op for op, s in status.items() if s == "own"] == ["rms_norm", "topk"]
    assert {op for op, s in status.items() if s == "composed"} == {n for n, c in contracts().items() if c.decomposition}
    assert set(status.values()) == {"own", "inherited", "composed"}
    assert ops.choices["topk"].tie == "any"
    assert ops.choices["rms_norm"].provider == "small.norm"
    assert ops.counts()["own"] == 2
    assert ops.summary().startswith("2 own, ")


def test_none_declines_what_the_base_would_give() -> None:
    class Fused(Backend):
        name = "fused"

        def moe_experts(self, *operands: Any, **attrs: Any) -> Any:
            return "fused"

    class Split(Fused):
        name = "split"
        moe_experts = None  # type: ignore[assignment]

    assert bind(backend=Fused()).choices["moe_experts"].status == "own"
    assert bind(backend=Split()).choices["moe_experts"].status == "composed"


def test_a_fused_kernel_of_a_base_is_inherited() -> None:
    class Fused(Backend):
        name = "fused"

        def moe_experts(self, *operands: Any, **attrs: Any) -> Any:
            return "fused"

    class Plugin(Fused):
        name = "plugin"

    ops = bind(backend=Plugin(), overrides={})
    assert (ops.choices["moe_experts"].status, ops.choices["moe_experts"].owner) == ("inherited", "fused")
    assert ops.moe_experts() == "fused"


def test_a_provider_of_a_base_is_not_the_backends() -> None:
    class Smaller(OnSmall):
        name = "smaller"

    assert bind(backend=OnSmall(), overrides={"rms_norm": "via=small.norm"}).choices["rms_norm"].status == "own"
    with pytest.raises(NotClaimed, match=r"^smaller has no kernel for rms_norm via 'small\.norm'"):
        bind(backend=Smaller(), overrides={"rms_norm": "via=small.norm"})


def test_a_provider_asked_for_that_refuses_is_not_replaced_by_the_composition() -> None:
    class Narrow(Reference):
        name = "narrow"

        @limits(provider="narrow.fused", T=at_most(1))
        def moe_experts(self, *operands: Any, **attrs: Any) -> Any:
            return "fused"

    calls = {"moe_experts": [CallSpec({"T": 2}, {}, {}, {})]}
    assert bind(backend=Narrow(), profile=calls, overrides={}).choices["moe_experts"].status == "composed"
    with pytest.raises(NotClaimed, match=r"narrow does not claim moe_experts .*T = 2, the kernel takes at most 1"):
        bind(backend=Narrow(), profile=calls, overrides={"moe_experts": "via=narrow.fused"}, fallback="error")


def test_a_weight_of_a_composite_is_prepared_for_the_inner_operand() -> None:
    asked: list[WeightSpec] = []

    class Packs(Reference):
        name = "packs"

        def prepare(self, spec: WeightSpec, read: Any, into: Weight | None = None) -> Weight:
            asked.append(spec)
            return super().prepare(spec, read, into)

        def linear(self, x: Any, w: Weight, *, out: str = "x") -> Any: ...

    given = WeightSpec("mtp_input", "eh_proj", (4, 8), "float32")
    bind(backend=Packs(), overrides={}).prepare(given, np.eye(4, 8, dtype=np.float32).__getitem__)
    assert asked == [WeightSpec("linear", "w", (4, 8), "float32")]


def test_the_reference_owns_composites_too() -> None:
    assert set(c.status for c in bind("reference").choices.values()) == {"own"}


@pytest.mark.parametrize(
    ("dims", "status", "reason"),
    [
        ({"T": (1, 8), "H": 64}, "own", ""),
        ({"T": (1, 9), "H": 64}, "inherited", "small: T = 9, the kernel takes a multiple of 1 up to 8"),
        ({"T": 4, "H": 65}, "inherited", "small: H = 65, the kernel takes at most 64"),
    ],
)
def test_claims_are_judged_over_the_whole_profile(dims: Any, status: str, reason: str) -> None:
    choice = bind(backend=OnSmall(), profile={"rms_norm": [spec(T=1, H=8), spec(**dims)]}).choices["rms_norm"]
    assert (choice.status, choice.reason) == (status, reason)


def test_what_nobody_claims_is_missing_or_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.ones((2, 4), np.float32)
    monkeypatch.delenv("PORTHAL_FALLBACK", raising=False)
    needed, advice = {"rms_norm": [spec(T=2, H=4)]}, "; set PORTHAL_FALLBACK=torch or reference to run what is missing there"
    for fallback, end in ((None, advice), ("error", "")):  # advice only where the variable would be read
        ops = bind(backend=Bare(), fallback=fallback)
        assert ops.choices["rms_norm"].status == "missing"
        with pytest.raises(NotClaimed, match=rf"^bare does not claim rms_norm \(no kernel\){end}$"):
            ops.rms_norm(x, x[0])
        with pytest.raises(NotClaimed, match=rf"^bare does not claim rms_norm \(no kernel\){end}$"):
            bind(backend=Bare(), profile=needed, fallback=fallback)
    ops = bind(backend=Bare(), fallback="reference")
    assert ops.choices["rms_norm"].status == "fallback"
    assert ops.rms_norm(x, x[0]) == pytest.approx(np.ones((2, 4)), abs=1e-5)


def test_an_override_runs_elsewhere_and_is_called_a_fallback() -> None:
    ops = bind(backend=OnSmall(), overrides={"rms_norm": "reference"})
    assert (ops.choices["rms_norm"].status, ops.choices["rms_norm"].reason) == ("fallback", "by policy")
    x = np.ones((1, 4), np.float32)
    assert ops.rms_norm(x, x[0])[0, 0] == pytest.approx(1.0, abs=1e-5)


def test_pages_survive_a_bridged_call() -> None:
    from porthal.hal import Batch, PagesSpec

    ops = bind("reference", overrides={"kv_write": "reference"})
    away = bind(backend=OnSmall(), overrides={"kv_write": "reference"})
    batch = Batch.build([2], [2], [[1]], 16)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    given = away.alloc_pages(PagesSpec((("k", 4),), "float32", 2, 16))
    pages = away.kv_write(given, batch, rows)
    assert (away.to_logical(given)["k"][16:18] == rows).all()  # written in place, as by a kernel at home
    assert away.choices["kv_write"].status == "fallback"
    assert ops.choices["kv_write"].status == "own"  # asking a backend for its own kernel changes nothing
    assert (away.to_logical(pages)["k"][16:18] == rows).all()
    assert away.to_logical(pages)["k"].sum() == rows.sum()


def test_composites_can_be_taken_apart_by_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORTHAL_OPS", "mla_output=composed, moe_layer=composed")
    ops = bind("reference")
    assert [op for op, c in ops.choices.items() if c.status == "composed"] == ["mla_output", "moe_layer"]
    with pytest.raises(UsageError, match="add is not a composite"):
        bind("reference", overrides={"add": "composed"})


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PORTHAL_BACKEND", "torhc", "unknown backend 'torhc', did you mean 'torch'"),
        ("PORTHAL_OPS", "tokp=reference", "unknown op 'tokp' .*did you mean 'topk'"),
        ("PORTHAL_OPS", "topk", "PORTHAL_OPS has 'topk': write op=backend"),
        ("PORTHAL_OPS", "topk=nowhere", "unknown backend 'nowhere'"),
        ("PORTHAL_OPS", "=cpu", "PORTHAL_OPS has '=cpu': write op=backend"),
        ("PORTHAL_OPS", "topk=via=", "PORTHAL_OPS has 'topk=via=': write op=backend or op=via=PROVIDER"),
        ("PORTHAL_OPS", "topk=reference,", "PORTHAL_OPS has '': write op=backend"),
        ("PORTHAL_OPS", "topk=torch, topk=reference", "PORTHAL_OPS has topk=torch and topk=reference: expected one of them"),
        ("PORTHAL_OPS", "topk=reference:1", "reference has no device '1': expected 'reference' alone"),
        ("PORTHAL_CHECK", "yes", "PORTHAL_CHECK is 'yes': expected 1 to check every call, or 0"),
        ("PORTHAL_FALLBACK", "elsewhere", "unknown backend 'elsewhere'"),
    ],
)
def test_policy_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv("PORTHAL_BACKEND", "reference")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        bind()


def test_wraps_run_outermost_first_and_see_the_inside_of_composites() -> None:
    seen: list[str] = []

    def tag(label: str) -> Any:
        def wrap(op: str, function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                seen.append(f"{label} {op}")
                return function(*args, **kwargs)

            return call

        return wrap

    ops = bind("reference", overrides={"mtp_input": "composed"}, wrap=(tag("a"), tag("b")))
    x = np.ones((1, 4), np.float32)
    w = np.eye(4, 8, dtype=np.float32)
    eh = ops.prepare(WeightSpec("mtp_input", "eh_proj", (4, 8), "float32"), w.__getitem__)
    ops.mtp_input(x, x, x[0], x[0], eh, eps=1e-5)
    assert seen == [f"{t} {op}" for op in ("mtp_input", "rms_norm", "rms_norm", "concat", "linear") for t in "ab"]


def test_a_binding_is_immutable() -> None:
    ops = bind("reference")
    with pytest.raises(AttributeError, match="immutable"):
        ops.rms_norm = None  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no op or service 'rms_norn'"):
        ops.rms_norn  # noqa: B018


def test_a_checked_binding_refuses_what_the_kernel_did_not_claim() -> None:
    ops = bind(backend=OnSmall(), check=True)
    with pytest.raises(NotClaimed, match="H = 65, the kernel takes at most 64"):
        ops.rms_norm(np.ones((1, 65), np.float32), np.ones(65, np.float32))
    with pytest.raises(UsageError, match="weight has H = 3"):
        ops.rms_norm(np.ones((1, 4), np.float32), np.ones(3, np.float32))


def test_fronts_choose_by_the_call_and_follow_use() -> None:
    x = np.ones((3, 4), np.float32)
    with porthal.use("reference"):
        y = porthal.ops.linear(x, np.eye(2, 4, dtype=np.float32))
        inside = porthal.bind().backend.name
        other: list[str | None] = []
        thread = threading.Thread(target=lambda: other.append(porthal.hal.discovery.used.get()))
        thread.start()
        thread.join()
    assert (y == 1).all()
    assert inside == "reference"
    assert other == [None]  # a new thread has the environment's policy


@pytest.mark.parametrize(("variable", "value"), [("PORTHAL_OPS", "rms_norm=reference"), ("PORTHAL_FALLBACK", "reference")])
def test_fronts_follow_a_policy_that_changes(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    backends = {"bare": Bare(), "reference": create("reference")}
    monkeypatch.setattr(porthal.hal.binding, "_shared", backends.__getitem__)
    for name, setting in (("PORTHAL_BACKEND", "bare"), ("PORTHAL_OPS", ""), ("PORTHAL_FALLBACK", "error")):
        monkeypatch.setenv(name, setting)
    x = np.ones((1, 4), np.float32)
    before = os.environ[variable]
    for setting in (value, before, value):
        monkeypatch.setenv(variable, setting)
        if setting == value:
            assert porthal.ops.rms_norm(x, x[0])[0, 0] == pytest.approx(1, abs=1e-5)
        else:
            with pytest.raises(NotClaimed, match="bare does not claim rms_norm"):
                porthal.ops.rms_norm(x, x[0])


def test_each_class_derives_its_own_kernels() -> None:
    class Lower(Backend):
        name = "lower"

        def derive(self, contract: Any) -> Any:
            return lambda: "derived by lower"

    class Upper(Lower):
        name = "upper"

        def derive(self, contract: Any) -> Any:
            return lambda: "derived by upper"

    kernels = [(k.owner, k.function()) for k in Upper().candidates(contracts()["add"])]
    assert kernels == [("upper", "derived by upper"), ("lower", "derived by lower")]


def test_a_recorder_forgets_a_call_that_failed() -> None:
    def fails() -> None:
        assert recorder.path == ["add"]
        raise ZeroDivisionError

    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        recorder("add", fails)()
    assert recorder.path == []


FACTS = CallSpec({"T": (1, 8), "H": 4}, {"x": "float32"}, {"eps": 1e-5}, {"w": "none"})


@pytest.mark.parametrize(
    ("change", "covered"),
    [
        ({}, True),
        ({"dims": {"T": 8, "H": 4}}, True),
        ({"dims": {"T": 1}}, True),
        ({"dims": {"T": 0, "H": 4}}, False),
        ({"dims": {"T": 9, "H": 4}}, False),
        ({"dims": {"T": 1, "H": 5}}, False),
        ({"dims": {"T": 1, "H": 4, "K": 2}}, False),
        ({"dtypes": {"x": "float16"}}, False),
        ({"attrs": {"eps": 1e-6}}, False),
        ({"schemes": {"w": "fp8"}}, False),
        ({"schemes": {}}, False),
    ],
)
def test_facts_cover_calls_that_are_equal_or_within_a_range(change: dict[str, Any], covered: bool) -> None:
    assert FACTS.covers(replace(FACTS, **({"dims": {"T": 3, "H": 4}} | change))) is covered


def test_facts_that_differ_in_anything_have_another_key() -> None:
    changes: list[dict[str, Any]] = [{}, {"dims": {"T": 1}}, {"dtypes": {}}, {"attrs": {}}, {"schemes": {"w": "fp8"}}]
    made = [replace(FACTS, **change) for change in changes]
    assert len(set(made)) == len({spec.key() for spec in made}) == len(changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, f: o.linear(f(2, 3), f(4, 5)), "linear: w has K = 5, but K=3 elsewhere"),
        (lambda o, f: o.linear(f(2, 3)), "linear lacks operand 'w'"),
        (lambda o, f: o.linear(f(2, 3), f(4, 3), bias=1), "unexpected or repeated argument 'bias'"),
        (lambda o, f: o.linear(f(2, 3).astype("i4"), f(4, 3)), "x is int32, expected float32 or bfloat16 or float16"),
        (lambda o, f: o.linear(f(2, 3), [[1.0]]), "w is list, expected Weight"),
        (lambda o, f: o.linear(f(2, 3, 1), f(4, 3)), r"x has shape \[2, 3, 1\], expected 2 axes \[T, K\]"),
        (lambda o, f: o.linear(f(2, 3), f(4, 3), out=3), "attribute out is 3"),
        (lambda o, f: o.rms_norm(f(2, 3), f(3), eps=-1.0), "rms_norm requires eps to be 1e-12 to 1, got eps=-1.0"),
        (lambda o, f: o.rms_norm("x", f(3)), "x is str, expected a NumPy array"),
        (lambda o, f: o.embedding(np.array([4], np.int32), f(4, 3)), r"ids\[0\] is 4, expected 0 to 3"),
        (lambda o, f: o.silu_mul(f(2, 3)), "x has 2\\*I = 3"),
        (
            lambda o, f: o.rope(f(2, 1, 8), 5, theta=1.0, layout="half", start=0, width=8),
            "batch is int, expected Batch",
        ),
        (lambda o, f: o.moe_route(f(1, 4), f(4), k=5, scale=1.0), "moe_route requires k to be 1 to 4, got k=5"),
    ],
)
def test_bad_calls_get_one_sentence(call: Any, message: str) -> None:
    def floats(*shape: int) -> Any:
        return np.ones(shape, np.float32)

    with porthal.use("reference"), pytest.raises(UsageError, match=message) as caught:
        call(porthal.ops, floats)
    assert "\n" not in str(caught.value)
