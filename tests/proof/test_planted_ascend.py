"""Mistakes planted in Ascend's adapter, which an emulated device and the cases of the standard level have to find."""

import subprocess
import sys

from tests.proofs import ROOT

PROVES = (
    "backends/ascend",
    "backends/torch",
    "conformance",
    "hal",
    "ops",
    "tests/planted_ascend.py",
    "tests/planted_adapters.py",
)


def test_every_planted_mistake_is_caught():
    command = [sys.executable, "-m", "tests.planted_ascend"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr[-2000:]
