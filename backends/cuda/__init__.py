"""NVIDIA GPUs with kernels of our own in Triton: `cuda`, `cuda:1`. Ops without one run on the plain torch base."""

import importlib.util
import os
import re
import sys
from pathlib import Path

from porthal.hal import Probe

requires = ("torch", "triton")
rank = 100
DRIVER = Path("/proc/driver/nvidia/version")
# Compatibility layers, on which other vendors' chips call themselves CUDA devices.
LAYERS = {"torch_xmlir": "kunlunxin", "torch_musa": "moore_threads"}


def probe() -> Probe:
    """Look for the driver; PyTorch itself is asked only where it is imported already, since that takes seconds."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Probe("available", "in Triton's interpreter on the CPU")
    for layer, chip in LAYERS.items():
        if importlib.util.find_spec(layer) is not None:
            return Probe("not here", f"{layer} is installed, on which another chip calls itself CUDA: use backend {chip!r}")
    if not DRIVER.exists():
        return Probe("not here", f"there is no {DRIVER}: NVIDIA's driver is not loaded")
    return _asked() if "torch" in sys.modules else Probe("available")


def _asked() -> Probe:
    torch = sys.modules["torch"]
    if torch.version.cuda is None:
        return Probe("broken", f"PyTorch {torch.__version__} is built without CUDA: install a build for CUDA")
    if not torch.cuda.is_available():
        found = re.findall(r"Module +(?:for \S+ +)?([\d.]+)", DRIVER.read_text(encoding="utf-8"))
        return Probe(
            "broken",
            f"PyTorch {torch.__version__} finds no GPU with driver {found[0] if found else 'of unknown version'}: "
            f"it needs one for CUDA {torch.version.cuda}; install that driver, or a PyTorch for an older CUDA",
        )
    return Probe("available")
