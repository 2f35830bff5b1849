"""What carries messages among the ranks of a group: threads of one process, or processes of one machine.

One thing is asked of a wire: `gather`, in which every rank gives bytes and every rank gets those of all. Kernels that move
much have ways of their own; they agree on each call by this one. No wire waits longer than its timeout, and a group that has
lost a rank is lost: every further call says which.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from porthal.hal.dtypes import numpy_dtype
from porthal.hal.errors import PeerLost, UsageError

Array = np.ndarray[Any, Any]
Sizes = Sequence[int]  # of each rank
LENGTH = struct.Struct("<Q")
GRACE = 1.0  # seconds longer than rank 0 waits another rank, which is thus told who is late
ALL, LOST = b"+", b"-"  # begins what rank 0 answers
HELLO = 1 << 16  # bytes that a first message has at most
VARIABLES = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


class Differ(Exception):
    """Its argument is what all ranks say of their calls, which are not the same."""


class Wire:
    """The ranks of a group as one of them sees them. `members` are their numbers among all ranks, by which errors name them.

    carries  whether `pull`, `sum` and `mix` send `said`, what this rank says of its call, and raise Differ, with nothing done,
             where not all say the same; else ranks agree by `gather` before
    """

    carries = False
    said = b""

    def __init__(self, rank: int, members: Sequence[int], timeout: float) -> None:
        self.rank, self.members, self.timeout = rank, tuple(members), timeout
        self.broken = ""

    @property
    def size(self) -> int:
        return len(self.members)

    def gather(self, what: str, message: bytes) -> list[bytes]:
        """Everybody's message in the order of ranks; PeerLost where a rank is gone or late. `what` is named in errors."""
        if self.broken:
            raise PeerLost(self.broken)
        if self.size == 1:
            return [message]
        return self._gather(what, message)

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        raise NotImplementedError

    def empty(self, shape: Sequence[int], dtype: str) -> Array:
        """A NumPy array from which others can read without a copy before, where the wire has such memory."""
        return np.empty(tuple(shape), numpy_dtype(dtype))

    @contextmanager
    def lent(self, what: str, x: Array) -> Iterator[list[Array]]:
        """The x of every rank, of one dtype and perhaps of several lengths, while all of them read it."""
        heard = self.gather(what, len(x).to_bytes(8, "little") + x.tobytes())
        lengths = [int.from_bytes(each[:8], "little") for each in heard]
        yield [np.frombuffer(e[8:], x.dtype).reshape(n, *x.shape[1:]) for n, e in zip(lengths, heard)]

    def pull(self, what: str, x: Array, starts: Sizes, counts: Sizes, y: Array, chosen: Array | None = None) -> None:
        """Fill the first rows of y, which is dense, with counts[r] rows of each rank r's x, from row starts[r] on; where rows
        are `chosen`, of those that rank r's chosen names, from chosen[starts[r]] on."""
        at = 0
        with self.lent(what, x if chosen is None else x[chosen]) as everyone:
            for theirs, start, count in zip(everyone, starts, counts):
                y[at : at + count] = theirs[start : start + count]
                at += count

    def sum(self, what: str, x: Array, y: Array, whole: bool = True) -> None:
        """y = the sum of x over the ranks, or of this rank's part of x: in float32, in the order of ranks, rounded once."""
        n = len(x) // self.size
        with self.lent(what, x) as everyone:
            parts = [each if whole else each[self.rank * n : (self.rank + 1) * n] for each in everyone]
            found = parts[0].astype(np.float32)
            for part in parts[1:]:
                found += part
        y[...] = found

    def mix(self, what: str, x: Array, starts: Sizes, counts: Sizes, place: Array, weights: Array, y: Array) -> None:
        """y[t] = the sum over j of weights[t, j] * row, added in the order of j in float32, of rows that are pulled: the m-th
        of them is for place[m] = t*k + j; places without one add nothing."""
        pulled = np.empty((len(place), *x.shape[1:]), x.dtype)
        self.pull(what, x, starts, counts, pulled)
        rows = np.zeros((weights.size, *x.shape[1:]), np.float32)
        rows[place] = pulled
        found = np.zeros(y.shape, np.float32)
        for j in range(weights.shape[1]):
            found += rows.reshape(*weights.shape, *x.shape[1:])[:, j] * weights[:, j : j + 1]
        y[...] = found

    def group(self, members: Sequence[int]) -> Wire | None:
        """The wire of some of these ranks; None on the others. Every rank calls it, with the same members."""
        chosen = tuple(members)
        if not chosen or list(chosen) != sorted(set(chosen) & set(range(self.size))):
            raise UsageError(f"a group has ranks {list(chosen)}: expected some of 0 to {self.size - 1}, in ascending order")
        with self._opened(chosen) as (address, join):
            heard = self.gather("group", json.dumps([chosen, address]).encode())
            told = [json.loads(each) for each in heard]
            for rank, (theirs, _) in enumerate(told):
                if theirs != list(chosen):
                    name = self.members[rank]
                    raise UsageError(f"group: rank {name} names ranks {theirs}, rank {self.members[self.rank]} {list(chosen)}")
            return join(told[chosen[0]][1]) if self.rank in chosen else None

    @contextmanager
    def _opened(self, chosen: tuple[int, ...]) -> Iterator[tuple[str, Callable[[str], Wire]]]:
        """An address that the first of a new group tells the others, and what joins the group there."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the group, to which a further call is an error."""
        self.broken = f"rank {self.members[self.rank]} has left the group"

    def lost(self, what: str, rank: int, why: str) -> PeerLost:
        """The error that names the rank that is missing; the group is lost."""
        mine, theirs = self.members[self.rank], self.members[rank]
        self.broken = f"{what} on rank {mine}: rank {theirs} {why}: see what that rank printed, and start all ranks again"
        return PeerLost(self.broken)

    def late(self) -> str:
        return f"did not answer within {self.timeout:g} s"


