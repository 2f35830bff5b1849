"""What a model needs of a binding: the ops that are called, in the dtype of the model; no others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from porthal.hal import FLOATS, Backend, NotClaimed, bind, contracts, limits, one_of
from porthal.hal.discovery import backend_class
from porthal.model import Glm5, load, profile
from porthal.model.generate import generate
from tests.oracles.tiny import PROMPT

Reference = backend_class("reference")


def lacking(*ops: str, **own: Any) -> Backend:
    """A chip with all kernels but some, whatever its base has."""
    made: Backend = type("Chip", (Reference,), {"name": "chip", **dict.fromkeys(ops), **own})()
    return made


def loaded(directory: Path, backend: Backend, **settings: Any) -> Glm5:
    return load(directory, bind(backend=backend, overrides={}, fallback="error"), **settings)


@pytest.mark.parametrize(
    ("op", "settings"),
    [
        ("sample", {"temperature": 1.0}),
        ("speculative_verify", {"speculative": 2}),
        ("speculative_verify", {"temperature": 1.0, "speculative": 2}),
        ("gather_logprob", None),
    ],
)
def test_an_op_that_is_not_used_is_not_needed(
    checkpoints: dict[str, Path], models: dict[str, Glm5], op: str, settings: dict[str, Any] | None
) -> None:
    model = loaded(checkpoints["glm5"], lacking(op))
    assert model.generate(PROMPT[:9], 4) == models["glm5"].generate(PROMPT[:9], 4)
    if settings:
        heard: list[Sequence[int]] = []
        with pytest.raises(NotClaimed, match=rf"^chip does not claim {op} \(no kernel\)$"):
            generate(model, [PROMPT[:9]], 4, **settings, on_tokens=lambda _, ids: heard.append(ids))
        assert not heard  # before the first token


@pytest.mark.parametrize("op", ["argmax", "rms_norm", "check_finite", "sparse_mla", "kv_write"])
def test_an_op_that_greedy_text_needs_is_refused_when_the_model_is_loaded(checkpoints: dict[str, Path], op: str) -> None:
    with pytest.raises(NotClaimed, match=rf"^chip does not claim {op} \(no kernel\)$"):
        loaded(checkpoints["glm5"], lacking(op))


def test_what_a_kernel_replaces_is_not_needed(checkpoints: dict[str, Path], models: dict[str, Glm5]) -> None:
    """Experts by one kernel: none of the ops that they are else composed of."""
    parts = ("grouped_gemm", "moe_permute", "moe_unpermute")

    def moe_experts(self: Any, *operands: Any, **attrs: Any) -> Any:
        return Reference.derive(backend_class("reference")(), contracts()["moe_experts"])(*operands, **attrs)

    fused = loaded(checkpoints["glm5"], lacking(*parts, moe_experts=moe_experts))
    assert fused.ops.choices["moe_experts"].status == "own"
    assert fused.generate(PROMPT[:9], 4) == models["glm5"].generate(PROMPT[:9], 4)
    with pytest.raises(NotClaimed, match="chip does not claim moe_permute"):
        loaded(checkpoints["glm5"], lacking(*parts))


# -- kernels that do not take the dtype of the model -----------------------------------------------------------------


def narrow(dtype: str) -> Backend:
    """A chip whose every kernel takes one dtype alone, and fails with any other, as does its packing of weights."""

    def own(op: str) -> Any:
        contract = contracts()[op]
        free = [name for name, options in contract.dtypes.items() if set(FLOATS) <= set(options)]

        @limits(provider=f"narrow.{op}", dtypes={name: one_of(dtype) for name in free})
        def kernel(self: Any, *operands: Any, **attrs: Any) -> Any:
            given, _ = contract.arrange(operands, attrs)
            assert {str(given[name].dtype) for name in free if name in given} <= {dtype}
            return Reference.derive(self, contract)(*operands, **attrs)

        return kernel

    def prepare(self: Any, spec: Any, read: Any, into: Any = None) -> Any:
        assert spec.dtype == dtype, f"{spec.op} cannot be packed"
        return Reference.prepare(self, spec, read, into)

    primitive = [op for op, contract in contracts().items() if not contract.decomposition]
    return lacking(prepare=prepare, **{op: own(op) for op in primitive})


@pytest.mark.parametrize("taken", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_binding_without_a_profile_is_made_for_the_model(
    checkpoints: dict[str, Path], reference: Any, taken: str, dtype: str
) -> None:
    model = loaded(checkpoints["glm52"], narrow(taken), dtype=dtype)
    assert model.ops.choices["linear"].status == ("own" if taken == dtype else "inherited")
    wanted = load(checkpoints["glm52"], reference, dtype=dtype)
    assert model.generate(PROMPT[:9], 3, speculative=2) == wanted.generate(PROMPT[:9], 3, speculative=2)


def test_a_binding_for_the_model_is_used_as_it_is(checkpoints: dict[str, Path], models: dict[str, Glm5]) -> None:
    config = models["glm5"].config
    bound = bind("reference", profile=profile(config, "float16"), overrides={}, fallback="error")
    assert load(checkpoints["glm5"], bound, dtype="float16").ops is bound
    with pytest.raises(NotClaimed, match=r"^reference is bound for other calls than \w+ with .*float32.*: bind it without"):
        load(checkpoints["glm5"], bound)
    some = bind("reference", profile={"argmax": profile(config)["argmax"]}, overrides={}, fallback="error")
    with pytest.raises(NotClaimed, match="reference is bound for other calls than"):
        load(checkpoints["glm5"], some)


def test_the_policy_stays(checkpoints: dict[str, Path]) -> None:
    """Overrides, fallback, checks and wraps of a binding are those of the one that is made of it."""
    heard: list[str] = []

    def wrap(op: str, function: Any) -> Any:
        def call(*operands: Any, **attrs: Any) -> Any:
            heard.append(op)
            return function(*operands, **attrs)

        return call

    chip = lacking("topk")
    binding = bind(backend=chip, overrides={"moe_layer": "composed"}, fallback="reference", check=True, wrap=(wrap,))
    model = load(checkpoints["glm5"], binding)
    assert model.ops.backend is chip
    assert (model.ops.choices["topk"].status, model.ops.choices["moe_layer"].reason) == ("fallback", "by policy")
    model.generate(PROMPT[:9], 2)
    assert "argmax" in heard
