"""The lightning indexer and sparse attention over the selected positions, both on a paged cache."""

from __future__ import annotations

from torch import Tensor

from porthal.backends.ascend.calls import HALVES, Call, calling
from porthal.backends.ascend.plan import paged
from porthal.hal import Batch, Pages, Rows, Selection, SelectionSpec, any_of, at_most, multiple_of, one_of, same_as

LENGTHS = "actual_seq_lengths_query", "block_table", "layout_query", "sparse_mode"
INDEXER = Call(
    "npu_lightning_indexer",
    *("query", "key", "weights", "actual_seq_lengths_key", "layout_key", "sparse_count", *LENGTHS),
)
ATTENTION = Call(
    "npu_sparse_flash_attention",
    *("query", "key", "value", "sparse_indices", "scale_value", "actual_seq_lengths_kv", "query_rope", "key_rope"),
    *("sparse_block_size", "layout_kv", "attention_mode", *LENGTHS),
)
HEADS = one_of(1, 2, 4, 8, 16, 32, 64, 128)
PAGE = multiple_of(16, at_most=1024)  # slots per page, of every op that takes a block table


class Attention:
    @calling(
        INDEXER,
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
        found, _ = INDEXER(
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
        indices = found[:, 0].masked_fill_((plan.visible == 0)[:, None], -1)  # rows without keys are undefined
        return Selection(SelectionSpec(batch.T, k), Rows(indices, plan.visible.clamp(max=k)))

    @calling(
        ATTENTION,
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
        o = ATTENTION(
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
        made: Tensor = o.masked_fill_((rows.length == 0)[:, None, None], 0)  # rows that select nothing are undefined
        return made
