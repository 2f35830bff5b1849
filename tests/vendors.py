"""Two emulated devices of another vendor, in a process of their own, and the ranks that share them."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os
import torch
from porthal.backends.torch.emulation import device
from porthal.backends.torch.vendor import Vendor
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

class Chip(Vendor):
    name, kind, package, visible = "chip", "VENDOR", "torch_VENDOR", "VISIBLE"

# A rank takes the device of its number, while there are as many, unless one is named; it is then the current one.
for rank, named, device in ((None, "", 0), ("0", "", 0), ("1", "", 1), ("2", "", 0), ("first", "", 0), ("0", "1", 1)):
    os.environ.update(RANK=rank) if rank else None
    chip = Chip(named)
    assert (str(chip), chip.empty((1,), "int32").device.index, module.current_device()) == (f"chip:{device}", device, device)
"""


def two_devices(vendor: str) -> tuple[str, str]:
    """What is printed to stdout, which is "refused" alone where all is right, and to stderr."""
    script = SCRIPT.replace("VENDOR", vendor)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr
