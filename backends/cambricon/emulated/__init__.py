"""Stand-in for what Cambricon ships for GLM-5: torch_mlu and torch_mlu_ops, on an emulated `mlu`.

Written from the Python layer of torch_mlu_ops 1.12.1 alone (its kernels are closed), as published in
miznchimaki/domesticated_torch_mlu_ops 9fbf7df, `_ops.py`: names, order, defaults, formulas, dtypes and limits are those
of its functions. Two limits are known from a caller only and marked so in CONFIDENCE. What is left undefined comes back
as garbage, equal scores are taken from the highest place down, and the chosen are in no order. Results are from an
emulated device, never from hardware.
"""

import types

from porthal.backends.cambricon.emulated import attention, cache, experts, vectors
from porthal.backends.torch.emulation import device
from porthal.backends.torch.emulation.graphs import add_graphs
from porthal.backends.torch.emulation.stand_in import calls, on_device, publish

__all__ = ["CONFIDENCE", "KERNELS", "calls", "install"]

KERNELS = {name: f for module in (vectors, cache, attention, experts) for name, f in vars(module).items()
           if isinstance(f, types.FunctionType) and f.__module__ == module.__name__ and not name.startswith("_")
           and name != "per_token"}
# How well a function's signature is known, X for the source that defines it and C for call sites, and where it stands.
CONFIDENCE = {f"torch_mlu_ops.{name}": ("X", "torch_mlu_ops 1.12.1, _ops.py") for name in KERNELS} | {
    "torch_mlu_ops.single_query_cached_kv_attn": ("X", "torch_mlu_ops 1.12.1, _ops.py; the head count: C, "
                                                       "Cambricon/vllm-mlu b992520 vllm_mlu/_mlu_ops.py")}
_installed: types.ModuleType | None = None


def install(count: int = 1) -> types.ModuleType:
    """Emulate `mlu` with `count` devices, put torch_mlu and torch_mlu_ops where imports find them, and return the latter.

    Raises RuntimeError if the vendor's own packages are loaded or another vendor is emulated in this process.
    """
    global _installed
    if _installed is None:
        mlu = device.install("mlu", count)
        add_graphs(mlu, "mlu")
        emulated = mlu.get_device_properties()
        mlu.get_device_properties = lambda device=None: types.SimpleNamespace(
            **vars(emulated), major=5, minor=0, multi_processor_count=48, cluster_count=12, core_num_per_cluster=4)
        publish("torch_mlu", __doc__, {"__version__": "1.33.1+emulated", "mlu": mlu})
        _installed = publish("torch_mlu_ops", __doc__, {"__version__": "1.12.1+emulated",
                                                        **{name: on_device(name, f) for name, f in KERNELS.items()}})
    return _installed
