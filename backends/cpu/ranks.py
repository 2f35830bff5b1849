"""The wire of ranks on one machine: memory that all of them map, freed by the system when the last of them is gone."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import finalize

import numpy as np

from porthal.hal import PeerLost, UsageError, numpy_dtype
from porthal.hal.wire import Sockets, Wire

SEGMENT = 1 << 32  # bytes of a rank's part, of which only what was written takes memory
LINE = 64
Array = np.ndarray[Any, Any]


class _Block:
    """Bytes of a segment, which are taken as long as an array over them lives: NumPy lets views keep it alive, where it would
    let go of an array that is a view itself."""

    def __init__(self, segment: Array, at: int, count: int) -> None:
        self.segment = segment
        address = segment.__array_interface__["data"][0] + at
        self.__array_interface__ = {"shape": (count,), "typestr": "|u1", "data": (address, False), "version": 3}


class SharedMemory(Wire):
    """Ranks that share memory. What a rank sends lies in its own segment, from which each other rank copies its part."""

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
        self.free = [(0, SEGMENT)]

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        return list(self._met(what, self.meeting.gather(message, self.timeout)))

    def _met(self, what: str, found: Any) -> Any:
        """What a meeting returned; PeerLost where that is a rank that is missing."""
        if isinstance(found, int):
            raise self.lost(what, found, self.late()) if found >= 0 else self.lost(what, -1 - found, "is gone")
        return found

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
        kind = numpy_dtype(dtype)
        count = math.prod(shape) * kind.itemsize
        taken = max(-(-count // LINE), 1) * LINE
        for i, (at, room) in enumerate(self.free):
            if room >= taken:
                self.free[i] = (at + taken, room - taken)
                block = _Block(self.segments[self.rank], at, count)
                finalize(block, self._freed, at, taken)
                return _over(np.asarray(block), shape, kind)
        raise UsageError(f"{count} bytes do not fit into the memory that ranks share, of {SEGMENT} bytes per rank")

    def _freed(self, at: int, taken: int) -> None:
        """Enter what is free again, joined with what is free beside it."""
        merged: list[tuple[int, int]] = []
        for start, room in sorted([*self.free, (at, taken)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((start, room))
        self.free = merged

    def pull(self, what: str, x: Array, starts: Sequence[int], counts: Sequence[int], y: Array) -> None:
        if self.broken:
            raise PeerLost(self.broken)
        if x.nbytes > self.room:
            x, _ = self._placed(x)
        elif not x.flags.c_contiguous:
            x = np.ascontiguousarray(x)
        self._met(what, self.meeting.pull(x, x.itemsize * math.prod(x.shape[1:]), starts, counts, y, self.timeout))

    @contextmanager
    def lent(self, what: str, x: Array) -> Iterator[list[Array]]:
        """The x of every rank while all of them read it: each is used where it lies, if that is a segment."""
        x, at = self._placed(x)
        form = np.array([at, *x.shape], np.int64)
        theirs = [np.frombuffer(each, np.int64).tolist() for each in self.gather(what, form.tobytes())]
        found = []
        for segment, (first, *shape) in zip(self.segments, theirs):
            count = math.prod(shape) * x.dtype.itemsize
            found.append(_over(segment[first : first + count], shape, x.dtype))
        yield found
        self.gather(what, b"")  # nobody may change what another has not read

    def _placed(self, x: Array) -> tuple[Array, int]:
        """x where others can read it, and where in the segment that is."""
        at = x.__array_interface__["data"][0] - self.first
        if x.flags.c_contiguous and 0 <= at < SEGMENT:
            return x, at
        staged = self.empty(x.shape, str(x.dtype))
        staged[...] = x
        return staged, staged.__array_interface__["data"][0] - self.first


def _over(memory: Array, shape: Sequence[int], kind: np.dtype[Any]) -> Array:
    return memory.view(kind).reshape(shape)


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
