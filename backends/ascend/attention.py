"""The lightning indexer and sparse attention over the selected positions, both on a paged cache."""

from __future__ import annotations

from torch import Tensor

from porthal.backends.ascend.calls import HALVES, NPU
from porthal.backends.ascend.plan import paged
from porthal.hal import (
    Batch,
    Pages,
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

HEADS = one_of(1, 2, 4, 8, 16, 32, 64, 128)
PAGE = multiple_of(16, at_most=1024)  # slots per page, of every op that takes a block table


class Attention:
    @limits(
        provider="torch_npu.npu_lightning_indexer",
        tie="any",
        dtypes={"iq": HALVES, "w": any_of(same_as("iq"), one_of("float32")), "keys": same_as("iq")},
        G=at_most(64),
        D=128,
        block_size=PAGE,
        k=any_of(at_most(2048), one_of(3072, *range(4096, 8193, 1024))),
    )
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        """Positions only, so the positive scale is left out: it cannot change their order."""
        plan = batch.native
        found, _ = NPU.npu_lightning_indexer(
            query=iq.contiguous(),
            key=paged(keys, 0),
            weights=w.contiguous(),
            actual_seq_lengths_query=plan.cu_q[1:],
            actual_seq_lengths_key=plan.kv_len,
            block_table=plan.block_table,
            layout_query="TND",
            layout_key="PA_BSND",
            sparse_count=k,
            sparse_mode=3,
        )
        return selected(found, batch, k)

    @limits(
        provider="torch_npu.npu_sparse_flash_attention",
        dtypes={"q_latent": HALVES, "q_rope": same_as("q_latent"), "kv": same_as("q_latent")},
        N=HEADS,
        C=512,
        R=64,
        block_size=PAGE,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        plan, rows, latents = batch.native, sel.native, paged(kv, 0)
        o = NPU.npu_sparse_flash_attention(
            query=q_latent.contiguous(),
            key=latents,
            value=latents,
            sparse_indices=rows.indices[:, None].contiguous(),
            scale_value=scale,
            block_table=plan.block_table,
            actual_seq_lengths_query=plan.cu_q[1:],
            actual_seq_lengths_kv=plan.kv_len,
            query_rope=q_rope.contiguous(),
            key_rope=paged(kv, 1),
            sparse_block_size=1,
            layout_query="TND",
            layout_kv="PA_BSND",
            sparse_mode=3,
            attention_mode=2,
        )[0]
        return only_of_rows_with_keys(o, rows)


def selected(found: Tensor, batch: Batch, k: int) -> Selection:
    """The indexer's result, which is undefined in rows without keys."""
    visible = batch.native.visible
    indices = found[:, 0].masked_fill_((visible == 0)[:, None], -1)
    return Selection(SelectionSpec(batch.T, k), Rows(indices, visible.clamp(max=k)))


def only_of_rows_with_keys(o: Tensor, rows: Rows) -> Tensor:
    """Attention's result, which is undefined in rows that select nothing."""
    made: Tensor = o.masked_fill_((rows.length == 0)[:, None, None], 0)
    return made
