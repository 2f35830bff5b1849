"""Two emulated devices of another vendor, in a process of their own, and the ranks that share them."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
from porthal.backends.torch.emulation import device
module = device.install("VENDOR", count=2)
a, b = torch.ones(2, device="VENDOR:0"), torch.ones(2, device="VENDOR:1")
assert module.device_count() == 2 and b.is_VENDOR and b.device.index == 1
assert (b + b).device.index == 1 and a.to(b.device).device.index == 1 and device.copies.to_host == 0
with module.device(1):
    assert torch.zeros(2, device="VENDOR").device.index == 1
assert module.current_device() == 0
try:
    a + b
except RuntimeError as error:
    assert "same device" in str(error)
    print("refused")
"""

RANKS = """
import os
import torch
from porthal.backends.torch.emulation import device
from porthal.backends.torch.vendor import Vendor
device.install("musa", count=2)
class Chip(Vendor):
    name, kind, package, visible = "chip", "musa", "torch_musa", "MUSA_VISIBLE_DEVICES"
for rank in (None, "0", "1", "2", "first"):
    os.environ.pop("RANK", None) if rank is None else os.environ.update(RANK=rank)
    for named in ("", "1"):
        print(rank, named or "-", Chip(named), torch.musa.current_device(), Chip(named).empty((1,), "int32").device)
"""


def two_devices(vendor: str) -> tuple[str, str]:
    """What is printed to stdout, which is "refused" alone where all is right, and to stderr."""
    return _run(SCRIPT.replace("VENDOR", vendor))


def devices_of_ranks() -> tuple[str, str]:
    """A line per rank, without and with a named device: what the backend is called, the current device, that of an array."""
    return _run(RANKS)


def _run(script: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr
