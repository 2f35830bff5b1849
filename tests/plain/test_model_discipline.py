"""Of an array the model uses shape, dtype, reshape and basic slicing; a step copies to the host once.

The arrays of this backend allow nothing else, and its operands keep their arrays to themselves.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal import Binding, bind
from porthal.hal import Pages, Selection, Weight
from porthal.hal.discovery import backend_class
from porthal.model import Glm5, load
from porthal.model.generate import generate
from tests.oracles.tiny import PROMPT

PROMPTS = [PROMPT, PROMPT[:50], PROMPT[:7]]


class Sealed:
    """An array of which one may ask shape and dtype, reshape it, and slice it by integers and slices."""

    __slots__ = ("_array",)
    __hash__ = None

    def __init__(self, array: Any) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def dtype(self) -> str:
        return str(self._array.dtype)

    def reshape(self, *shape: int) -> Sealed:
        assert all(isinstance(size, int) for size in shape)
        return Sealed(self._array.reshape(shape))

    def __getitem__(self, key: Any) -> Sealed:
        keys = key if isinstance(key, tuple) else (key,)
        assert all(isinstance(k, (int, slice)) for k in keys), f"sliced by {key!r}"
        return Sealed(self._array[key])


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise TypeError(f"the model used {name} of an array")

    return refuse


for _name in ("array", "iter", "len", "bool", "int", "float", "index", "eq", "ne", "lt", "gt", "le", "ge", "setitem"):
    setattr(Sealed, f"__{_name}__", _refusing(_name))
# Arithmetic needs no refusal: an object without __add__ has none.


def seal(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(seal(v) for v in value)
    if isinstance(value, (Weight, Pages, Selection)):
        return replace(value, native=Sealed(unseal(value.native)))
    return Sealed(value) if isinstance(value, (np.ndarray, np.generic)) else value


def unseal(value: Any) -> Any:
    if isinstance(value, (Weight, Pages, Selection)):
        return replace(value, native=unseal(value.native))
    if isinstance(value, dict):
        return {name: unseal(v) for name, v in value.items()}
    return value._array if isinstance(value, Sealed) else value


class SealedReference(backend_class("reference")):  # type: ignore[misc]
    """The reference backend, whose services take and give sealed arrays."""

    def from_numpy(self, x: Any) -> Sealed:
        return Sealed(super().from_numpy(x))

    def to_numpy(self, x: Any) -> Any:
        return super().to_numpy(unseal(x))

    def refuses_array(self, x: Any) -> str | None:
        return None if isinstance(x, Sealed) else f"{type(x).__name__}, expected a sealed array"

    def alloc_pages(self, spec: Any) -> Any:
        return seal(super().alloc_pages(spec))

    def prepare(self, spec: Any, read: Any, into: Any = None) -> Any:
        return seal(super().prepare(spec, read, into))


def sealed_binding(check: bool = False) -> Binding:
    def wrap(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **attrs: Any) -> Any:
            return seal(function(*map(unseal, args), **{name: unseal(value) for name, value in attrs.items()}))

        return call

    return bind(backend=SealedReference(), overrides={}, fallback="error", check=check, wrap=(wrap,))


@pytest.fixture(scope="module")
def sealed(checkpoints: dict[str, Path]) -> dict[str, Glm5]:
    return {kind: load(path, sealed_binding()) for kind, path in checkpoints.items()}


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 2 * x,
        lambda x: x @ x,
        lambda x: -x,
        np.asarray,
        np.exp,
        list,
        len,
        bool,
        float,
        operator.index,
        lambda x: x == 0,
        lambda x: x < 0,
        lambda x: operator.setitem(x, 0, 1),
        lambda x: x[[0, 1]],
        lambda x: x[x],
        lambda x: x.sum(),
        lambda x: x.astype("float64"),
        lambda x: x.T,
    ],
)
def test_sealed_arrays_refuse(use: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, AttributeError, AssertionError)):
        use(Sealed(np.ones(1)))


def test_sealed_arrays_allow() -> None:
    x = Sealed(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert (x.shape, x.dtype) == ((2, 3), "int32")
    assert unseal(x.reshape(3, 2)[1:, 0]).tolist() == [2, 4]


def test_forward(sealed: dict[str, Glm5], model: Glm5, directory: Path) -> None:
    for chunk in (None, 40):
        assert np.array_equal(sealed[directory.name].forward(PROMPT, chunk=chunk), model.forward(PROMPT, chunk=chunk))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("speculative", [0, 3])
def test_generation_copies_once_per_step(
    sealed: dict[str, Glm5], model: Glm5, directory: Path, temperature: float, speculative: int
) -> None:
    closed = sealed[directory.name]
    before = closed.ops.backend.host_copies
    done = generate(closed, PROMPTS, 12, temperature=temperature, speculative=speculative)
    assert closed.ops.backend.host_copies - before == done.forwards > 1
    assert done == generate(model, PROMPTS, 12, temperature=temperature, speculative=speculative)


@pytest.mark.parametrize("speculative", [0, 3])
def test_chunks_that_end_no_prompt_copy_nothing(model: Glm5, speculative: int) -> None:
    backend = model.ops.backend
    before = backend.host_copies
    done = generate(model, [PROMPT, PROMPT[:50]], 12, speculative=speculative, prefill_chunk=20)
    chunks, ending = math.ceil(len(PROMPT) / 20), 2
    assert backend.host_copies - before == done.forwards - chunks + ending


def test_every_call_keeps_its_contract(directory: Path, model: Glm5) -> None:
    """The same under a binding that judges the operands of each call: shapes, dtypes, ranges, home of arrays."""
    checked = load(directory, sealed_binding(check=True))
    assert generate(checked, PROMPTS, 6, speculative=3).tokens == generate(model, PROMPTS, 6).tokens
