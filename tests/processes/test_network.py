"""What is lost while the engine moves tensors: a rank, or the network, which is cut, slow or lossy, where the system lets us
have one of our own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from tests.ranks import ROOT, forked

OWN = ["unshare", "--user", "--map-root-user", "--net"]
PATIENCE = 20.0  # also for the others to start


def sums(calls: int, before: Any) -> tuple[int, str]:
    """How many sums two ranks make, with what is done before each; and what this one is told in the end."""
    import torch

    from porthal.hal import PeerLost, bind, create

    made, backend = 0, create("torch")
    try:
        with backend.communicator(PATIENCE) as comm:
            ops = bind(backend=backend)
            for made in range(calls):
                before(comm.rank, made)
                assert bool((ops.all_reduce(torch.ones(64, 1024), comm) == 2).all())
    except PeerLost as error:
        return made, str(error)
    return calls, ""


def under(what: list[str]) -> list[list[Any]]:
    """The same in a network of their own, to which this is done before the second call; this is run as a program there."""
    if subprocess.run([*OWN, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("the system does not let an ordinary process have a network of its own, or has no `ip`")
    command = [*OWN, sys.executable, "-m", "tests.processes.test_network", *what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    return found


def test_each_rank_is_told_of_a_network_that_is_cut():
    for rank, (made, why) in enumerate(under(["ip", "link", "set", "lo", "down"])):
        assert made == 1 and why.startswith(f"all_reduce on rank {rank}: ") and why.endswith("start all ranks again"), why


def test_a_slow_and_lossy_network_changes_no_result():
    if subprocess.run([*OWN, "tc", "qdisc", "add", "dev", "lo", "root", "netem"], capture_output=True).returncode:
        pytest.skip("this system cannot delay and lose packets: it has no `tc`, or no netem")
    assert under(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "2ms", "loss", "1%"]) == [[20, ""]] * 2


def test_a_rank_that_dies_once_all_have_agreed_is_named():
    def before(rank: int, made: int) -> None:
        if rank == 1 and made == 1:
            import torch.distributed as dist

            dist.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

    (made, why), nothing = forked(2, lambda: sums(3, before))
    assert nothing is None and made == 1
    assert why.startswith("all_reduce on rank 0: rank 1 is gone: see what that rank printed")


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    done = sys.argv[1:]
    print(json.dumps(forked(2, lambda: sums(20, lambda rank, made: rank or made != 1 or subprocess.run(done, check=True)))))
