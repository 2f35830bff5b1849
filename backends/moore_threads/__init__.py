"""Moore Threads through torch_musa and MATE: `moore_threads`, `moore_threads:1`."""

from porthal.backends.torch.probing import loaded, probe_device
from porthal.hal import Probe

requires = ("torch", "torch_musa")
rank = 100
libraries = ("mate", "deep_gemm", "flash_mla")
variables = ("MUSA_VISIBLE_DEVICES", "MTHREADS_VISIBLE_DEVICES")


def probe() -> Probe:
    return probe_device("torch_musa", lambda: loaded("torch").musa.device_count(), "mtgpu*", "MUSA_VISIBLE_DEVICES")
