"""Huawei Ascend through torch_npu: `ascend`, `ascend:1`. Ops without a kernel of its own run on the plain torch base."""

import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from porthal.backends.torch.probing import DEVICES, beside_another
from porthal.hal import Probe

VISIBLE = "ASCEND_RT_VISIBLE_DEVICES"

requires = ("torch", "torch_npu")
rank = 100
variables = (VISIBLE, "TORCH_DEVICE_BACKEND_AUTOLOAD", "HCCL_BUFFSIZE", "ASCEND_LAUNCH_BLOCKING")

LIBRARIES = Path("/etc/ld.so.cache")  # what the loader finds by itself
RUNTIME = "libascendcl.so"


def probe() -> Probe:
    """Look without importing torch_npu: that takes seconds, and a broken install breaks `import torch`."""
    if "torch_npu" in sys.modules:
        here = sys.modules["torch"].npu.is_available()
        return Probe("available") if here else Probe("not here", "torch_npu sees no NPU")
    if not any(DEVICES.glob("*davinci[0-9]*")):  # davinci0, or vdavinci100 for a part of one
        return Probe("not here", f"there is no {DEVICES}/davinci0")
    if not any(c.isdigit() for c in os.environ.get(VISIBLE, "0")):
        return Probe("not here", f"{VISIBLE} is {os.environ[VISIBLE]!r}, which shows no device: unset it, or name some as 0,1")
    if wrong := beside_another("torch_npu"):
        return wrong
    if not _has_runtime():
        return Probe("broken", f"the loader finds no {RUNTIME}: source set_env.sh of CANN's toolkit first")
    with suppress(PackageNotFoundError):
        ours, theirs = (".".join(version(name).split(".")[:2]) for name in ("torch", "torch_npu"))
        if ours != theirs:
            return Probe("broken", f"torch_npu {version('torch_npu')} is for torch {theirs}, this is {version('torch')}")
    return Probe("available")


def _has_runtime() -> bool:
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    if any((Path(folder) / RUNTIME).exists() for folder in folders):
        return True
    return LIBRARIES.exists() and RUNTIME.encode() in LIBRARIES.read_bytes()
