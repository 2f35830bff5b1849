"""What is lost while the engine moves tensors: a rank, or the network, which is cut, slow or lossy, where the system lets us
have one of our own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.ranks import ROOT, environment
from tests.ranks import ran as run_as_ranks

OWN = ["unshare", "--user", "--map-root-user", "--net"]
RANK = """
import sys
import numpy as np
import torch
from porthal.hal import PeerLost, bind, create

backend = create("torch")
try:
    with backend.communicator(20) as comm:  # also for the others to start
        ops = bind(backend=backend)
        for n in range(200):
            found = ops.all_reduce(torch.ones(64, 1024), comm)
            assert found.min() == found.max() == 2
            print(n, flush=True)
except PeerLost as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""
DRIVER = f"""
import json, os, subprocess, sys, time
what, environments = json.loads(sys.argv[1])
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
pipes = {{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}}
ranks = [subprocess.Popen([sys.executable, "-c", {RANK!r}], env={{**os.environ, **each}}, **pipes) for each in environments]
for each in ranks:
    each.stdout.readline()
subprocess.run(what, check=True)
start = time.monotonic()
said = [each.communicate(timeout=120) for each in ranks]
print(json.dumps([[each.returncode, err, len(out.split())] for each, (out, err) in zip(ranks, said)]))
"""


def ran(what: list[str]) -> list[list[object]]:
    """Exit code, stderr and calls of two ranks on gloo, whose network this is done to once both have made a call."""
    if subprocess.run([*OWN, "ip", "link", "set", "lo", "up"], capture_output=True).returncode:
        pytest.skip("the system does not let an ordinary process have a network of its own, or has no `ip`")
    command = [*OWN, sys.executable, "-c", DRIVER, json.dumps([what, [environment(rank, 2, 19100) for rank in range(2)]])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found: list[list[object]] = json.loads(done.stdout)
    return found


def test_each_rank_is_told_of_a_network_that_is_cut():
    for rank, (code, err, _) in enumerate(ran(["ip", "link", "set", "lo", "down"])):
        said = str(err).splitlines()[-1]  # behind what torch says of its sockets
        assert code == 3 and said.startswith(f"all_reduce on rank {rank}: ") and said.endswith("start all ranks again"), err


def test_a_slow_and_lossy_network_changes_no_result():
    if subprocess.run([*OWN, "tc", "qdisc", "add", "dev", "lo", "root", "netem"], capture_output=True).returncode:
        pytest.skip("this system cannot delay and lose packets: it has no `tc`, or no netem")
    for code, err, calls in ran(["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "2ms", "loss", "1%"]):
        assert (code, err, calls) == (0, "", 199)


def test_a_rank_that_dies_once_all_have_agreed_is_named():
    dies = "torch.distributed.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)"
    program = f"import os, signal, torch.distributed\nif os.environ['RANK'] == '1':\n    {dies}\n{RANK}"
    (code, out, err), (killed, _, _) = run_as_ranks(2, ["-c", program], timeout=120)
    assert (killed, code, out) == (-9, 3, "")
    assert err.splitlines()[-1].startswith("all_reduce on rank 0: rank 1 is gone: see what that rank printed")
