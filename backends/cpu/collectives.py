"""Calls of several ranks: each rank copies its part from the memory of the others, once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from porthal.backends.cpu.ranks import SharedMemory
from porthal.backends.reference.backend import Reference
from porthal.hal import Communicator, dtype, limits, scheme_of
from porthal.hal.scheme import NONE
from porthal.hal.wire import joined

Array = np.ndarray[Any, Any]
OWN = limits(provider="shared memory")


class Collectives(Reference):
    """Sums are made in float32, in the order of ranks, and rounded once."""

    native: Any
    moe_unpermute: Any

    def communicator(self, timeout: float = 60.0) -> Communicator:
        sockets = joined(timeout, self.name)
        return Communicator.over(SharedMemory(self.native, sockets) if sockets.size > 1 else sockets)

    @OWN
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

    @OWN
    def all_gather(self, x: Array, comm: Communicator) -> Array:
        y = self.empty((comm.size * x.shape[0], x.shape[1]), dtype(x))
        comm.native.pull("all_gather", x, [0] * comm.size, [x.shape[0]] * comm.size, y)
        return y

    @OWN
    def all_gather_v(self, x: Array, comm: Communicator, *, M: int) -> tuple[Array, Array]:
        y, rows = self.empty((M, x.shape[1]), dtype(x)), comm.told[:, 0]
        comm.native.pull("all_gather_v", x, [0] * comm.size, rows.tolist(), y)
        return y, self._counts(rows)

    @OWN
    def all_reduce(self, x: Array, comm: Communicator) -> Array:
        y = self.empty(x.shape, dtype(x))
        with comm.native.lent("all_reduce", x) as everyone:
            _sum(everyone, y)
        return y

    @OWN
    def reduce_scatter(self, x: Array, comm: Communicator) -> Array:
        n = x.shape[0] // comm.size
        y = self.empty((n, x.shape[1]), dtype(x))
        with comm.native.lent("reduce_scatter", x) as everyone:
            _sum([theirs[comm.rank * n : (comm.rank + 1) * n] for theirs in everyone], y)
        return y

    @OWN
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
        with comm.native.lent("ep_dispatch", tokens) as sent:
            wanted = [each[start : start + count] for each, start, count in zip(sent, starts, arriving)]
            if payload == NONE:
                _take(comm, x, wanted, rows)
            else:
                parts = [(part, np.empty((total, part.shape[1]), part.dtype)) for part in _coded(payload, x)]
                for part, there in parts:
                    _take(comm, part, wanted, there)
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
        parts = [mine] if payload == NONE else _coded(payload, mine)
        back = [self.empty((ids.size, part.shape[1]), dtype(part)) for part in parts]
        for part, there in zip(parts, back):
            comm.native.pull("ep_combine", part, starts, arriving, there)
        source = np.full(ids.size, -1, np.int32)
        source[: len(order)] = order
        if payload == NONE:
            return self.moe_unpermute(*back, source, weights)
        y = self.empty((len(ids), rows.shape[1]), dtype(rows))
        wide = np.zeros((ids.size, rows.shape[1]), np.float32)
        wide[: len(order)] = _numbers(payload, *(part[: len(order)] for part in back))
        y[...] = self.moe_unpermute(wide, source, weights)
        return y

    def _counts(self, counts: Array) -> Array:
        made = self.empty(counts.shape, "int32")
        made[...] = counts
        return made


def _take(comm: Communicator, x: Array, wanted: Sequence[Array], y: Array) -> None:
    """Fill y with the wanted rows of each rank's x, one behind the other."""
    at = 0
    with comm.native.lent("ep_dispatch", x) as everyone:
        for theirs, rows in zip(everyone, wanted):
            if len(rows):
                np.take(theirs, rows, axis=0, out=y[at : at + len(rows)], mode="clip")
            at += len(rows)


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


def _sum(parts: Sequence[Array], y: Array) -> None:
    """Fill y, which is summed in place where it is float32."""
    found = y if y.dtype == np.float32 else np.empty(y.shape, np.float32)
    if found is y and parts[1:]:
        np.add(parts[0], parts[1], out=y)
    else:
        found[...] = parts[0]
    for each in parts[2 if found is y else 1 :]:
        found += each
    if found is not y:
        y[...] = found
