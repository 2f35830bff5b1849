"""What a backend says of its arrays: whether it is so, and which cases it makes meaningless."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.legal import FAR, LAYOUTS, PAST_2G, VIEWS
from porthal.hal import Backend, UsageError
from porthal.hal.errors import message_of

DENSE = [view for view in VIEWS if view != "broadcast"]  # of these a copy is the call of another case; equal rows are not


def left_out(case: Case, backend: Backend) -> str:
    """Why a case would tell nothing about a backend with arrays of this kind, or ""."""
    alone = case.distinct  # of calls of copies, as in a model's own sizes, no other is the same without a view
    if case.view in (*DENSE, *LAYOUTS, FAR) and not backend.traits.strides and not alone:
        return f"view={case.view} is a dense copy on {backend}, whose arrays have no strides"
    if case.view == PAST_2G and not backend.traits.views_alias:
        return f"view={case.view} would have to be copied on {backend}, where slices are copies"
    if case.capture and not backend.captures:
        return f"{backend} captures no graphs"
    return ""


def unasked(backend: Backend) -> tuple[str, ...]:
    """What no case on this backend is asked, in words."""
    found = []
    if not backend.traits.views_alias:
        found.append("whether a kernel writes beside its results, because slices are copies")
    if not backend.traits.mutable:
        found.append("whether a result shares memory with an input, because arrays cannot be changed")
    if backend.traits.static_shapes:
        found.append("whether a row depends on how many there are, because that is a call of another shape")
    if not backend.captures:
        found.append("whether calls can be captured as a graph and replayed, because the backend captures none")
    return tuple(found)


def _overwritten(backend: Backend, write: Callable[[Any], object]) -> bool:
    """Whether an array of eight zeros is changed by this; what it raises says that it is not."""
    whole = backend.from_numpy(np.zeros(8, np.float32))
    with suppress(Exception):
        write(whole)
    return bool(np.array(backend.to_numpy(whole)).any())


def verify(backend: Backend) -> None:
    """UsageError where the arrays are not what the traits say: a wrong trait would make right kernels look wrong."""
    traits, name = backend.traits, type(backend).__name__
    ones = np.ones((2, 2), np.float32)
    if traits.mutable:
        try:
            whole = backend.from_numpy(np.zeros(8, np.float32))
            part = backend.write(whole[2:6].reshape(2, 2), backend.from_numpy(ones))
            there, held = (np.array(backend.to_numpy(x)) for x in (part, whole))
        except Exception as error:
            raise UsageError(
                f"{backend} cannot write into its own arrays ({message_of(error)}): state traits = Traits(mutable=False, "
                f"views_alias=False, ...) in {name}, or override `write`"
            ) from error
        if not np.array_equal(there, ones):
            raise UsageError(f"`write` of {backend} gave {there.tolist()} for {ones.tolist()}: it must return what it wrote")
        if traits.views_alias != bool(held[2:6].all()):
            raise UsageError(
                f"slices of the arrays of {backend}, reshaped, {'are copies' if traits.views_alias else 'share memory'}: state "
                f"traits = Traits(views_alias={not traits.views_alias}, ...) in {name}"
            )
    elif _overwritten(backend, lambda x: x.__setitem__(slice(2, 6), backend.from_numpy(ones.reshape(4)))):
        raise UsageError(f"the arrays of {backend} can be overwritten: state traits = Traits(mutable=True, ...) in {name}")
    if traits.mutable and not traits.strides and _overwritten(
        backend, lambda x: backend.write(x.reshape(4, 2)[0:4, 0:1], backend.from_numpy(ones.reshape(4, 1)))
    ):
        raise UsageError(f"slices with gaps are views on {backend}: state traits = Traits(strides=True, ...) in {name}")
    if traits.strides:
        try:
            shape = tuple(backend.expand(backend.from_numpy(ones.reshape(1, 4))[:, ::2].swapaxes(0, 1)[:1], (3, 1)).shape)
        except Exception as error:
            raise UsageError(
                f"the arrays of {backend} have no views with strides ({message_of(error)}): state "
                f"traits = Traits(strides=False, ...) in {name}, or override `expand`"
            ) from error
        if shape != (3, 1):
            raise UsageError(f"`expand` of {backend} gave the shape {list(shape)}, expected [3, 1]")
