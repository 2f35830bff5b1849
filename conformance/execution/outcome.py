"""What execution brings back, and how two results are compared bit for bit."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from traceback import walk_tb
from typing import Any

import numpy as np

from porthal.hal import Binding, UsageError, contracts
from porthal.hal.contract import Contract
from porthal.hal.dtypes import dtype, is_float
from porthal.hal.errors import message_of
from porthal.hal.operands import KINDS
from porthal.hal.signature import ARRAY

Array = np.ndarray[Any, Any]
BY_SUITE = "raised in the suite"
WORDS = 2**12  # bytes of an array above which more of them are compared at a time


@dataclass(frozen=True)
class Outcome:
    """Results in logical form by name (an array, or the arrays of an operand's parts), and what must not have happened.

    again       another run's results: the first that differ, where any do
    trespasses  what changed that the call may not write
    error       what was raised, and where
    moved       results of the same rows among others (see `invariance`), where there is such a call
    apart       and in several calls of fewer rows, where those are promised to give the same
    invariant   whether the kernel declares that these are the same bits
    flushes     whether the backend says that it may read denormals as zero
    unread      of operands, what cannot be read back, so that nobody knows whether it changed
    """

    results: Mapping[str, Any] = field(default_factory=dict)
    again: Mapping[str, Any] = field(default_factory=dict)
    trespasses: tuple[str, ...] = ()
    error: str = ""
    moved: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, Any] = field(default_factory=dict)
    invariant: bool = False
    flushes: bool = False
    unread: tuple[str, ...] = ()


class Mutation(str):
    """What changed of what an operand holds, among trespasses."""


class WrongResult(UsageError):
    """What a kernel returned is not what the contract says; the sentence names the kernel's place."""


def raised(error: BaseException) -> str:
    """An exception in one line with its place: the last line of the kernel's package that was at it, or of the suite."""
    if isinstance(error, WrongResult):
        return f"UsageError: {error}"
    frames = [(f.f_globals.get("__name__", ""), f.f_code, line) for f, line in walk_tb(error.__traceback__)]
    theirs = [(code, line) for module, code, line in frames if not _of_the_suite(module)]
    if not theirs:
        _, code, line = frames[-1]
        return f"{message_of(error)}; {BY_SUITE} at {code.co_filename}:{line}"
    kernel, _ = theirs[0]
    folder = os.path.dirname(kernel.co_filename)
    code, line = next((c, n) for c, n in reversed(theirs) if os.path.dirname(c.co_filename) == folder)
    what = f"the kernel {kernel.co_name}" if kernel.co_name in contracts() else kernel.co_name
    return f"{message_of(error)}; raised in {what} at {code.co_filename}:{line}"


def by_kernel(error: BaseException) -> bool:
    """Whether a kernel raised it: a binding says before a kernel that it does not take a call."""
    module = [f.f_globals.get("__name__", "") for f, _ in walk_tb(error.__traceback__)][-1]
    return not module.startswith(("porthal.hal", "porthal.conformance"))


def _of_the_suite(module: str) -> bool:
    """Whether a frame is no kernel's and no service's: porthal's but for its backends, or what it uses itself."""
    root = module.partition(".")[0]
    return root in (*sys.stdlib_module_names, "numpy") or (root == "porthal" and not module.startswith("porthal.backends."))


def named(binding: Binding, contract: Contract, out: Any) -> dict[str, Any]:
    """What a kernel returned, by the names of the results; UsageError where one is not of the kind that the contract says."""
    found = contract.named(out)
    for result in contract.signature.results:
        value = found[result.name]
        if result.kind != ARRAY:
            right, expected = isinstance(value, KINDS[result.kind]), f"a {result.kind}"
        else:
            right, expected = not (why := binding.backend.refuses_array(value)), (why or "").partition("expected ")[2]
        if not right:
            what = f"{contract.name} returned {type(value).__name__} for {result.name}, expected {expected or 'an array'}"
            code = getattr(inspect.unwrap(getattr(binding, contract.name)), "__code__", None)
            raise WrongResult(what + (f"; the kernel is at {code.co_filename}:{code.co_firstlineno}" if code else ""))
    return found


def bits(x: Array) -> Array:
    """An array's bits, all NaN alike."""
    x = np.ascontiguousarray(x)
    if not is_float(dtype(x)):
        return x
    found = x.view(f"u{x.dtype.itemsize}")
    if (nan := np.isnan(x)).any():
        found = found.copy()
        found[nan] = np.array(np.nan, x.dtype).view(found.dtype)
    return found


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same bits throughout, of NaN as well; cheaper than to say where they differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.nbytes > WORDS and a.nbytes % 8 == 0 and a.flags.c_contiguous and b.flags.c_contiguous:
        a, b = a.reshape(-1).view(np.uint64), b.reshape(-1).view(np.uint64)
    word = f"u{a.dtype.itemsize}"
    return bool((a.view(word) == b.view(word)).all())


def differing(a: Array, b: Array) -> Array:
    """Where the bits of two arrays of one shape differ, all NaN alike."""
    return np.zeros(a.shape, bool) if same_bits(a, b) else bits(a) != bits(b)


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """The first element whose bits differ: "y[3, 5] is 1.5, then 1.25"; "" where none does."""
    for name, one in first.items():
        other = second[name]
        pairs = [(f"{name}.{part}", one[part], other[part]) for part in one] if isinstance(one, dict) else [(name, one, other)]
        for what, a, b in pairs:
            if a.shape != b.shape:
                return f"{what} has shape {list(a.shape)}, then {list(b.shape)}"
            if (differs := differing(a, b)).any():
                at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differs)), differs.shape))
                return f"{what}{list(at)} is {a[at]}, then {b[at]}"
    return ""