# -- ranks that are threads ----------------------------------------------------------------------------------------------


class Room:
    """Where threads meet."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.turns: dict[int, dict[int, bytes]] = {}
        self.read: dict[int, int] = {}
        self.gone: set[int] = set()
        self.lost: tuple[int, int, str] | None = None  # the turn in which a rank was missed, that rank, and why
        self.rooms: dict[str, Room] = {}


class Threads(Wire):
    """Ranks that are threads of this process, to simulate them all."""

    def __init__(self, room: Room, rank: int, members: Sequence[int], timeout: float) -> None:
        super().__init__(rank, members, timeout)
        self.room, self.turn = room, 0

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        room, turn = self.room, self.turn
        self.turn += 1
        with room.changed:
            heard = room.turns.setdefault(turn, {})
            heard[self.rank] = message
            room.changed.notify_all()

            def missing() -> set[int]:
                return set(range(self.size)) - heard.keys()

            def lost() -> bool:  # in this turn: one that comes late must not go on alone
                return room.lost is not None and room.lost[0] <= turn

            room.changed.wait_for(lambda: lost() or not missing() or bool(missing() & room.gone), self.timeout)
            if not lost() and (absent := missing()):
                gone = absent & room.gone
                room.lost = turn, min(gone or absent), "is gone" if gone else self.late()
                room.changed.notify_all()
            if room.lost and lost():
                raise self.lost(what, *room.lost[1:])
            room.read[turn] = room.read.get(turn, 0) + 1
            if room.read[turn] == self.size:
                del room.turns[turn], room.read[turn]
            return [heard[rank] for rank in range(self.size)]

    @contextmanager
    def _opened(self, chosen: tuple[int, ...]) -> Iterator[tuple[str, Callable[[str], Wire]]]:
        name = f"{self.turn}"

        def join(address: str) -> Wire:
            with self.room.changed:
                room = self.room.rooms.setdefault(address, Room())
            return Threads(room, chosen.index(self.rank), [self.members[rank] for rank in chosen], self.timeout)

        yield name, join

    def close(self) -> None:
        super().close()
        with self.room.changed:
            self.room.gone.add(self.rank)
            self.room.changed.notify_all()


# -- ranks that are processes --------------------------------------------------------------------------------------------


class Sockets(Wire):
    """Ranks that are processes: each is connected to rank 0, which answers with what all have sent.

    Where a process dies the system closes its connection, so the others know at once.
    """

    def __init__(self, rank: int, members: Sequence[int], timeout: float, peers: dict[int, socket.socket]) -> None:
        super().__init__(rank, members, timeout)
        self.peers = peers  # of rank 0 all others, of another rank 0 alone

    def _gather(self, what: str, message: bytes) -> list[bytes]:
        return self._all(what, message) if self.rank == 0 else self._asked(what, message)

    def _asked(self, what: str, message: bytes) -> list[bytes]:
        """Send this to rank 0 and wait for its answer."""
        end = time.monotonic() + self.timeout + GRACE
        try:
            with suppress(BrokenPipeError):  # rank 0 may have said why before it ended
                _send(self.peers[0], message, end)
            answer = _receive(self.peers[0], end)
        except TimeoutError:
            self.peers[0].close()  # so that rank 0, should it come, does not go on alone
            raise self.lost(what, 0, self.late()) from None
        except OSError:
            raise self.lost(what, 0, "is gone") from None
        if answer[:1] == LOST:
            rank, why = json.loads(answer[1:])
            raise self.lost(what, rank, why)
        return _cut(answer[1:])

    def _all(self, what: str, message: bytes) -> list[bytes]:
        """Wait for all others, and answer them."""
        end = time.monotonic() + self.timeout
        found = {0: message}
        parts = {rank: bytearray() for rank in self.peers}
        with selectors.DefaultSelector() as ready:
            for rank, peer in self.peers.items():
                ready.register(peer, selectors.EVENT_READ, rank)
            while len(found) < self.size:
                events = ready.select(max(0.0, end - time.monotonic()))
                if not events:
                    raise self._told(what, min(set(range(self.size)) - found.keys()), self.late())
                for key, _ in events:
                    rank = key.data
                    try:
                        part = self.peers[rank].recv(1 << 20)
                    except OSError:
                        part = b""
                    if not part:
                        raise self._told(what, rank, "is gone")
                    parts[rank] += part
                    if len(parts[rank]) >= LENGTH.size and len(parts[rank]) - LENGTH.size >= LENGTH.unpack_from(parts[rank])[0]:
                        found[rank] = bytes(parts[rank][LENGTH.size :])
                        ready.unregister(self.peers[rank])
        heard = [found[rank] for rank in range(self.size)]
        answer = ALL + b"".join(LENGTH.pack(len(each)) + each for each in heard)
        for rank, peer in self.peers.items():
            try:
                _send(peer, answer, end + GRACE)
            except OSError:
                raise self._told(what, rank, "is gone") from None
        return heard

    def _told(self, what: str, rank: int, why: str) -> PeerLost:
        """The error, which all that are left are told."""
        for other, peer in self.peers.items():
            if other != rank or why != "is gone":
                with suppress(OSError):
                    _send(peer, LOST + json.dumps([rank, why]).encode(), time.monotonic() + GRACE)
        return self.lost(what, rank, why)

    @contextmanager
    def _opened(self, chosen: tuple[int, ...]) -> Iterator[tuple[str, Callable[[str], Sockets]]]:
        first = chosen[0] == self.rank and len(chosen) > 1
        name = f"porthal/{secrets.token_hex(8)}" if first else ""
        listener = _listening(name) if first else None
        members = [self.members[rank] for rank in chosen]

        def join(address: str) -> Sockets:
            if len(chosen) == 1:
                return Sockets(0, members, self.timeout, {})
            if listener:
                return _received(listener, members, self.timeout)
            return _connected(address, chosen.index(self.rank), members, self.timeout)

        try:
            yield name, join
        finally:
            if listener:
                listener.close()

    def close(self) -> None:
        super().close()
        for peer in self.peers.values():
            peer.close()


def joined(timeout: float, backend: str) -> Sockets:
    """The wire of all ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, on this machine.

    UsageError where one of them is missing or wrong, or a rank runs on another backend, PeerLost where one does not come.
    """
    rank, size, host, port = described()
    if not _is_here(host):
        raise UsageError(f"MASTER_ADDR is {host!r}: expected this machine, as localhost, since its ranks share memory")
    name = f"porthal/{os.getuid()}/{port}"
    if size == 1:
        return Sockets(0, [0], timeout, {})
    if rank:
        return _connected(name, rank, range(size), timeout, backend)
    try:
        listener = _listening(name)
    except OSError:
        raise UsageError(
            f"MASTER_PORT {port} is in use by other ranks on this machine, or RANK 0 was started twice: choose another port"
        ) from None
    with listener:
        return _received(listener, range(size), timeout, backend)


def described() -> tuple[int, int, str, int]:
    """Rank, number of ranks, host and port, as the environment says; UsageError where it does not."""
    found = {name: os.environ.get(name, "") for name in VARIABLES}
    for name, value in found.items():
        if not value:
            raise UsageError(f"{name} is not set: expected {', '.join(VARIABLES)}, as torchrun and porthal launch set them")
    numbers = {}
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 1)):
        text = found[name]
        if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) >= least):
            raise UsageError(f"{name} is {text!r}: expected a whole number of at least {least}")
        numbers[name] = int(text)
    rank, size, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if rank >= size:
        raise UsageError(f"RANK is {rank} with WORLD_SIZE {size}: expected 0 to {size - 1}")
    return rank, size, found["MASTER_ADDR"], port


def _is_here(host: str) -> bool:
    """Whether a host is this machine: only then can a socket have its address."""
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as one:
                one.bind(address)
                return True
    return False


def _listening(name: str) -> socket.socket:
    """A socket under a name that the system forgets with its process."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0{name}")
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener


