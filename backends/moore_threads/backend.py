"""Moore Threads' own kernels: MATE's library, which has DeepGEMM's and FlashMLA's interfaces, and its build of PyTorch.

Limits are from MATE 0.2.2 and torch_musa 2.7.1. DeepGEMM's scores of the indexer take FP8 keys alone.
"""

from __future__ import annotations

import torch
import torch_musa  # noqa: F401  gives torch its device
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.backends.torch.capture import Capturing
from porthal.backends.torch.interfaces.deep_gemm import DeepGemm
from porthal.backends.torch.interfaces.deep_gemm_fp8 import DeepGemmFp8
from porthal.backends.torch.interfaces.flash_mla import FlashMla, FlashMlaPacked
from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.ranking import highest
from porthal.backends.torch.tables import StepPlan, angles, spliced
from porthal.backends.torch.vendor import Vendor
from porthal.hal import (
    Batch,
    Pages,
    Rows,
    Selection,
    SelectionSpec,
    UsageError,
    any_of,
    limits,
    multiple_of,
    one_of,
    same_as,
)

# `import mate` finds a package of this name that is another one; only Moore Threads' has mate.deep_gemm.
MATE = Library(
    "mate",
    proof="mate.deep_gemm",
    moe_fused_gate="input bias num_expert_group topk_group topk num_fused_shared_experts routed_scaling_factor renormalize "
    "apply_routed_scaling_factor_on_output",
)
PATCHED = Library(
    "torch.nn.functional", swish_glu="input", rope="input freq_cis rotary_interleaved batch_first multi_latent_attention"
)
STEP = 256  # rows of a step that may be captured
# Experts of one group for which MATE compiles its gate; another kernel has room for 128.
EXPERTS = any_of(one_of(160, 256, 384), multiple_of(32, at_most=128))


class MooreThreads(FlashMlaPacked, FlashMla, DeepGemmFp8, DeepGemm, Vendor):
    """An S5000. Products and the write to the cache are aten's."""

    kind, engine = "musa", "mccl"
    package, visible = "torch_musa", "MUSA_VISIBLE_DEVICES"

    _scores = Capturing._scores

    @limits(provider="aten.bmm")
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        """Of a step over the whole planned table, so that it can be captured. A prefill would read its keys for each row."""
        if batch.T > STEP:
            if torch.musa.is_current_stream_capturing():
                raise UsageError(f"the captured batch has {batch.T} rows, the indexer takes at most {STEP}: capture fewer")
            return Torch.indexer_topk(self, iq, w, keys, batch, k=k, scale=scale)
        scores = self._scores(iq, w, keys, batch, scale)
        return Selection(SelectionSpec(batch.T, k), Rows(*highest(scores, batch.native.visible, k)))

    @limits(provider="torch.rms_norm", dtypes={"weight": same_as("x")})
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        return torch.rms_norm(x, weight.shape, weight, eps)

    @limits(provider="torch.rms_norm", dtypes={"weight": same_as("x")})
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        r = x + residual
        return torch.rms_norm(r, weight.shape, weight, eps), r

    @limits(provider="torch.nn.functional.swish_glu")
    def silu_mul(self, x: Tensor) -> Tensor:
        return PATCHED.swish_glu(input=x)

    @limits(provider="torch.nn.functional.rope")
    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        """In float32, so that no table of bfloat16 is made of the angles. Rows are a sequence of one request for it, and pairs
        lie in halves: its own flags for pairs are untested, or leave the result in that order."""
        part = x[:, None, :, start : start + width]
        pairs = layout == "interleaved"
        if pairs:
            part = part.unflatten(-1, (-1, 2)).transpose(-1, -2)
        part = part.to(torch.float32, memory_format=torch.contiguous_format)
        [table] = batch.native.table(_turn, theta, width)
        y = PATCHED.rope(
            input=part.flatten(3),
            freq_cis=table,
            rotary_interleaved=False,
            batch_first=False,
            multi_latent_attention=False,
        )[:, 0]
        if pairs:
            y = y.unflatten(-1, (2, -1)).transpose(-1, -2).to(x.dtype, memory_format=torch.contiguous_format).flatten(2)
        return spliced(x, y, start)

    @limits(provider="mate.moe_fused_gate", tie="any", E=EXPERTS, n_group=1)
    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The sum, which may be 0, is divided by here, as the op adds nothing to it. Equal groups would be in its own order."""
        s, ids = MATE.moe_fused_gate(
            input=logits,
            bias=bias,
            num_expert_group=1,
            topk_group=1,
            topk=k,
            num_fused_shared_experts=0,
            routed_scaling_factor=1.0,
            renormalize=False,
            apply_routed_scaling_factor_on_output=False,
        )
        return ids, scale * s / (s.sum(-1, keepdim=True) + 1e-20)


def _turn(plan: StepPlan, theta: float, width: int) -> tuple[Tensor]:
    return (angles(plan.positions, theta, width).repeat(1, 2),)
