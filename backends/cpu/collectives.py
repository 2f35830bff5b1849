"""Calls of several ranks: each rank copies its part from the memory of the others, once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from porthal.backends.cpu.ranks import SharedMemory
from porthal.backends.reference.backend import Reference
from porthal.hal import Communicator, dtype, limits
from porthal.hal.wire import joined

Array = np.ndarray[Any, Any]
OWN = limits(provider="shared memory")


class Collectives(Reference):
    """Sums are made in float32, in the order of ranks, and rounded once."""

    native: Any

    def communicator(self, timeout: float = 60.0) -> Communicator:
        sockets = joined(timeout)
        return Communicator.over(SharedMemory(self.native, sockets) if sockets.size > 1 else sockets)

    @OWN
    def all_to_all(self, x: Array, comm: Communicator) -> Array:
        y, n = self.empty(x.shape, dtype(x)), x.shape[0] // comm.size
        with comm.native.lent("all_to_all", x) as everyone:
            for rank, theirs in enumerate(everyone):
                y[rank * n : (rank + 1) * n] = theirs[comm.rank * n : (comm.rank + 1) * n]
        return y

    @OWN
    def all_to_all_v(self, x: Array, send: Array, comm: Communicator, *, M: int) -> tuple[Array, Array]:
        counts = comm.told[:, :-1]
        y = self.empty((M, x.shape[1]), dtype(x))
        _pull("all_to_all_v", x, comm, counts, y)
        return y, self._counts(counts[:, comm.rank])

    @OWN
    def all_gather(self, x: Array, comm: Communicator) -> Array:
        y = self.empty((comm.size * x.shape[0], x.shape[1]), dtype(x))
        with comm.native.lent("all_gather", x) as everyone:
            np.concatenate(everyone, out=y)
        return y

    @OWN
    def all_gather_v(self, x: Array, comm: Communicator, *, M: int) -> tuple[Array, Array]:
        y = self.empty((M, x.shape[1]), dtype(x))
        with comm.native.lent("all_gather_v", x) as everyone:
            np.concatenate(everyone, out=y[: comm.told.sum()])
        return y, self._counts(comm.told[:, 0])

    @OWN
    def all_reduce(self, x: Array, comm: Communicator) -> Array:
        y = self.empty(x.shape, dtype(x))
        with comm.native.lent("all_reduce", x) as everyone:
            y[...] = _sum(everyone)
        return y

    @OWN
    def reduce_scatter(self, x: Array, comm: Communicator) -> Array:
        n = x.shape[0] // comm.size
        y = self.empty((n, x.shape[1]), dtype(x))
        with comm.native.lent("reduce_scatter", x) as everyone:
            y[...] = _sum([theirs[comm.rank * n : (comm.rank + 1) * n] for theirs in everyone])
        return y

    @OWN
    def broadcast(self, x: Array, comm: Communicator, *, root: int = 0) -> Array:
        y = self.empty(x.shape, dtype(x))
        with comm.native.lent("broadcast", x if comm.rank == root else x[:0]) as everyone:
            y[...] = everyone[root]
        return y

    @OWN
    def barrier(self, comm: Communicator) -> Array:
        return self._counts(np.ones(comm.size))

    @OWN
    def ep_dispatch(self, x: Array, ids: Array, comm: Communicator, *, E: int, M: int) -> tuple[Array, Array]:
        first, last = (r * E // comm.size for r in (comm.rank, comm.rank + 1))
        order = _by_expert(ids)
        sent = comm.native.empty((len(order), x.shape[1]), dtype(x))
        np.take(x, order // max(ids.shape[1], 1), axis=0, out=sent)
        rows, expert = self.empty((M, x.shape[1]), dtype(x)), self.empty((M, 1), "int32")
        count = _pull("ep_dispatch", sent, comm, _per_rank(comm, E), rows)
        here = [np.repeat(np.arange(first, last), counts[first:last]) for counts in comm.told]
        expert[:count, 0] = np.concatenate(here)
        expert[count:] = -1
        return rows, expert

    @OWN
    def ep_combine(self, rows: Array, ids: Array, weights: Array, comm: Communicator, *, E: int) -> Array:
        counts, order = _per_rank(comm, E), _by_expert(ids)
        starts = np.cumsum(counts, axis=0) - counts  # [rank, s]: where rank's rows begin among those of s
        back = np.zeros((ids.size, rows.shape[1]), np.float32)
        with comm.native.lent("ep_combine", rows[: counts[:, comm.rank].sum()]) as everyone:
            at = 0
            for s, theirs in enumerate(everyone):
                start, count = starts[comm.rank, s], counts[comm.rank, s]
                back[order[at : at + count]] = theirs[start : start + count]
                at += count
        y = np.zeros((ids.shape[0], rows.shape[1]), np.float32)
        for j in range(ids.shape[1]):
            y += back[j :: ids.shape[1]] * weights[:, j : j + 1]
        out = self.empty(y.shape, dtype(rows))
        out[...] = y
        return out

    def _counts(self, counts: Array) -> Array:
        made = self.empty(counts.shape, "int32")
        made[...] = counts
        return made


def _pull(what: str, x: Array, comm: Communicator, counts: Array, y: Array) -> int:
    """Fill y with the rows that are for this rank, where rank r sends counts[r, s] rows to s, one behind the other."""
    starts = np.cumsum(counts, axis=1) - counts
    at = 0
    with comm.native.lent(what, x) as everyone:
        for r, theirs in enumerate(everyone):
            start, count = starts[r, comm.rank], counts[r, comm.rank]
            y[at : at + count] = theirs[start : start + count]
            at += count
    return at


def _per_rank(comm: Communicator, E: int) -> Array:
    """[r, s]: how many rows rank r sends to rank s."""
    cuts = [r * E // comm.size for r in range(comm.size + 1)]
    return np.stack([comm.told[:, low:high].sum(1) for low, high in pairwise(cuts)], axis=1)


def _by_expert(ids: Array) -> Array:
    """The places of ids in the order of expert, those without one left out."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    return order[np.count_nonzero(flat < 0) :]


def _sum(parts: list[Array]) -> Array:
    found = parts[0].astype(np.float32)
    for each in parts[1:]:
        found += each
    return found