def _received(listener: socket.socket, members: Sequence[int], timeout: float, backend: str = "") -> Sockets:
    """Rank 0 of a group, once all others have come. A wrong one is told what is wrong, and so are all then."""
    size, end = len(members), time.monotonic() + timeout
    wire = Sockets(0, members, timeout, {})
    while len(wire.peers) < size - 1:
        listener.settimeout(max(0.01, end - time.monotonic()))
        try:
            peer, _ = listener.accept()
        except TimeoutError:
            missing = min(set(range(1, size)) - wire.peers.keys())
            raise wire._told("start", missing, wire.late()) from None
        wrong = ""
        try:
            if _owner(peer) != os.getuid():
                raise ConnectionError
            rank, theirs, other = json.loads(_receive(peer, end, HELLO))
            if theirs != size:
                wrong = f"rank {rank} was started as one of {theirs} ranks, rank 0 as one of {size}: start them alike"
            elif other != backend:  # before anything that backends do in ways of their own
                wrong = f"rank {rank} runs on {other}, rank 0 on {backend}: start them alike"
            elif type(rank) is not int or not 0 < rank < size:
                raise ValueError
            elif rank in wire.peers:
                wrong = f"rank {rank} was started twice: give each process a RANK of its own"
        except (OSError, ValueError, TypeError):  # whoever it was, it is no rank
            peer.close()
            continue
        if wrong:
            for each in (peer, *wire.peers.values()):
                with suppress(OSError):
                    _send(each, LOST + wrong.encode(), end + GRACE)
            raise UsageError(wrong)
        wire.peers[rank] = peer
    for peer in wire.peers.values():
        with suppress(OSError):  # who is gone by now is missed by the first call
            _send(peer, ALL, end + GRACE)
    return wire


