"""CUDA: libraries that are known on its chips first, then kernels of our own in Triton, which no GPU has run yet."""

from __future__ import annotations

import torch

from porthal.backends.cuda.grouped_mm import GroupedMm
from porthal.backends.cuda.own import Own
from porthal.backends.torch.interfaces.deep_gemm import DeepGemm
from porthal.backends.torch.interfaces.deep_gemm_fp8 import DeepGemmFp8
from porthal.backends.torch.interfaces.flash_mla import FlashMla, FlashMlaPacked
from porthal.backends.torch.interfaces.library import lacks
from porthal.hal import CallSpec, Kernel

HOPPER, BLACKWELL = (9, 0), (10, 0)
# These cut float32 scales to powers of two on Blackwell, which those of a scheme are not (FlashMLA#184; DeepGEMM's layout.hpp).
SCALED = ("deep_gemm.fp8_gemm_nt", "deep_gemm.m_grouped_fp8", "flash_mla.flash_mla_with_kvcache")


class Cuda(FlashMlaPacked, FlashMla, DeepGemmFp8, DeepGemm, GroupedMm, Own):
    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        return lacks(kernel.provider) or self._unfit(kernel.provider, spec) or super().refuses(op, kernel, spec)

    def _unfit(self, provider: str, spec: CallSpec) -> str | None:
        """What a library does not do on this GPU; Triton's interpreter stands for one of Hopper's."""
        if not provider.startswith(("deep_gemm.", "flash_mla.")):
            return None
        found = HOPPER if self.emulated else torch.cuda.get_device_capability(self.device)
        if found not in (HOPPER, BLACKWELL):
            return f"the GPU has compute capability {found[0]}.{found[1]}, the library's kernels are for 9.0 and 10.0"
        if provider.startswith(SCALED) and found != HOPPER:
            return "on a GPU of compute capability 10.0 the library cuts scales to powers of two: needs 9.0"
        if provider.startswith("deep_gemm.") and "float16" in (spec.dtypes.get("x"), spec.dtypes.get("w")):
            return "results are bfloat16"
        return None
