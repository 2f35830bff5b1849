"""Calls of several ranks over torch.distributed, by the engine of each vendor: gloo, nccl, hccl and their like.

An engine compares nothing among ranks: gloo keeps stale rows where sizes do not fit, and reads one dtype as another. So it is
only asked once all ranks have agreed on a call, over sockets, which also name the rank that is missing where it fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from porthal.backends.torch.schemes import Coded, quantised
from porthal.hal import Communicator, NotClaimed, PeerLost, scheme_of
from porthal.hal.errors import message_of
from porthal.hal.scheme import NONE
from porthal.hal.wire import Sockets, Wire, joined

# PyTorch 2.13 has new names for these two, and warns of the old ones, which vendors' releases have.
gather_rows = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
scatter_sum = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def number_of_rank(count: int) -> int:
    """Which of so many devices a process takes where none is named: each of several ranks its own, while there are as many."""
    rank = os.environ.get("RANK", "")
    return int(rank) % count if rank.isdecimal() and count else 0


class Engine(Wire):
    """Ranks that have sockets to agree, and a process group to move tensors."""

    def __init__(self, sockets: Sockets, group: Any, emulated: bool) -> None:
        super().__init__(sockets.rank, sockets.members, sockets.timeout)
        self.sockets, self.process_group, self.emulated = sockets, group, emulated

    def gather(self, what: str, message: bytes) -> list[bytes]:
        return self.sockets.gather(what, message)

    def moved(self, what: str, call: Callable[..., Any], tensors: Sequence[Tensor], *more: Any) -> None:
        """What the engine does with tensors, of which the first is the result; by way of the host where the device is emulated.
        Where it fails, the sockets say which rank is missing."""
        given = [tensor.cpu() for tensor in tensors] if self.emulated else tensors
        try:
            call(*given, *more, group=self.process_group)
        except RuntimeError as error:
            self.gather(what, b"")
            rank = self.members[self.rank]
            self.broken = f"{what} on rank {rank}: {message_of(error)}: start all ranks again"
            raise PeerLost(self.broken) from error
        if self.emulated:
            tensors[0].copy_(given[0])

    @contextmanager
    def _opened(self, chosen: tuple[int, ...]) -> Iterator[Any]:
        def join(address: str) -> Wire:
            ranks = [self.members[rank] for rank in chosen]
            return Engine(inner(address), dist.new_group(ranks, use_local_synchronization=True), self.emulated)

        with self.sockets._opened(chosen) as (address, inner):
            yield address, join

    def close(self) -> None:
        super().close()
        self.sockets.close()
        if dist.is_initialized() and self.process_group is dist.group.WORLD:
            dist.destroy_process_group()


class Collectives:
    """Sums are made in float32 and rounded once."""

    engine: ClassVar[str] = "nccl"  # of devices; the CPU has gloo, and what is emulated on it
    name: str
    device: str
    empty: Any

    def communicator(self: Any, timeout: float = 60.0) -> Communicator:
        emulated = self.place == "emulated device"
        engine = "gloo" if emulated or torch.device(self.device).type == "cpu" else self.engine
        if not dist.is_backend_available(engine):
            raise NotClaimed(f"ranks of {self} meet by {engine!r}, which torch.distributed has from the vendor's package alone")
        sockets = joined(timeout, self.name)
        if engine != "gloo" and sockets.size > (count := getattr(torch, torch.device(self.device).type).device_count()):
            sockets.close()
            raise NotClaimed(
                f"{sockets.size} ranks of {self.name} need a device each by {engine!r}, and PyTorch sees {count}: start {count}"
            )
        if sockets.rank:
            (port, *_) = map(int, sockets.gather("start", b"0"))
            store = dist.TCPStore("localhost", port, sockets.size, False, timedelta(seconds=timeout))
        else:
            store = dist.TCPStore("localhost", 0, sockets.size, True, timedelta(seconds=timeout), wait_for_workers=False)
            sockets.gather("start", str(store.port).encode())
        dist.init_process_group(
            engine, store=store, rank=sockets.rank, world_size=sockets.size, timeout=timedelta(seconds=timeout)
        )
        return Communicator.over(Engine(sockets, dist.group.WORLD, emulated))

    def all_to_all(self, x: Tensor, comm: Communicator) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        comm.native.moved("all_to_all", dist.all_to_all_single, [y, x.contiguous()])
        return y

    def all_to_all_v(self, x: Tensor, send: Tensor, comm: Communicator, *, M: int) -> tuple[Tensor, Tensor]:
        counts = comm.told[:, :-1]
        y = self.empty((M, x.shape[1]), str(x.dtype).removeprefix("torch."))
        _move("all_to_all_v", x[: counts[comm.rank].sum()], comm, counts, y)
        return y, self._counts(counts[:, comm.rank])

    def all_gather(self, x: Tensor, comm: Communicator) -> Tensor:
        y = x.new_empty((comm.size * x.shape[0], x.shape[1]))
        comm.native.moved("all_gather", gather_rows, [y, x.contiguous()])
        return y

    def all_gather_v(self, x: Tensor, comm: Communicator, *, M: int) -> tuple[Tensor, Tensor]:
        rows = comm.told[:, 0]
        padded = x.new_empty((int(rows.max()), x.shape[1]))  # engines gather equal parts
        padded[: len(x)] = x
        parts = self.all_gather(padded, comm).unflatten(0, (comm.size, -1)) if rows.max() else padded[None]
        y = x.new_empty((M, x.shape[1]))
        torch.cat([part[:count] for part, count in zip(parts, rows)], out=y[: rows.sum()])
        return y, self._counts(rows)

    def all_reduce(self, x: Tensor, comm: Communicator) -> Tensor:
        y = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        comm.native.moved("all_reduce", dist.all_reduce, [y])
        return y.to(x.dtype)

    def reduce_scatter(self, x: Tensor, comm: Communicator) -> Tensor:
        y = torch.empty((x.shape[0] // comm.size, x.shape[1]), device=x.device)
        comm.native.moved("reduce_scatter", scatter_sum, [y, x.float().contiguous()])
        return y.to(x.dtype)

    def broadcast(self, x: Tensor, comm: Communicator, *, root: int = 0) -> Tensor:
        y = x.clone(memory_format=torch.contiguous_format)
        comm.native.moved("broadcast", dist.broadcast, [y], comm.native.members[root])
        return y

    def barrier(self, comm: Communicator) -> Tensor:
        return self._counts(np.ones(comm.size))

    def ep_dispatch(
        self, x: Tensor, ids: Tensor, comm: Communicator, *, E: int, M: int, payload: str = NONE
    ) -> tuple[Tensor, Tensor]:
        first, last = (r * E // comm.size for r in (comm.rank, comm.rank + 1))
        tokens, counts = _by_expert(ids) // max(ids.shape[1], 1), _per_rank(comm, E)
        rows, total = x.new_empty((M, x.shape[1])), int(counts[:, comm.rank].sum())
        arrived = []
        for part in _parts(payload, x):
            arrived.append(rows if payload == NONE else part.new_empty((total, part.shape[1])))
            _move("ep_dispatch", part.index_select(0, tokens), comm, counts, arrived[-1])
        if payload != NONE:
            rows[:total] = _numbers(payload, arrived)
        here = np.full((M, 1), -1, np.int32)
        here[:total, 0] = np.concatenate([np.repeat(np.arange(first, last), counts[first:last]) for counts in comm.told])
        return rows, torch.from_numpy(here).to(x.device)

    def ep_combine(
        self, rows: Tensor, ids: Tensor, weights: Tensor, comm: Communicator, *, E: int, payload: str = NONE
    ) -> Tensor:
        counts, order = _per_rank(comm, E), _by_expert(ids)
        arrived = []
        for part in _parts(payload, rows[: counts[:, comm.rank].sum()]):
            arrived.append(part.new_empty((len(order), part.shape[1])))
            _move("ep_combine", part, comm, counts.T, arrived[-1])
        back = torch.zeros((ids.numel(), rows.shape[1]), device=rows.device)
        back.index_copy_(0, order, arrived[0].float() if payload == NONE else _numbers(payload, arrived))
        parts = back.reshape(*ids.shape, rows.shape[1])
        y = torch.zeros((len(ids), rows.shape[1]), device=rows.device)
        for j in range(ids.shape[1]):  # the order of j is the contract's
            y += parts[:, j] * weights[:, j : j + 1]
        return y.to(rows.dtype)

    def _counts(self, counts: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(counts, np.int32)).to(self.device)


def _move(what: str, x: Tensor, comm: Communicator, counts: Any, y: Tensor) -> None:
    """Fill y with the rows that are for this rank, where rank r sends counts[r, s] rows to s, one behind the other."""
    sent, arriving = (list(map(int, c)) for c in (counts[comm.rank], counts[:, comm.rank]))
    comm.native.moved(what, dist.all_to_all_single, [y[: sum(arriving)], x.contiguous()], arriving, sent)


def _parts(payload: str, x: Tensor) -> list[Tensor]:
    """What is sent of rows: themselves, or their codes and scales, of a dtype that every engine moves."""
    return [x] if payload == NONE else list(quantised(scheme_of(payload), x).values())


def _numbers(payload: str, parts: list[Tensor]) -> Tensor:
    return Coded(scheme_of(payload), *parts).numbers()


def _per_rank(comm: Communicator, E: int) -> Any:
    """[r, s]: how many rows rank r sends to rank s."""
    cuts = [r * E // comm.size for r in range(comm.size + 1)]
    return np.stack([comm.told[:, low:high].sum(1) for low, high in pairwise(cuts)], axis=1)


def _by_expert(ids: Tensor) -> Tensor:
    """The places of ids in the order of expert, those without one left out."""
    flat = ids.flatten()
    return torch.argsort(flat, stable=True)[int((flat < 0).sum()) :]
