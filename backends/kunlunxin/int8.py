"""Kunlunxin's calls on codes of int8: products, and the cache of the indexer's keys, a page of which has all codes before all
scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.kunlunxin.calls import GATE, HALF, OPS, SORTED, codes_of, experts, largest
from porthal.backends.torch.backend import _chunks
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.ranking import highest
from porthal.hal import Batch, Pages, PagesSpec, Rows, Selection, SelectionSpec, Weight, at_least, limits
from porthal.hal.layouts import DEEPGEMM, Layout

SCORES = "kunlun_ops.quant2d+I8_paged_mqa_logits"


class Int8(Packed):
    def _layout(self, spec: PagesSpec) -> Layout | None:
        taken = spec.scheme == "int8_keys" and [width for _, width in spec.fields] == [128]
        return DEEPGEMM if taken else super()._layout(spec)

    @limits(provider="kunlun_ops.quant2d+matmul", schemes="int8_channel", dtypes={"x": HALF}, T=at_least(1), out="x")
    def linear(self, x: Tensor, w: Weight, *, out: str = "x") -> Tensor:
        codes, top = codes_of(x)
        y = x.new_empty(x.shape[0], w.spec.shape[0])
        OPS.matmul(
            x=codes,
            w=w.native["codes"],
            out=y,
            x_trans=False,
            w_trans=True,
            alpha=1.0,
            beta=0.0,
            x_pc_max=top,
            w_pc_max=largest(w),
        )
        return y

    @limits(provider=f"{SORTED}.quant2d+moe_fc+moe_post", schemes="int8_channel", dtypes={"x": HALF}, T=at_least(1))
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(self, x, w13, w2, ids - first_expert, weights)

    @limits(provider="xspeedgate_ops.indexer_k_quant_and_cache", schemes="int8_keys", A=128)
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """What it makes of slot -1 is not said: the first row that is written stands in for such."""
        if second is not None:
            return super().kv_write(pages, batch, first, second)
        plan, spec = batch.native, pages.spec
        if (batch.slots >= 0).any():
            rows, cache = first.index_select(0, plan.written), pages["packed"].view(spec.n_blocks, spec.block_size, -1)
            GATE.indexer_k_quant_and_cache(rows, cache, plan.targets, 128, "ue8m0")
        return pages

    kv_write.capturable = False

    @limits(provider=SCORES, schemes="int8_keys", T=at_least(1), D=128)
    def indexer_scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, scale: float) -> Tensor:
        return torch.cat([scores[:, : batch.max_kv] for _, scores in _scores(iq, w, keys, batch, scale)])

    indexer_scores.capturable = False

    @limits(provider=SCORES, schemes="int8_keys", T=at_least(1), D=128)
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        found = [highest(scores, batch.native.visible[rows], k) for rows, scores in _scores(iq, w, keys, batch, scale)]
        return Selection(SelectionSpec(batch.T, k), Rows(*map(torch.cat, zip(*found))))

    indexer_topk.capturable = False


def _scores(iq: Tensor, w: Tensor, keys: Pages, batch: Batch, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Some rows and their float32 scores, as wide as the table of pages; each row is a request of one. Lengths go twice, on the
    host and on the device; scales of the keys are gathered by position; those of the queries go into the heads' weights."""
    plan, size, (_, heads, width) = batch.native, batch.block_size, iq.shape
    room = plan.block_table.shape[1] * size
    wide = -(-room // 64) * 64
    position = torch.arange(room, device=iq.device)
    for rows in _chunks(0, batch.T, 8 * wide):
        T = rows.stop - rows.start
        codes, top = codes_of(iq[rows].flatten(0, 1))
        weights = scale * w[rows].float() * (top / 127).view(T, heads)
        table = plan.block_table.clamp(min=0).index_select(0, plan.row_request[rows])
        factors = keys["k_scale"].index_select(0, table.flatten()).view(T, room)
        scores, visible = iq.new_empty(T, 1, wide, dtype=torch.float32), plan.visible[rows, None]
        OPS.I8_paged_mqa_logits(
            q=codes.view(T, 1, heads, width),
            fused_kv_cache=(keys["k"][:, :, None], F.pad(factors, (0, wide - room))),
            weights=weights[:, None],
            context_lens=(torch.from_numpy(np.maximum(batch.visible[rows], 1)), visible[:, 0].clamp(min=1)),
            block_table=table,
            max_context_len=wide,
            clean_logits=False,
            out=scores,
            use_xfa_boost=False,
        )
        yield rows, scores[:, 0, :room].masked_fill(position >= visible, -torch.inf)
