"""Arrays of a library of its own: what docs/porting.md asks of them is enough, and services of the base fit them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from porthal.backends.reference.backend import Reference
from porthal.conformance import replay
from porthal.conformance.execution.placing import MARGIN
from porthal.conformance.execution.traits import verify
from porthal.hal import PagesSpec, Traits, UsageError, WeightSpec, bind, dtype, numpy_dtype
from porthal.model import load


class Box:
    """As little as an array may have: a shape, a dtype, reshape to sizes, slices by integers and slices, swapaxes."""

    def __init__(self, hidden: np.ndarray[Any, Any]) -> None:
        self._hidden = hidden
        self.shape = hidden.shape
        self.dtype = dtype(hidden)

    def __getitem__(self, key: Any) -> Box:
        assert all(type(k) in (int, slice) for k in (key if isinstance(key, tuple) else (key,))), key
        return type(self)(self._hidden[key])

    def reshape(self, *shape: int) -> Box:
        assert all(type(size) is int and size >= 0 for size in shape), shape
        return type(self)(self._hidden.reshape(shape))

    def swapaxes(self, a: int, b: int) -> Box:
        return Box(self._hidden.swapaxes(a, b))


class Dense(Box):
    """Slices are views where elements follow each other, and copies elsewhere; there is no swapaxes."""

    swapaxes = None  # type: ignore[assignment]

    def __init__(self, hidden: np.ndarray[Any, Any]) -> None:
        super().__init__(np.ascontiguousarray(hidden).reshape(hidden.shape))


class Boxed(Reference):
    """`from_numpy` allocates as kernels do, with `empty`."""

    name = "boxed"
    box: ClassVar[type[Box]] = Box

    def from_numpy(self, x: Any) -> Any:
        y = self.empty(x.shape, dtype(x))
        y._hidden[...] = x
        return y

    def to_numpy(self, x: Box) -> Any:
        return x._hidden.copy()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Box:
        return self.box(np.empty(shape, numpy_dtype(dtype)))

    def write(self, into: Box, value: Any) -> Any:
        into._hidden[...] = value._hidden
        return into

    def expand(self, x: Box, shape: tuple[int, ...]) -> Any:
        return Box(np.broadcast_to(x._hidden, shape))

    def refuses_array(self, x: Any) -> str | None:
        return None if isinstance(x, Box) else f"{type(x).__name__}, expected a box"

    def add(self, a: Box, b: Box) -> Box:
        y = self.empty(a.shape, a.dtype)
        y._hidden[...] = a._hidden + b._hidden
        return y

    def linear(self, x: Box, w: Any, *, out: str = "x") -> Box:
        y = self.empty((x.shape[0], w.native.shape[0]), x.dtype if out == "x" else out)
        y._hidden[...] = x._hidden.astype(np.float64) @ w.native._hidden.astype(np.float64).T
        return y


class BoxedDense(Boxed):
    name = "boxed_dense"
    traits = Traits(strides=False)
    box = Dense


TOKENS = [
    "add,T=7,H=96,a:bf16,0",
    "add,T=7,H=96,view=columns,0",
    "add,T=7,H=96,view=rows,0",
    "add,T=7,H=96,view=transposed,0",
    "add,T=7,H=96,view=broadcast,0",
    "add,T=3,H=7,view=far,0",
    "add,T=7,H=96,fault=dtype,0",
    "linear,T=4,K=96,N=7,x:bf16,0",
    "linear,T=4,K=96,N=7,x:bf16,out=float32,0",
    "rms_norm,T=7,H=96,x:bf16,0",
    "kv_write,T=7,A=128,B=64,pages:bf16,batch=mixed,block_size=64,0",
    "topk,T=7,k=128,batch=mixed,block_size=64,0",
    "sparse_mla,T=3,N=8,C=512,R=64,k=16,scale=0.0625,q_latent:bf16,batch=mixed,block_size=64,0",
]


@pytest.mark.parametrize("token", TOKENS)
def test_the_suite_asks_no_more_of_an_array(token: str) -> None:
    result = replay(token, Boxed())
    assert result.verdict == "PASS", result.message


@pytest.mark.parametrize("token", TOKENS)
def test_dense_arrays_whose_other_slices_are_copies_leave_out_views_alone(token: str) -> None:
    result = replay(token, BoxedDense())
    left_out = "view=" in token and "view=broadcast" not in token  # equal rows are a call of their own, copied or not
    assert result.verdict == ("LEFT_OUT" if left_out else "PASS"), result.message


def test_a_kernel_on_dense_arrays_is_still_watched() -> None:
    class Careless(BoxedDense):
        name = "careless"

        def add(self, a: Box, b: Box) -> Box:
            y = super().add(a, b)
            y._hidden.base[MARGIN - 1] = 1  # the element before the first
            return y

    assert replay("add,T=7,H=96,0", Careless()).verdict == "FAIL_WROTE_OUTSIDE"


def test_a_cache_and_a_weight_lie_in_the_class_s_own_arrays_and_dtype() -> None:
    boxed = Boxed()
    pages = boxed.alloc_pages(PagesSpec((("c", 4),), "bfloat16", 2, 8))
    assert (type(pages["c"]), pages["c"].dtype, pages["c"].shape) == (Box, "bfloat16", (16, 4))
    binding = bind(backend=boxed, overrides={}, fallback="error")
    w = np.arange(6, dtype=np.float32).reshape(2, 3)
    weight = binding.prepare(WeightSpec("linear", "w", (2, 3), "float32"), w.__getitem__)
    assert (type(weight.native), weight.native.dtype) == (Box, "float32")
    assert binding.to_logical(weight)["w"].tolist() == w.tolist()


def test_a_model_runs_on_them(directory: Any, model: Any) -> None:
    tokens = list(range(40))
    own = load(directory, bind(backend=Boxed(), overrides={}, fallback="error"))
    np.testing.assert_allclose(own.forward(tokens), model.forward(tokens), rtol=1e-4, atol=1e-4)


def test_a_reshape_that_copies_is_refused() -> None:
    """Guards lie around what is cut from a longer array and reshaped: a copy would have none."""

    class Copying(Box):
        def reshape(self, *shape: int) -> Box:
            return Box(self._hidden.reshape(shape).copy())

    class Copies(Boxed):
        box = Copying

    with pytest.raises(UsageError, match=r"^slices of the arrays of boxed, reshaped, are copies: state"):
        verify(Copies())
