"""Mistakes in calls of several ranks, planted in right kernels: what ranks have got wrong in public, and what they could.

Ranks are threads here, so that a mistake costs no processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np

from porthal.backends.cpu.backend import Cpu
from porthal.backends.cpu.collectives import Collectives
from porthal.backends.cpu.routing import Routing
from porthal.conformance.cases.plan import cases
from porthal.conformance.cases.ranked import world
from porthal.conformance.execution.bindings import Bindings
from porthal.conformance.runner.ranked import in_threads
from porthal.conformance.verdicts import Judgement
from porthal.hal import collectives, limits, narrow
from porthal.hal.scheme import NONE, Scheme

Array = np.ndarray[Any, Any]
Kernel = Callable[..., Any]
MOST = 4  # ranks
right = Collectives
_runs = count()


class Planted(Collectives, Routing):
    """Right kernels, one of which a mistake replaces."""

    name = "planted"
    native = Cpu.native


DEFECTS: dict[str, tuple[str, Kernel]] = {}  # what is wrong -> the op, and its kernel


def wrong(op: str, what: str) -> Callable[[Kernel], Kernel]:
    """Enter a kernel under what is wrong with it."""

    def enter(kernel: Kernel) -> Kernel:
        DEFECTS[f"{op}: {what}"] = op, kernel
        return kernel

    return enter


def caught(defect: str, level: str = "bring-up") -> Iterator[tuple[str, Judgement]]:
    """The cases that find a mistake, with their judgements."""
    op, kernel = DEFECTS[defect]
    bindings = Bindings(type("Planted", (Planted,), {op: limits(provider="planted")(kernel)})())
    for case in [case for case in cases(collectives()[op], level) if world(case) <= MOST]:
        judged = in_threads(case, bindings, level)
        if judged.verdict != "PASS":
            yield case.token, judged


def _after(op: str, what: str, change: Callable[..., Any]) -> None:
    """A mistake in results: change(results..., comm, x, attributes)."""

    def kernel(self: Any, *operands: Any, **attrs: Any) -> Any:
        out = getattr(right, op)(self, *operands, **attrs)
        return change(*(out if isinstance(out, tuple) else (out,)), comm=operands[-1], x=operands[0], attrs=attrs)

    DEFECTS[f"{op}: {what}"] = op, kernel


def _blocks(y: Array, ranks: int) -> Array:
    return y.reshape(ranks, -1, y.shape[1])


def _put(y: Array, at: Any, value: Any) -> Array:
    made = y.copy()
    made[at] = value
    return made


def _rows(comm: Any, n: int) -> slice:
    return slice(comm.rank * n, (comm.rank + 1) * n)


# -- equal parts ---------------------------------------------------------------------------------------------------------

_after("all_to_all", "the block for itself is missing", lambda y, comm, x, attrs: _put(y, _rows(comm, len(y) // comm.size), 0))
_after("all_to_all", "blocks lie in reverse", lambda y, comm, x, attrs: _blocks(y, comm.size)[::-1].reshape(y.shape))
_after("all_to_all", "blocks are interleaved, a reshape too much (DeepSpeed#5664)",
       lambda y, comm, x, attrs: _blocks(y, comm.size).swapaxes(0, 1).reshape(y.shape))
_after("all_to_all", "zeros on more than two ranks (MindAct#2498)", lambda y, comm, x, attrs: y * (comm.size <= 2))
_after("all_to_all", "floats travel as float16", lambda y, comm, x, attrs: y if y.dtype.kind in "iu" else narrow(
    narrow(y.astype(np.float64), "float16").astype(np.float64), str(y.dtype)))  # fmt: skip
_after("all_to_all", "bytes lose their sign", lambda y, comm, x, attrs: np.abs(y) if y.dtype == np.int8 else y)
_after("all_to_all", "NaN becomes zero", lambda y, comm, x, attrs: np.where(y != y, y.dtype.type(0), y))
_after("all_gather", "ranks in reverse", lambda y, comm, x, attrs: _blocks(y, comm.size)[::-1].reshape(y.shape))
_after("all_gather", "its own rows in all places", lambda y, comm, x, attrs: np.tile(x, (comm.size, 1)))
_after("all_gather", "the last row of the last rank is missing", lambda y, comm, x, attrs: _put(y, slice(-1, None), 0))
_after("broadcast", "the root itself gets nothing", lambda y, comm, x, attrs: y * (comm.rank != attrs.get("root", 0)))
_after("broadcast", "a rank keeps what it gave", lambda y, comm, x, attrs: x if comm.rank == comm.size - 1 else y)
_after("barrier", "only its own place is set", lambda y, comm, x, attrs: np.eye(comm.size, dtype=np.int32)[comm.rank])


@wrong("all_to_all", "the sender's place is taken for the receiver's")
def _(self: Any, x: Array, comm: Any) -> Array:
    n = len(x) // comm.size
    with comm.native.lent("x", x) as everyone:
        return np.concatenate([theirs[s * n : (s + 1) * n] for s, theirs in enumerate(everyone)])


@wrong("all_to_all", "strides are not looked at")
def _(self: Any, x: Array, comm: Any) -> Array:
    dense = x if x.flags.c_contiguous else x.T.reshape(x.shape)
    return right.all_to_all(self, np.ascontiguousarray(dense), comm)


@wrong("all_to_all", "an empty block ends it (pytorch#146468)")
def _(self: Any, x: Array, comm: Any) -> Array:
    assert len(x), "no rows"
    return right.all_to_all(self, x, comm)


@wrong("broadcast", "the root is always rank 0")
def _(self: Any, x: Array, comm: Any, *, root: int = 0) -> Array:
    return right.broadcast(self, x, comm)


# -- uneven parts --------------------------------------------------------------------------------------------------------

_after("all_to_all_v", "receive is what was sent", lambda y, receive, comm, x, attrs: (
    y, comm.told[comm.rank, :-1].astype(np.int32)))  # fmt: skip
_after("all_to_all_v", "receive has 64 bits", lambda y, receive, comm, x, attrs: (y, receive.astype(np.int64)))
_after("all_to_all_v", "the last row that arrives is missing", lambda y, receive, comm, x, attrs: (
    _put(y, slice(max(receive.sum() - 1, 0), receive.sum()), 0), receive))  # fmt: skip
_after("all_to_all_v", "zeros on more than two ranks (MindAct#2498)", lambda y, receive, comm, x, attrs: (
    y * (comm.size <= 2), receive))  # fmt: skip
_after("all_to_all_v", "stale rows behind the first rank's (gloo)", lambda y, receive, comm, x, attrs: (
    _put(y, slice(receive[0], receive.sum()), 1), receive))  # fmt: skip
_after("all_to_all_v", "one row less than M", lambda y, receive, comm, x, attrs: (y[:-1], receive))
_after("all_gather_v", "padding stays between the ranks", lambda y, receive, comm, x, attrs: (
    np.roll(y, 1, axis=0) if len(set(receive.tolist())) > 1 else y, receive))  # fmt: skip
_after("all_gather_v", "receive in reverse", lambda y, receive, comm, x, attrs: (y, receive[::-1].copy()))
_after("all_gather_v", "a rank without rows counts as one", lambda y, receive, comm, x, attrs: (y, np.maximum(receive, 1)))


@wrong("all_to_all_v", "equal parts are taken")
def _(self: Any, x: Array, send: Array, comm: Any, *, M: int) -> Any:
    told = comm.told.copy()
    told[:, :-1] = told[:, :-1].sum(1, keepdims=True) // comm.size
    y, _ = right.all_to_all_v(self, x, send, comm.knowing(told), M=M)
    return y, right.all_to_all_v(self, x, send, comm, M=M)[1]


@wrong("all_to_all_v", "the rows for itself stay away")
def _(self: Any, x: Array, send: Array, comm: Any, *, M: int) -> Any:
    y, receive = right.all_to_all_v(self, x, send, comm, M=M)
    first = receive[: comm.rank].sum()
    return _put(y, slice(first, first + receive[comm.rank]), 0), receive


@wrong("all_to_all_v", "x is overwritten")
def _(self: Any, x: Array, send: Array, comm: Any, *, M: int) -> Any:
    out = right.all_to_all_v(self, x, send, comm, M=M)
    x[:1] = 0
    return out


# -- sums ----------------------------------------------------------------------------------------------------------------

for op in ("all_reduce", "reduce_scatter"):
    _after(op, "its own part is added twice (vllm-ascend#6710)", lambda y, comm, x, attrs: y + x[: len(y)])
    _after(op, "the mean", lambda y, comm, x, attrs: (y / y.dtype.type(comm.size)).astype(y.dtype))
    _after(op, "nothing is added", lambda y, comm, x, attrs: x[: len(y)].copy())
    _after(op, "float32 is rounded to bfloat16", lambda y, comm, x, attrs: narrow(
        narrow(y.astype(np.float64), "bfloat16").astype(np.float64), str(y.dtype)))  # fmt: skip
    _after(op, "NaN is lost", lambda y, comm, x, attrs: np.where(y != y, y.dtype.type(0), y))
_after("all_reduce", "a rank has other bits", lambda y, comm, x, attrs: y if comm.rank != 1 or y.dtype != np.float32 else
       np.nextafter(y, np.float32(np.inf)))  # fmt: skip
_after("all_reduce", "the last bit changes from run to run", lambda y, comm, x, attrs: y if next(_runs) % 7 else
       np.nextafter(y, y.dtype.type(9)) if y.dtype == np.float32 else y)  # fmt: skip
_after("reduce_scatter", "rows of a block are in reverse", lambda y, comm, x, attrs: y[::-1].copy())


@wrong("all_reduce", "each rank adds from itself on")
def _(self: Any, x: Array, comm: Any) -> Array:
    with comm.native.lent("x", x) as everyone:
        turned = [*everyone[comm.rank :], *everyone[: comm.rank]]
        y = turned[0].astype(np.float32)
        for each in turned[1:]:
            y = y + each.astype(np.float32)
        return y.astype(x.dtype)


@wrong("all_reduce", "the last rank is forgotten")
def _(self: Any, x: Array, comm: Any) -> Array:
    return right.all_reduce(self, x * (comm.rank != comm.size - 1), comm)


@wrong("reduce_scatter", "the next rank's block")
def _(self: Any, x: Array, comm: Any) -> Array:
    return right.reduce_scatter(self, np.roll(x, len(x) // comm.size, axis=0), comm)


# -- experts -------------------------------------------------------------------------------------------------------------

_after("ep_dispatch", "experts count from 0 on each rank", lambda rows, expert, comm, x, attrs: (
    rows, np.where(expert < 0, -1, expert - comm.rank * attrs["E"] // comm.size).astype(np.int32)))  # fmt: skip
_after("ep_dispatch", "expert 0 behind the rows", lambda rows, expert, comm, x, attrs: (rows, np.maximum(expert, 0)))
_after("ep_dispatch", "the first row of each rank for all", lambda rows, expert, comm, x, attrs: (
    np.where(expert < 0, rows, rows[:1]), expert))  # fmt: skip


@wrong("ep_dispatch", "rows in the order of t")
def _(self: Any, x: Array, ids: Array, comm: Any, *, E: int, M: int) -> Any:
    rows, expert = right.ep_dispatch(self, x, ids, comm, E=E, M=M)
    kept = np.flatnonzero(expert[:, 0] >= 0)
    order = np.lexsort(rows[kept].T) if len(kept) else kept
    return _put(rows, kept, rows[kept][order]), expert


@wrong("ep_dispatch", "an id of -1 goes to the last expert")
def _(self: Any, x: Array, ids: Array, comm: Any, *, E: int, M: int) -> Any:
    counts = np.stack([told + (np.arange(E) == E - 1) * 0 for told in comm.told])
    last = np.where(ids < 0, E - 1, ids)
    heard = comm.exchange("ids", {"ids": last})
    told = np.stack([np.bincount(each["ids"].reshape(-1), minlength=E) for each in heard]).astype(np.int64)
    return right.ep_dispatch(self, x, last, comm.knowing(np.maximum(counts, told)), E=E, M=M)


@wrong("ep_combine", "weights are not applied")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    return right.ep_combine(self, rows, ids, np.ones_like(weights), comm, E=E)


@wrong("ep_combine", "weights in reverse")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    return right.ep_combine(self, rows, ids, weights[:, ::-1], comm, E=E)


@wrong("ep_combine", "weights are rounded to bfloat16")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    rounded = narrow(weights.astype(np.float64), "bfloat16").astype(np.float32)
    return right.ep_combine(self, rows, ids, rounded, comm, E=E)


@wrong("ep_combine", "it is reduced over the ranks once more (vllm-ascend#10557)")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    return right.ep_combine(self, rows, ids, weights * np.float32(comm.size), comm, E=E)


@wrong("ep_combine", "rows are taken in reverse")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    return right.ep_combine(self, rows[::-1].copy(), ids, weights, comm, E=E)


@wrong("ep_combine", "places without an expert add the first row")
def _(self: Any, rows: Array, ids: Array, weights: Array, comm: Any, *, E: int) -> Array:
    y = right.ep_combine(self, rows, ids, weights, comm, E=E)
    empty = np.any(ids < 0, axis=1, keepdims=True)
    return (y + rows[:1] * empty).astype(y.dtype) if len(y) else y


# -- codes and scales ----------------------------------------------------------------------------------------------------


def _payload(op: str, what: str, change: Callable[..., Any]) -> None:
    """A mistake in rows under a scheme: change(rows, payload) before they are sent."""

    def kernel(self: Any, rows: Array, *operands: Any, payload: str = NONE, **attrs: Any) -> Any:
        given = rows if payload == NONE else change(rows, payload).astype(rows.dtype)
        return getattr(right, op)(self, given, *operands, payload=payload, **attrs)

    DEFECTS[f"{op}: {what}"] = op, kernel


def _other(rows: Array, scheme: Scheme) -> Array:
    """Rows as another scheme has them."""
    return scheme.rounded(rows.astype(np.float64)) if rows.size else rows


for op in ("ep_dispatch", "ep_combine"):
    _payload(op, "codes without their scales", lambda rows, payload: rows / np.where(
        rows.any(1, keepdims=True), np.abs(rows.astype(np.float32)).max(1, keepdims=True, initial=1e-9), 1))  # fmt: skip
    _payload(op, "the scale of the first row for all", lambda rows, payload: rows * (
        np.abs(rows[:1].astype(np.float32)).max(initial=1e-9) / np.maximum(
            np.abs(rows.astype(np.float32)).max(1, keepdims=True, initial=0), 1e-9)))  # fmt: skip
    _payload(op, "four bits", lambda rows, payload: _other(rows, Scheme("", "int4", (1, 0))))
    _payload(op, "codes toward zero", lambda rows, payload: rows * np.float32(0.995))
    _payload(op, "groups of 128 share the scale of the row", lambda rows, payload: rows if payload == "int8_token" else _other(
        rows, Scheme("", "float8_e4m3fn", (1, 0))))  # fmt: skip
