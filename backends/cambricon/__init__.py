"""Cambricon through torch_mlu and torch_mlu_ops: `cambricon`, `cambricon:1`."""

from porthal.backends.torch.probing import loaded, probe_device
from porthal.hal import Probe

requires = ("torch", "torch_mlu")
rank = 100
libraries = ("torch_mlu_ops",)
variables = ("MLU_VISIBLE_DEVICES", "ENABLE_FALLBACK_TO_CPU")


def probe() -> Probe:
    return probe_device("torch_mlu", lambda: loaded("torch").mlu.device_count(), "cambricon_dev[0-9]*", "MLU_VISIBLE_DEVICES")