def _connected(name: str, rank: int, members: Sequence[int], timeout: float, backend: str = "") -> Sockets:
    """Another rank, once rank 0 has let it in."""
    end = time.monotonic() + timeout + GRACE
    peer = socket.socket(socket.AF_UNIX)
    wire = Sockets(rank, members, timeout, {0: peer})
    while True:
        try:
            peer.settimeout(max(0.01, end - time.monotonic()))
            peer.connect(f"\0{name}")
            if _owner(peer) != os.getuid():
                raise UsageError(f"another user's process waits at {name} in the place of rank 0: choose another MASTER_PORT")
            break
        except (ConnectionRefusedError, BlockingIOError):
            if time.monotonic() > end:
                raise wire.lost("start", 0, wire.late()) from None
            time.sleep(0.01)
    try:
        _send(peer, json.dumps([rank, len(members), backend]).encode(), end)
        answer = _receive(peer, end)
    except TimeoutError:
        raise wire.lost("start", 0, wire.late()) from None
    except OSError:
        raise wire.lost("start", 0, "is gone") from None
    if answer[:1] == LOST:
        said = answer[1:].decode()
        raise wire.lost("start", *json.loads(said)) if said.startswith("[") else UsageError(said)
    return wire


def _owner(peer: socket.socket) -> int:
    """The user whose process is at the other end: names of such sockets belong to nobody."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user)


def _send(peer: socket.socket, message: bytes, end: float) -> None:
    peer.settimeout(max(0.01, end - time.monotonic()))
    peer.sendall(LENGTH.pack(len(message)) + message)


def _receive(peer: socket.socket, end: float, most: int = 1 << 40) -> bytes:
    """One message; ConnectionError where the other side is gone."""
    (length,) = LENGTH.unpack(_exactly(peer, LENGTH.size, end))
    if length > most:
        raise ConnectionError
    return _exactly(peer, length, end)


def _exactly(peer: socket.socket, count: int, end: float) -> bytes:
    found = bytearray(count)
    at, view = 0, memoryview(found)
    while at < count:
        peer.settimeout(max(0.01, end - time.monotonic()))
        if not (n := peer.recv_into(view[at:])):
            raise ConnectionError
        at += n
    return bytes(found)


def _cut(parts: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(parts):
        (length,) = LENGTH.unpack_from(parts, at)
        found.append(parts[at + LENGTH.size : at + LENGTH.size + length])
        at += LENGTH.size + length
    return found


def simulated(size: int, run: Callable[[Wire], Any], timeout: float = 10.0) -> list[Any]:
    """What `run` returns on each of the ranks, which are threads of this process; the exception where it raised one."""
    room, found = Room(), [None] * size

    def one(rank: int) -> None:
        wire = Threads(room, rank, range(size), timeout)
        try:
            found[rank] = run(wire)
        except Exception as error:
            found[rank] = error  # type: ignore[call-overload]
        finally:
            wire.close()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found
