"""The wire of ranks on one machine: memory that all of them map, freed by the system when the last of them is gone."""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import finalize

import numpy as np

from porthal.hal import PeerLost, UsageError, numpy_dtype
from porthal.hal.wire import Differ, Sizes, Sockets, Wire

SEGMENT = 1 << 32  # bytes of a rank's part, of which only what was written takes memory
LINE = 64
Array = np.ndarray[Any, Any]


class _Block:
    """Bytes of a segment, which are taken as long as an array over them lives: NumPy lets views keep it alive, where it would
    let go of an array that is a view itself."""

    def __init__(self, wire: SharedMemory, at: int, count: int, taken: int) -> None:
        self.segment, self.returned, self.place = wire.segments[wire.rank], wire.returned, (at, taken)
        self.__array_interface__ = {"shape": (count,), "typestr": "|u1", "data": (wire.first + at, False), "version": 3}

    def __del__(self) -> None:
        self.returned.append(self.place)  # at any time, so nothing else is touched


class SharedMemory(Wire):
    """Ranks that share memory. What a rank sends lies in its own segment, from which each other rank copies its part."""

    carries = True

    def __init__(self, native: Any, sockets: Sockets) -> None:
        super().__init__(sockets.rank, sockets.members, sockets.timeout)
        self.sockets, self.native = sockets, native
        memory, lives = _shared(native, sockets)
        try:
            self.meeting = native.Meeting(memory, self.rank, self.size, SEGMENT, lives)
        finally:
            os.close(memory)  # the mapping keeps it
        finalize(self, _closed, lives)
        self.segments = [self.meeting.segment(rank) for rank in range(self.size)]
        self.first = self.segments[self.rank].__array_interface__["data"][0]
        self.room = native.Meeting.room  # bytes that are moved with the message itself
        self.free, self.returned = [(0, SEGMENT)], deque[tuple[int, int]]()

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        return list(self._met(what, self.meeting.gather(message, self.timeout)))

    def _met(self, what: str, found: Any) -> Any:
        """What a meeting returned; PeerLost where that is a rank that is missing."""
        if isinstance(found, int):
            raise self.lost(what, found, self.late()) if found >= 0 else self.lost(what, -1 - found, "is gone")
        return found

    def _made(self, what: str, found: Any) -> None:
        """Of a call that was made by all; Differ where they do not make the same."""
        if self._met(what, found):
            raise Differ(found)

    @contextmanager
    def _opened(self, chosen: tuple[int, ...]) -> Iterator[Any]:
        with self.sockets._opened(chosen) as (address, join):
            yield address, lambda address: SharedMemory(self.native, join(address))

    def close(self) -> None:
        super().close()
        self.sockets.close()

    # -- what lies in the segments -----------------------------------------------------------------------------------

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """An array in this rank's segment, from which others copy without a copy before."""
        found = self.fitting(shape, dtype)
        if found is None:
            raise UsageError(f"{list(shape)} of {dtype} do not fit into the {SEGMENT} bytes per rank that ranks share")
        return found

    def fitting(self, shape: Sequence[int], dtype: str) -> Array | None:
        """The same; None where there is no room, or the group has ended."""
        if self.broken:
            return None
        while self.returned:
            self._freed(*self.returned.popleft())
        kind = numpy_dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        taken = max(-(-count // LINE), 1) * LINE
        for i, (at, room) in enumerate(self.free):
            if room >= taken:
                self.free[i] = (at + taken, room - taken)
                return np.asarray(_Block(self, at, count, taken)).view(kind).reshape(shape)
        return None

    def _freed(self, at: int, taken: int) -> None:
        """Enter what is free again, joined with what is free beside it."""
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self.free, (at, taken)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self.free = merged

    def pull(self, what: str, x: Array, starts: Sizes, counts: Sizes, y: Array, chosen: Array | None = None) -> None:
        row = x.itemsize * math.prod(x.shape[1:])
        x = self._given(x, self.room)
        if chosen is not None:
            chosen = self._given(chosen, self.room - x.nbytes if x.nbytes <= self.room else self.room)
        self._made(what, self.meeting.pull(self.said, x, row, starts, counts, y, chosen, self.timeout))

    def sum(self, what: str, x: Array, y: Array, whole: bool = True) -> None:
        x, made = self._given(x, self.room), y
        if whole and x.nbytes > self.room and not self._lies(y):
            made = self.empty(y.shape, str(y.dtype))
        self._made(what, self.meeting.sum(self.said, x, y, made, whole, self.timeout))

    def mix(self, what: str, x: Array, starts: Sizes, counts: Sizes, place: Array, weights: Array, y: Array) -> None:
        x, weights = self._given(x, self.room), np.ascontiguousarray(weights)
        self._made(what, self.meeting.mix(self.said, x, starts, counts, place, weights, y, self.timeout))

    def _lies(self, x: Array) -> bool:
        """Whether others can read it where it is."""
        return x.flags.c_contiguous and 0 <= x.__array_interface__["data"][0] - self.first < SEGMENT

    def _given(self, x: Array, room: int) -> Array:
        """x as it can be given: dense, and where it does not fit into so many bytes of a message in this rank's segment."""
        if self.broken:
            raise PeerLost(self.broken)
        if x.nbytes <= room:
            return np.ascontiguousarray(x)
        if self._lies(x):
            return x
        staged = self.empty(x.shape, str(x.dtype))
        staged[...] = x
        return staged


def _shared(native: Any, sockets: Sockets) -> tuple[int, list[int]]:
    """Rank 0's memory in every rank, and a descriptor per rank that tells when its process has ended."""
    pids = [int(each) for each in sockets.gather("start", str(os.getpid()).encode())]
    lives = [-1 if pid == os.getpid() else os.pidfd_open(pid) for pid in pids]
    memory = -1
    if sockets.rank == 0:
        memory = os.memfd_create("porthal")
        os.ftruncate(memory, native.Meeting.size(sockets.size, SEGMENT))
        for peer in sockets.peers.values():
            with suppress(OSError):  # who is gone is missed by the next call
                socket.send_fds(peer, [b"m"], [memory])
    else:
        try:
            memory = socket.recv_fds(sockets.peers[0], 1, 1)[1][0]
        except (OSError, IndexError):
            raise sockets.lost("start", 0, "is gone") from None
    return memory, lives


def _closed(lives: Sequence[int]) -> None:
    for life in lives:
        if life >= 0:
            os.close(life)
