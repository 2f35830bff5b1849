"""Ranks that are processes find each other, and none waits for ever for one that is gone, late or wrong."""

from __future__ import annotations

import time

import pytest

from tests.ranks import ran, started

ADVICE = "see what that rank printed, and start all ranks again"
MEET = """
import os, sys
from porthal.hal import PorthalError
from porthal.hal.wire import joined
try:
    wire = joined({timeout}, os.environ.get("BACKEND", "cpu"))
    {body}
except PorthalError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""


def program(body: str, timeout: float = 20) -> list[str]:
    return ["-c", MEET.format(body=body.replace("\n", "\n    "), timeout=timeout)]


def test_every_rank_hears_all_and_groups_are_in_the_order_given():
    body = """
said = wire.gather("a", b"%d" % wire.rank * (1 + 40000 * wire.rank))
assert [len(s) for s in said] == [1, 40001, 80001] and said[2][:1] == b"2", said
part = wire.group([0, 2])
print(part and b"".join(part.gather("b", b"%d" % wire.rank)).decode())
"""
    assert [out for _, out, _ in ran(3, program(body))] == ["02\n", "None\n", "02\n"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_at_once(victim):
    body = f"""
if wire.rank == {victim}:
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
wire.gather("all_reduce", b"")
"""
    start = time.monotonic()
    found = ran(3, program(body))
    assert time.monotonic() - start < 15
    for rank, (code, out, _) in enumerate(found):
        if rank == victim:
            assert code == -9
        else:
            assert (code, out) == (2, f"PeerLost all_reduce on rank {rank}: rank {victim} is gone: {ADVICE}\n")


def test_a_stalled_rank_is_named_within_the_timeout_and_hears_of_it():
    body = """
import time
wire.gather("start", b"")
if wire.rank == 1:
    time.sleep(1.5)
wire.gather("barrier", b"")
"""
    found = ran(3, program(body.replace('wire.gather("start", b"")', 'wire.gather("start", b""); wire.timeout = 0.5')))
    for rank, (code, out, _) in enumerate(found):
        assert (code, out) == (2, f"PeerLost barrier on rank {rank}: rank 1 did not answer within 0.5 s: {ADVICE}\n")


def test_a_rank_0_that_comes_too_late_does_not_go_on_alone():
    body = """
import time
wire.gather("start", b""); wire.timeout = 0.5
if wire.rank == 0:
    time.sleep(4)
wire.gather("barrier", b"")
"""
    first, *others = ran(3, program(body))
    assert first[:2] in [(2, f"PeerLost barrier on rank 0: rank {rank} is gone: {ADVICE}\n") for rank in (1, 2)]
    for rank, (code, out, _) in enumerate(others, 1):
        assert (code, out) == (2, f"PeerLost barrier on rank {rank}: rank 0 did not answer within 0.5 s: {ADVICE}\n")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({1: {"WORLD_SIZE": "3"}}, "rank 1 was started as one of 3 ranks, rank 0 as one of 2: start them alike"),
        ({0: {"MASTER_ADDR": None}, 1: {"MASTER_ADDR": None}}, "MASTER_ADDR is not set: expected RANK"),
        ({0: {"RANK": "2"}, 1: {"RANK": "3"}}, "with WORLD_SIZE 2: expected 0 to 1"),
        ({0: {"MASTER_ADDR": "192.0.2.1"}, 1: {"MASTER_ADDR": "192.0.2.1"}}, "expected this machine"),
        ({1: {"BACKEND": "torch"}}, "rank 1 runs on torch, rank 0 on cpu: start them alike"),
        ({0: {"WORLD_SIZE": "two"}, 1: {"WORLD_SIZE": "two"}}, "WORLD_SIZE is 'two': expected a whole number of at least 1"),
    ],
)
def test_a_wrong_start_is_one_sentence_on_every_rank(changed, words):
    for code, out, err in ran(2, program("print('met')"), changed):
        assert code == 2 and out.startswith("UsageError ") and words in out and not err


def test_a_rank_started_twice_is_refused_on_all():
    found = ran(3, program("print('met')"), {2: {"RANK": "1"}})
    assert {out for _, out, _ in found} == {"UsageError rank 1 was started twice: give each process a RANK of its own\n"}


def test_a_stranger_at_the_door_is_sent_away():
    greeting = """
import json, socket, time
from porthal.hal.wire import _send
name = f"\\0porthal/{os.getuid()}/{os.environ['MASTER_PORT']}"
if os.environ["RANK"] == "1":
    for said in ([5, 2, "cpu"], ["a", 2, "cpu"], [1.5, 2, "cpu"], [0, 2, "cpu"], [True, 2, "cpu"], "hello"):
        while True:
            door = socket.socket(socket.AF_UNIX)
            try:
                door.connect(name)
                break
            except ConnectionRefusedError:
                time.sleep(0.02)
        _send(door, json.dumps(said).encode(), time.monotonic() + 5)
        assert door.recv(1) == b"", said
"""
    first = ["-c", greeting.join(["import os\n", MEET.format(body="print(wire.gather('a', b'x'))", timeout=20)])]
    assert [out for _, out, _ in ran(2, first)] == ["[b'x', b'x']\n"] * 2


def test_a_port_in_use_is_told():
    with started(2, program("import time; time.sleep(60)"), {1: {"RANK": "0"}}) as ranks:
        done = next(each for _ in range(400) for each in ranks if each.poll() is not None or time.sleep(0.02))
        assert "in use by other ranks on this machine, or RANK 0 was started twice" in done.communicate()[0]


def test_a_rank_that_does_not_come_is_named():
    found = ran(2, program("print('met')", timeout=0.5), {1: {"MASTER_PORT": "19999"}})
    assert found[0][1].startswith("PeerLost start on rank 0: rank 1 did not answer within 0.5 s")
    assert found[1][1].startswith("PeerLost start on rank 1: rank 0 did not answer within 0.5 s")
