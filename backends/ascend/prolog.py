"""The projections in front of MLA, their norms, rotation and cache write, in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from porthal.backends.ascend.attention import HEADS, PAGE
from porthal.backends.ascend.calls import NPU
from porthal.backends.ascend.plan import memory, still, turn
from porthal.backends.ascend.rows import SOME
from porthal.hal import Batch, Pages, Weight, WeightSpec, limits, one_of, same_as
from porthal.hal.backend import Read

PROLOG = "torch_npu.npu_mla_prolog_v3+npu_format_cast+npu_rotary_mul+npu_scatter_nd_update_"
NZ = 29  # FRACTAL_NZ, the order of the matrix unit's tiles


class Prolog:
    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Its matrices are [in, out] in tiles, W_UK is [N, D, C] in rows."""
        if spec.op != "mla_prolog":
            weight: Weight = super().prepare(spec, read, into)  # type: ignore[misc]
            return weight
        rows = super().prepare(spec, read).native.transpose(-1, -2).contiguous()  # type: ignore[misc]
        packed = rows if spec.operand == "w_uk" else in_tiles(rows)
        if into is None:
            return Weight(spec, packed)
        into.native.copy_(packed)
        return into

    def to_logical(self, operand: Any) -> dict[str, np.ndarray[Any, Any]]:
        logical: dict[str, np.ndarray[Any, Any]] = super().to_logical(operand)  # type: ignore[misc]
        if isinstance(operand, Weight) and operand.spec.op == "mla_prolog":
            return {"w": logical["w"].swapaxes(-1, -2)}
        return logical

    @limits(
        provider=PROLOG,
        dtypes={"h": one_of("bfloat16"), "q_norm": same_as("h"), "kv_norm": same_as("h")},
        T=SOME,
        H=one_of(1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192),
        Q=one_of(1536, 2048),
        N=HEADS,
        D=one_of(128, 192),
        C=512,
        R=64,
        block_size=PAGE,
    )
    def mla_prolog(
        self,
        h: Tensor,
        q_a: Weight,
        q_norm: Tensor,
        q_b: Weight,
        kv_a: Weight,
        kv_norm: Tensor,
        w_uk: Weight,
        kv: Pages,
        batch: Batch,
        *,
        theta: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Pages]:
        """It turns by bfloat16, whose errors all heads share: it is told to turn nothing, and pairs are turned behind it. It
        leaves the first elements of all pairs before the second ones, in q_rope and in the cache: both are put back."""
        plan, page = batch.native, (-1, kv.spec.block_size, 1)
        c, kp = (memory(kv, name) for name, _ in kv.spec.fields)
        facts = theta, kp.shape[1], "half"
        (cos, sin), by = plan.table(still, *facts, h.dtype), plan.table(turn, *facts, torch.float32)
        q_latent, q_rope, _, qr, _ = NPU.npu_mla_prolog_v3(
            token_x=h.contiguous(),
            weight_dq=q_a.native,
            weight_uq_qr=q_b.native,
            weight_uk=w_uk.native,
            weight_dkv_kr=kv_a.native,
            rmsnorm_gamma_cq=q_norm.contiguous(),
            rmsnorm_gamma_ckv=kv_norm.contiguous(),
            rope_sin=sin[:, 0],
            rope_cos=cos[:, 0],
            kv_cache=c.view(*page, c.shape[1]),
            kr_cache=kp.view(*page, kp.shape[1]),
            cache_index=plan.rows[:, 0],
            rmsnorm_epsilon_cq=eps,
            rmsnorm_epsilon_ckv=eps,
            cache_mode="PA_BSND",
            query_norm_flag=True,
        )
        halves = torch.cat((q_rope, kp.index_select(0, plan.rows[:, 0])[:, None]), 1).float()
        turned = _in_pairs(NPU.npu_rotary_mul(input=halves, r1=by.cos, r2=by.sin, rotary_mode="half").to(h.dtype))
        NPU.npu_scatter_nd_update_(input=kp, indices=plan.rows, updates=turned[:, -1].contiguous())
        return q_latent, turned[:, :-1], qr, kv


def in_tiles(rows: Tensor) -> Tensor:
    """Without the setting the cast gives back rows, with a warning alone."""
    if config := getattr(torch.npu, "config", None):
        config.allow_internal_format = True
    made: Tensor = NPU.npu_format_cast(input=rows, acl_format=NZ)
    return made


def _in_pairs(x: Tensor) -> Tensor:
    """[..., first elements, second elements] as [..., pairs]."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
