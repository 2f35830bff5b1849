"""Huawei Ascend through torch_npu: `ascend`, `ascend:1`. Ops without a kernel of its own run on the plain torch base."""

import sys
from pathlib import Path

from porthal.hal import Probe

requires = ("torch", "torch_npu")
rank = 100


def probe() -> Probe:
    """Look for the driver's device files: torch_npu takes seconds to import, and a broken install breaks `import torch`."""
    if "torch_npu" in sys.modules:
        here = sys.modules["torch"].npu.is_available()
        return Probe("available") if here else Probe("not here", "torch_npu sees no NPU")
    if not any(Path("/dev").glob("*davinci[0-9]*")):  # davinci0, or vdavinci100 for a part of one
        return Probe("not here", "there is no /dev/davinci0")
    return Probe("available")
