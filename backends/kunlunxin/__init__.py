"""Kunlunxin through torch_xmlir and kunlun_ops: `kunlunxin`, `kunlunxin:1`.

PyTorch calls this device "cuda", so what looks for NVIDIA must look for torch_xmlir first.
"""

import os

from porthal.backends.torch.probing import loaded, probe_device
from porthal.hal import Probe

requires = ("torch", "torch_xmlir")
rank = 100
libraries = ("kunlun_ops", "xspeedgate_ops")
variables = ("XPU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "DISABLE_XPYTORCH")


def probe() -> Probe:
    if os.environ.get("DISABLE_XPYTORCH", "0") not in ("", "0"):
        return Probe("not here", "DISABLE_XPYTORCH is set, which leaves PyTorch without the chip: unset it")
    return probe_device("torch_xmlir", lambda: loaded("torch_xmlir").xpu.device_count(), "xpu[0-9]*", "XPU_VISIBLE_DEVICES")
