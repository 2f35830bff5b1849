"""Is a vendor's device here? Answered without its package, which takes seconds to import and may break `import torch`."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from porthal.hal import Probe

DEVICES = Path("/dev")
OUT_OF_TREE = "torch_npu", "torch_musa", "torch_mlu"  # each gives PyTorch a device of its own, of which it takes one


def probe_device(module: str, count: Callable[[], int], files: str, visible: str) -> Probe:
    """From the vendor's `module` where it is loaded already, which `count` asks, else from its device files in /dev, a pattern.

    `visible` is the variable that hides devices of this vendor.
    """
    hidden = os.environ.get(visible)
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Probe("not here", f"{visible}={hidden!r} hides every device")
    if module in sys.modules:
        return Probe("available") if count() > 0 else Probe("not here", f"{module} sees no device")
    if not any(DEVICES.glob(files)):
        why = "the driver is not loaded, or the container was not given a device"
        return Probe("not here", f"there is no {DEVICES}/{files}: {why}")
    return (beside_another(module) if module in OUT_OF_TREE else None) or Probe("available")


def beside_another(module: str) -> Probe | None:
    """What is wrong where another vendor's device of PyTorch is installed beside this one's, or None."""
    other = next((m for m in OUT_OF_TREE if m != module and importlib.util.find_spec(m)), None)
    if other is None:
        return None
    return Probe("broken", f"{other} is installed as well, and PyTorch takes one vendor's device per process: remove one")


def loaded(module: str) -> Any:
    """A module that is loaded already."""
    return sys.modules[module]
