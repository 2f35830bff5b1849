"""The backend without values: what its arrays allow, and that it infers the very shapes the reference returns."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porthal import Binding, bind
from porthal.hal import Pages, Rows, Selection, UsageError, Weight, contracts, dtype
from porthal.hal.abstract import Abstract, AbstractArray
from porthal.hal.backend import Backend
from porthal.hal.discovery import backend_class
from porthal.model import Config, Glm5
from porthal.model.checkpoint import Blank, Checkpoint
from porthal.model.generate import generate
from tests.oracles.tiny import PROMPT

# -- the array -------------------------------------------------------------------------------------------------------

X = AbstractArray((4, 6, 5), "bfloat16")


@pytest.mark.parametrize(
    "key",
    [
        1,
        -4,
        slice(None),
        slice(1, None, 2),
        slice(5, 1),
        slice(None, None, -1),
        slice(-100, 100),
        (0, 1, 2),
        (slice(1, 3), -1),
        (slice(None), slice(None), slice(3, 3)),
        (),
    ],
)
def test_integers_and_slices_shape_as_in_numpy(key: Any) -> None:
    expected = np.zeros(X.shape)[key].shape
    sliced = X[key]
    assert (sliced.shape, sliced.dtype) == (expected, "bfloat16")


@given(st.integers(0, 9), st.slices(9))
def test_any_slice_shapes_as_in_numpy(size: int, key: slice) -> None:
    assert AbstractArray((size, 2), "float32")[key].shape == np.zeros((size, 2))[key].shape


@pytest.mark.parametrize(
    "key", [[0, 1], np.array([0, 1]), None, ..., True, (0, None), (slice(None), [0]), X, np.int64(1), "a", 1.0]
)
def test_fancy_indexing_is_refused(key: Any) -> None:
    with pytest.raises(UsageError, match=r"^array index (?s:.*) is not an integer or a slice: model code may use"):
        X[key]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (4, "index 4 is outside an axis of 4"),
        (-5, "index -5 is outside an axis of 4"),
        ((slice(None), 6), "index 6 is outside an axis of 6"),
        ((0, 0, 0, 0), "4 indices are too many for an array of shape [4, 6, 5]"),
    ],
)
def test_what_is_outside_is_refused(key: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        X[key]


@pytest.mark.parametrize("shape", [(120,), (4, 30), (1, 120, 1), (2, 2, 6, 5)])
def test_reshape(shape: tuple[int, ...]) -> None:
    assert (X.reshape(*shape).shape, X.reshape(*shape).dtype) == (shape, "bfloat16")
    assert AbstractArray((0, 3), "float32").reshape(3, 0).shape == (3, 0)
    assert AbstractArray((1,), "float32").reshape().shape == ()


@pytest.mark.parametrize("shape", [(4, 29), (), (-1, 120), (-4, -30), (0,)])
def test_bad_reshape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=re.escape(f"cannot reshape [4, 6, 5] to {list(shape)}")):
        X.reshape(*shape)


def test_the_array_offers_nothing_else() -> None:
    assert {n for n in dir(X) if not n.startswith("_")} == {"shape", "dtype", "reshape"}
    for forbidden in (lambda: X + 1, lambda: len(X), lambda: X == X and X.T, lambda: float(X), lambda: X.item()):
        with pytest.raises((TypeError, AttributeError)):
            forbidden()


# -- the backend -----------------------------------------------------------------------------------------------------


def test_only_abstract_arrays_are_taken() -> None:
    ops = bind(backend=Abstract(), overrides={}, check=True)
    weight = AbstractArray((6,), "float32")
    with pytest.raises(UsageError, match=r"^rms_norm: x is ndarray, expected an abstract array$"):
        ops.rms_norm(np.zeros((2, 6), np.float32), weight)
    with pytest.raises(UsageError, match="weight has H = 6, but H=5 elsewhere"):
        ops.rms_norm(AbstractArray((2, 5), "float32"), weight)


def test_every_contract_is_inferred() -> None:
    ops = bind(backend=Abstract(), overrides={})
    assert ops.counts()["own"] == len(contracts())


def test_no_value_leaves_but_zeros() -> None:
    ops = bind(backend=Abstract(), overrides={})
    x = ops.from_numpy(np.ones((2, 3), np.float32))
    assert (x.shape, x.dtype) == ((2, 3), "float32")
    np.testing.assert_array_equal(ops.to_numpy(x), np.zeros((2, 3)))


def told(value: Any) -> Any:
    """What is static of a result."""
    if isinstance(value, tuple) and not isinstance(value, Rows):
        return [told(v) for v in value]
    if isinstance(value, Pages):
        return value.spec, [tuple(a.shape) for a in value.leaves()]
    if isinstance(value, Selection):
        return value.spec, [told(rows) for rows in value.native]
    return tuple(value.shape), dtype(value)


def recorded(backend: Backend, overrides: dict[str, str]) -> tuple[Binding, list[tuple[str, Any]]]:
    """A binding that notes every call's results, inner ones first."""
    calls: list[tuple[str, Any]] = []

    def record(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = function(*args, **kwargs)
            calls.append((op, told(out)))
            return out

        return call

    return bind(backend=backend, overrides=overrides, fallback="error", check=True, wrap=(record,)), calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("composed", [False, True])
def test_inferred_results_are_those_of_the_reference(directory: Path, composed: bool, dtype: str) -> None:
    config = Config.read(directory)
    overrides = {op: "composed" for op, c in contracts().items() if c.decomposition} if composed else {}
    made = []
    for backend, source in ((backend_class("reference")(), Checkpoint(directory)), (Abstract(), Blank())):
        ops, calls = recorded(backend, overrides)
        model = Glm5(config, source, ops, dtype)
        model.forward(PROMPT[:20], chunk=12)
        cache = model.new_cache([128])
        request = cache.new_request()
        batch = ops.plan(cache.step([request], [9]))
        ids = ops.from_numpy(np.array(PROMPT[:9], np.int32))
        hidden = model.hidden(ids, batch, cache)
        assert model.mtp is not None
        out, selection = model.mtp.hidden(ids, model.embed, hidden, batch, cache.layers[-1], None)
        rows = ops.from_numpy(np.array([8, 2, 2], np.int32))
        ops.select_rows(selection, rows)
        ops.take_rows(out, rows)
        logits = model.logits(out)
        ops.log_softmax(logits)
        ops.gather_logprob(logits, ids)
        ops.check_finite(logits, ops.argmax(logits))
        ops.cast(out, to="float16")
        ops.page_copy(cache.layers[0].kv, *(ops.from_numpy(np.array([p], np.int32)) for p in (0, 1)))
        made.append(calls)
    real, inferred = made
    assert [op for op, _ in real] == [op for op, _ in inferred]
    for (op, expected), (_, result) in zip(real, inferred):
        assert result == expected, op
    seen = {op for op, _ in real}
    composites = {op for op, c in contracts().items() if c.decomposition}
    assert composites - {"moe_experts"} <= seen
    if composed:  # what a model never calls by itself is sampling, and layouts that only composites use
        assert set(contracts()) - seen == {"sample", "speculative_verify", "quantize", "dequantize"}


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_makes_the_same_first_calls(directory: Path, temperature: float) -> None:
    """Sampling and verifying included; afterwards the texts, and so the calls, go their own ways."""
    config, made = Config.read(directory), []
    for backend, source in ((backend_class("reference")(), Checkpoint(directory)), (Abstract(), Blank())):
        ops, calls = recorded(backend, {})
        generate(Glm5(config, source, ops), [PROMPT[:9]], 4, temperature=temperature, speculative=2)
        made.append(calls)
    verified = [op for op, _ in made[0]].index("speculative_verify") + 1
    assert made[1][:verified] == made[0][:verified]
    assert {"sample", "argmax"} & {op for op, _ in made[0][:verified]}


def test_weights_and_pages_keep_their_specs(directory: Path) -> None:
    model = Glm5(Config.read(directory), Blank(), bind(backend=Abstract(), overrides={}), "bfloat16")
    assert isinstance(model.embed, Weight)
    assert (model.embed.native.shape, model.embed.native.dtype) == (model.embed.spec.shape, "bfloat16")
    layer = model.new_cache([64, 1]).layers[0]
    assert [(f.shape, f.dtype) for f in layer.kv.leaves()] == [((128, 32), "bfloat16"), ((128, 8), "bfloat16")]
