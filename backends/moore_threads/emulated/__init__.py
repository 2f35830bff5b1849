"""Stand-in for what Moore Threads ships for GLM-5: torch_musa, MATE with its deep_gemm and flash_mla, on an emulated `musa`.

Written from the sources that define the functions (MooreThreads/mate 0.2.2, 3f58cc3; MooreThreads/torch_musa 2.7.1,
8b583b3) and from FlashMLA's and DeepGEMM's pages: names, order and defaults of arguments, checks and formulas are
theirs. What they leave undefined comes back as garbage, equal scores are taken from the highest place down, and the
chosen are in no order. Results are from an emulated device, never from hardware.
"""

import types
from collections.abc import Callable
from typing import Any

import torch

from porthal.backends.moore_threads.emulated import attention, elementwise, gate, indexer, products
from porthal.backends.torch.emulation import device
from porthal.backends.torch.emulation.graphs import add_graphs
from porthal.backends.torch.emulation.stand_in import calls, on_device, publish

__all__ = ["CONFIDENCE", "calls", "install"]

_MATE, _MUSA = "MooreThreads/mate 3f58cc3", "MooreThreads/torch_musa 8b583b3"
_WRAPPED = "wrappers/DeepGEMM/deep_gemm/interface.py"
_DEEP_GEMM = {name: getattr(module, name) for module, names in (
    (products, ("m_grouped_bf16_gemm_nt_contiguous", "m_grouped_bf16_gemm_nt_masked", "bf16_gemm_nt", "fp8_gemm_nt",
                "m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_gemm_nt_masked")),
    (indexer, ("fp8_mqa_logits", "fp8_paged_mqa_logits", "get_paged_mqa_logits_metadata"))) for name in names}
_FLASH_MLA = ("flash_mla_sparse_fwd", "flash_mla_with_kvcache")
# How well a function's signature is known, X for the source that defines it and C for call sites, and where it stands.
CONFIDENCE = {
    **{f"deep_gemm.{name}": ("X", f"{_MATE} {_WRAPPED}") for name in _DEEP_GEMM},
    **{f"flash_mla.{name}": ("X", f"{_MATE} wrappers/FlashMLA/flash_mla/flash_mla_interface.py")
       for name in ("get_mla_metadata", *_FLASH_MLA)},
    "mate.moe_fused_gate": ("X", f"{_MATE} mate/moe_fused_gate.py"),
    "torch.rms_norm": ("X", f"{_MUSA} torch_musa/csrc/aten/ops/RMSNorm.cpp"),
    "torch.swish_glu": ("X", f"{_MUSA} torch_musa/csrc/aten/ops/SwiGlu.cpp"),
    "torch.nn.functional.swish_glu": ("X", f"{_MUSA} torch_musa/csrc/aten/ops/SwiGlu.cpp"),
    "torch.nn.functional.rope": ("X", f"{_MUSA} torch_musa/csrc/aten/ops/RoPE.cpp"),
}
_installed: types.ModuleType | None = None


def _or_torch(original: Callable[..., Any], name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's own function on the host, the vendor's on the device."""
    fused = on_device(name, kernel)

    def run(input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return (original if input.is_cpu else fused)(input, *args, **kwargs)

    return run


def install(count: int = 1) -> types.ModuleType:
    """Emulate `musa` with `count` devices, put the stand-ins where imports find them, and return torch_musa.

    Raises RuntimeError if the vendor's own packages are loaded or another vendor is emulated in this process.
    """
    global _installed
    if _installed is not None:
        return _installed
    musa = device.install("musa", count)
    torch_musa = publish("torch_musa", __doc__, {"__version__": "2.7.1+emulated"})
    add_graphs(musa, "musa")
    emulated = musa.get_device_properties()
    musa.get_device_properties = lambda device=None: types.SimpleNamespace(
        **vars(emulated), major=3, minor=1, multi_processor_count=indexer.PROCESSORS)
    deep_gemm = {name: on_device(name, f) for name, f in _DEEP_GEMM.items()}
    deep_gemm["get_mk_alignment_for_contiguous_layout"] = products.get_mk_alignment_for_contiguous_layout
    deep_gemm["get_num_sms"] = indexer.get_num_sms
    gate_of_mate = on_device("moe_fused_gate", gate.moe_fused_gate)
    mate = publish("mate", __doc__, {"__version__": "0.2.2+emulated"})
    publish("mate.moe_fused_gate", __doc__, {"moe_fused_gate": gate_of_mate})
    mate.moe_fused_gate = gate_of_mate  # its own name stands for the function, as in MATE
    publish("mate.deep_gemm", __doc__, {name: deep_gemm[name] for name in _DEEP_GEMM if name != "bf16_gemm_nt"})
    publish("deep_gemm", __doc__, {"__version__": "0.2.2+emulated", **deep_gemm})
    publish("flash_mla", __doc__, {
        "get_mla_metadata": attention.get_mla_metadata, "FlashMLASchedMeta": attention.FlashMLASchedMeta,
        **{name: on_device(name, getattr(attention, name)) for name in _FLASH_MLA}})
    torch.rms_norm = _or_torch(torch.rms_norm, "rms_norm", elementwise.rms_norm)
    torch.swish_glu = torch.nn.functional.swish_glu = on_device("swish_glu", elementwise.swish_glu)
    torch.nn.functional.rope = on_device("rope", elementwise.rope)
    _installed = torch_musa
    return _installed
