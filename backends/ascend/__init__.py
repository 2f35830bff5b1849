"""Huawei Ascend through torch_npu: `ascend`, `ascend:1`. Ops without a kernel of its own run on the plain torch base."""

import os
import subprocess
import sys

from porthal.hal import Probe

requires = ("torch", "torch_npu")
rank = 100


def probe() -> Probe:
    """Ask torch_npu for a device, in another process unless it is imported: a broken install breaks `import torch`."""
    if "torch_npu" in sys.modules:
        here = sys.modules["torch"].npu.is_available()
        return Probe("available") if here else Probe("not here", "torch_npu sees no NPU")
    question = "import torch, torch_npu; print(torch.npu.is_available())"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", question], env=environment, capture_output=True, text=True, check=False
    )
    if answer.returncode:
        return Probe("broken", "torch_npu does not import: " + (answer.stderr.strip().splitlines() or ["no message"])[-1])
    if answer.stdout.split()[-1:] != ["True"]:
        return Probe("not here", "torch_npu sees no NPU")
    return Probe("available")
