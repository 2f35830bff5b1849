"""Stand-in for the part of `torch_npu` that runs GLM-5: real schemas and documented limits on an emulated `npu`.

Written from the vendor's operator pages alone (Ascend/op-plugin, docs/zh/custom_APIs/torch_npu, products A2 and A3),
so that an adapter is held to what the vendor promises and to nothing more. What the pages leave undefined comes back
as garbage, equal scores are taken from the highest position down, and rows are in no order. A call outside the
documented limits raises RuntimeError. Results are from an emulated device, never from hardware.

`schemas.txt`: torch._C._jit_get_all_schemas() after import of the wheel of torch-npu 2.13.0, used unchanged; each has
a kernel of its name in one of the modules here.
"""

import types
from pathlib import Path

from porthal.backends.ascend.emulated import attention, cache, distributed, matmul, moe, prolog, quantised, vectors
from porthal.backends.ascend.emulated.products import Format
from porthal.backends.torch.emulation import device
from porthal.backends.torch.emulation.graphs import add_graphs
from porthal.backends.torch.emulation.runtime import visible
from porthal.backends.torch.emulation.stand_in import calls, define, publish

__all__ = ["KERNELS", "SCHEMAS", "calls", "install"]

SCHEMAS = tuple((Path(__file__).parent / "schemas.txt").read_text(encoding="utf-8").splitlines())
VERSION = "2.13.0+emulated"
_MODULES = (attention, cache, distributed, matmul, moe, prolog, quantised, vectors)
KERNELS = {n: f for module in _MODULES for n, f in vars(module).items() if n.startswith(("npu_", "get_npu_"))}
_installed: types.ModuleType | None = None


def install(count: int = 1) -> types.ModuleType:
    """Emulate `npu` with `count` devices, put the stand-in where `import torch_npu` finds it, and return it.

    ASCEND_RT_VISIBLE_DEVICES chooses among the devices.
    Raises RuntimeError if the real torch_npu is loaded or another vendor is emulated in this process.
    """
    global _installed
    if _installed is None:
        _installed = publish("torch_npu", __doc__, {"__version__": VERSION})
        _installed.npu = device.install("npu", visible(count, "ASCEND_RT_VISIBLE_DEVICES"))
        add_graphs(_installed.npu, "npu")
        _installed.npu.config = types.SimpleNamespace(allow_internal_format=False)
        vars(_installed).update(define("npu", SCHEMAS, KERNELS))
        number = _installed.get_npu_format
        _installed.Format, _installed.get_npu_format = Format, lambda x: Format(number(x))  # as the package wraps it
    return _installed
