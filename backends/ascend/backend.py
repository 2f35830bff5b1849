"""Ascend's own kernels. Every limit stated here is from Huawei's op-plugin pages for torch_npu (2026-08), by op name.

The DSA ops exist from CANN 8.5 on; `torch_npu` re-exports what its binary registered, so a missing one is seen at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from porthal.backends.torch.backend import Torch
from porthal.hal import (
    Batch,
    CallSpec,
    Kernel,
    Pages,
    Place,
    Rows,
    Selection,
    SelectionSpec,
    any_of,
    at_most,
    limits,
    multiple_of,
    one_of,
    same_as,
)

HALF = one_of("bfloat16", "float16")
PAGE = multiple_of(16, at_most=1024)  # slots per page, of every op that takes a block table


class Ascend(Torch):
    """An NPU. Pages keep one contiguous tensor per field, which is the layout PA_BSND; lengths are int32 on the device."""

    engine = "hccl"  # of torch.distributed

    def __init__(self, device: str = "") -> None:
        super().__init__(f"npu:{device or 0}")

    def __str__(self) -> str:
        return f"{self.name}:{torch.device(self.device).index}"

    @property
    def place(self) -> Place:
        return "emulated device" if "emulated" in torch.npu.get_device_name() else "hardware"

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        call = kernel.provider.rpartition(".")[2]
        if call and not hasattr(torch_npu, call):
            return f"this torch_npu ({torch_npu.__version__}) has no {call}: it needs CANN 8.5 or later"
        return super().refuses(op, kernel, spec)

    @limits(
        provider="torch_npu.npu_rms_norm",
        dtypes={"x": one_of("float32", "bfloat16", "float16"), "weight": any_of(same_as("x"), one_of("float32"))},
    )
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]

    @limits(
        provider="torch_npu.npu_lightning_indexer",
        tie="any",
        dtypes={"iq": HALF, "w": any_of(same_as("iq"), one_of("float32")), "keys": same_as("iq")},
        G=at_most(64),
        D=128,
        block_size=PAGE,
        k=any_of(at_most(2048), one_of(3072, *range(4096, 8193, 1024))),
    )
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        """Positions only, so the positive scale is left out: it cannot change their order."""
        plan = batch.native
        found, _ = torch_npu.npu_lightning_indexer(
            query=iq.contiguous(),
            key=_paged(keys, 0),
            weights=w.contiguous(),
            actual_seq_lengths_query=plan.cu_q[1:],
            actual_seq_lengths_key=plan.kv_len,
            block_table=plan.block_table,
            layout_query="TND",
            layout_key="PA_BSND",
            sparse_count=k,
            sparse_mode=3,
        )
        indices, length = found[:, 0], plan.visible.clamp(max=k)
        if _padded(batch):  # the op leaves rows without keys undefined
            indices = torch.where(length[:, None] > 0, indices, -1)
        return Selection(SelectionSpec(batch.T, k), Rows(indices, length))

    @limits(
        provider="torch_npu.npu_sparse_flash_attention",
        dtypes={"q_latent": HALF, "q_rope": same_as("q_latent"), "kv": same_as("q_latent")},
        N=one_of(1, 2, 4, 8, 16, 32, 64, 128),
        C=512,
        R=64,
        block_size=PAGE,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        plan, rows, latents = batch.native, sel.native, _paged(kv, 0)
        o = torch_npu.npu_sparse_flash_attention(
            query=q_latent.contiguous(),
            key=latents,
            value=latents,
            sparse_indices=rows.indices[:, None].contiguous(),
            scale_value=scale,
            block_table=plan.block_table,
            actual_seq_lengths_query=plan.cu_q[1:],
            actual_seq_lengths_kv=plan.kv_len,
            query_rope=q_rope.contiguous(),
            key_rope=_paged(kv, 1),
            sparse_block_size=1,
            layout_query="TND",
            layout_kv="PA_BSND",
            sparse_mode=3,
            attention_mode=2,
        )[0]
        return torch.where(rows.length[:, None, None] > 0, o, 0)  # the op leaves rows that select nothing undefined


def _paged(pages: Pages, field: int) -> Any:
    """A field as PA_BSND: [blocks, block_size, 1, width]."""
    name, width = pages.spec.fields[field]
    return pages[name].view(pages.spec.n_blocks, pages.spec.block_size, 1, width)


def _padded(batch: Batch) -> bool:
    return bool((batch.visible == 0).any())
