"""Calls of several ranks: each rank copies its part from the memory of the others, once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any
from weakref import ref

import numpy as np

from porthal.backends.cpu.ranks import SharedMemory
from porthal.backends.reference.backend import Reference
from porthal.hal import Communicator, dtype, limits, scheme_of
from porthal.hal.scheme import NONE
from porthal.hal.wire import joined

Array = np.ndarray[Any, Any]
OWN = limits(provider="shared memory")
LARGE = 1 << 14  # elements of an array that ranks share, and that is not faulted in anew by each call


def carrying(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Of a kernel whose one exchange takes along what this rank says of the call."""
    vars(kernel)["carries"] = True
    return OWN(kernel)


class Collectives(Reference):
    """Sums are made in float32, in the order of ranks, and rounded once."""

    native: Any
    moe_unpermute: Any
    shared: ref[SharedMemory] | None = None

    def communicator(self, timeout: float = 60.0) -> Communicator:
        sockets = joined(timeout, self.name)
        if sockets.size == 1:
            return Communicator.over(sockets)
        wire = SharedMemory(self.native, sockets)
        self.shared = ref(wire)
        return Communicator.over(wire)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Where ranks share memory, what is large lies there, and is lent to others without a copy."""
        wire = self.shared() if self.shared and prod(shape) > LARGE else None
        found = wire.fitting(shape, dtype) if wire else None
        return super().empty(shape, dtype) if found is None else found

    @carrying
    def all_to_all(self, x: Array, comm: Communicator) -> Array:
        y, n = self.empty(x.shape, dtype(x)), x.shape[0] // comm.size
        comm.native.pull("all_to_all", x, [comm.rank * n] * comm.size, [n] * comm.size, y)
        return y

    @OWN
    def all_to_all_v(self, x: Array, send: Array, comm: Communicator, *, M: int) -> tuple[Array, Array]:
        counts = comm.told[:, :-1]
        starts = np.cumsum(counts, axis=1) - counts
        y = self.empty((M, x.shape[1]), dtype(x))
        comm.native.pull("all_to_all_v", x, starts[:, comm.rank].tolist(), counts[:, comm.rank].tolist(), y)
        return y, self._counts(counts[:, comm.rank])

    @carrying
    def all_gather(self, x: Array, comm: Communicator) -> Array:
        y = self.empty((comm.size * x.shape[0], x.shape[1]), dtype(x))
        comm.native.pull("all_gather", x, [0] * comm.size, [x.shape[0]] * comm.size, y)
        return y

    @OWN
    def all_gather_v(self, x: Array, comm: Communicator, *, M: int) -> tuple[Array, Array]:
        y, rows = self.empty((M, x.shape[1]), dtype(x)), comm.told[:, 0]
        comm.native.pull("all_gather_v", x, [0] * comm.size, rows.tolist(), y)
        return y, self._counts(rows)

    @carrying
    def all_reduce(self, x: Array, comm: Communicator) -> Array:
        y = self.empty(x.shape, dtype(x))
        comm.native.sum("all_reduce", x, y)
        return y

    @carrying
    def reduce_scatter(self, x: Array, comm: Communicator) -> Array:
        y = self.empty((x.shape[0] // comm.size, x.shape[1]), dtype(x))
        comm.native.sum("reduce_scatter", x, y, whole=False)
        return y

    @carrying
    def broadcast(self, x: Array, comm: Communicator, *, root: int = 0) -> Array:
        y, n = self.empty(x.shape, dtype(x)), x.shape[0]
        counts = [n * (rank == root) for rank in range(comm.size)]
        comm.native.pull("broadcast", x if comm.rank == root else x[:0], [0] * comm.size, counts, y)
        return y

    @OWN
    def barrier(self, comm: Communicator) -> Array:
        return self._counts(np.ones(comm.size))

    @OWN
    def ep_dispatch(
        self, x: Array, ids: Array, comm: Communicator, *, E: int, M: int, payload: str = NONE
    ) -> tuple[Array, Array]:
        first, last = (r * E // comm.size for r in (comm.rank, comm.rank + 1))
        counts = _per_rank(comm, E)
        starts = (np.cumsum(counts, axis=1) - counts)[:, comm.rank].tolist()
        arriving = counts[:, comm.rank].tolist()
        tokens = (_by_expert(ids) // max(ids.shape[1], 1)).astype(np.int32)
        rows, expert = self.empty((M, x.shape[1]), dtype(x)), self.empty((M, 1), "int32")
        total = sum(arriving)
        parts = [(x, rows)]
        if payload != NONE:
            parts = [(part, np.empty((total, part.shape[1]), part.dtype)) for part in _coded(payload, x)]
        for part, there in parts:
            comm.native.pull("ep_dispatch", part, starts, arriving, there, tokens)
        if payload != NONE:
            rows[:total] = _numbers(payload, *(there for _, there in parts))
        here = [np.repeat(np.arange(first, last), counts[first:last]) for counts in comm.told]
        expert[:total, 0] = np.concatenate(here)
        expert[total:] = -1
        return rows, expert

    @OWN
    def ep_combine(
        self, rows: Array, ids: Array, weights: Array, comm: Communicator, *, E: int, payload: str = NONE
    ) -> Array:
        counts, order = _per_rank(comm, E), _by_expert(ids)
        starts = (np.cumsum(counts, axis=0) - counts)[comm.rank].tolist()  # of the rows on each rank, where this one's begin
        arriving = counts[comm.rank].tolist()
        mine = rows[: counts[:, comm.rank].sum()]
        y = self.empty((len(ids), rows.shape[1]), dtype(rows))
        if payload == NONE:
            comm.native.mix("ep_combine", mine, starts, arriving, order, weights, y)
            return y
        back = [(part, np.empty((len(order), part.shape[1]), part.dtype)) for part in _coded(payload, mine)]
        for part, there in back:
            comm.native.pull("ep_combine", part, starts, arriving, there)
        source = np.full(ids.size, -1, np.int32)
        source[: len(order)] = order
        wide = np.zeros((ids.size, rows.shape[1]), np.float32)
        wide[: len(order)] = _numbers(payload, *(there for _, there in back))
        y[...] = self.moe_unpermute(wide, source, weights)
        return y

    def _counts(self, counts: Array) -> Array:
        made = self.empty(counts.shape, "int32")
        made[...] = counts
        return made


def _coded(payload: str, x: Array) -> tuple[Array, Array]:
    """Codes and scales of rows."""
    scheme, x = scheme_of(payload), x.astype(np.float32)
    scale = scheme.scales(x)["scale"].astype(np.float32)
    return scheme.coded(x / scheme.spread(scale, x.shape)), scale


def _numbers(payload: str, codes: Array, scale: Array) -> Array:
    scheme = scheme_of(payload)
    return scheme.decoded(codes).astype(np.float32) * scheme.spread(scale, codes.shape)


def _per_rank(comm: Communicator, E: int) -> Array:
    """[r, s]: how many rows rank r sends to rank s."""
    cuts = [r * E // comm.size for r in range(comm.size + 1)]
    return np.stack([comm.told[:, low:high].sum(1) for low, high in pairwise(cuts)], axis=1)


def _by_expert(ids: Array) -> Array:
    """The places of ids in the order of expert, those without one left out."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return order[np.count_nonzero(flat < 0) :]
