"""DeepGEMM's products of float8, as CUDA's package has them and Moore Threads' MATE under the same name: of weights in blocks
of 128 x 128, and the indexer's scores of keys in pages of 64, in which all codes lie before all scales.

Checked against DeepGEMM 0274ad7 and MATE 0.2.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.backend import _chunks
from porthal.backends.torch.interfaces.deep_gemm import DEEP_GEMM, by_expert, codes_of, experts, held
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.ranking import highest
from porthal.hal import (
    Batch,
    Pages,
    PagesSpec,
    Rows,
    Selection,
    SelectionSpec,
    Weight,
    at_least,
    at_most,
    limits,
    multiple_of,
    one_of,
    same_as,
)
from porthal.hal.layouts import DEEPGEMM, Layout

PAGE = 64
HALF = one_of("bfloat16", "float16")
PAGED = "deep_gemm.fp8_paged_mqa_logits+get_paged_mqa_logits_metadata+get_num_sms"
GROUPED = "deep_gemm.m_grouped_fp8_gemm_nt_contiguous+get_mk_alignment_for_contiguous_layout"


class DeepGemmFp8(Packed):
    def _layout(self, spec: PagesSpec) -> Layout | None:
        taken = spec.scheme == "fp8_keys" and spec.block_size == PAGE
        return DEEPGEMM if taken and [width for _, width in spec.fields] == [128] else super()._layout(spec)

    # -- weights in blocks -------------------------------------------------------------------------------------------

    @limits(
        provider="deep_gemm.fp8_gemm_nt",
        schemes="fp8_block",
        dtypes={"x": HALF},
        T=at_least(1),
        K=multiple_of(16),
        N=multiple_of(8),
        out="x",
    )
    def linear(self, x: Tensor, w: Weight, *, out: str = "x") -> Tensor:
        y = x.new_empty(x.shape[0], w.spec.shape[0])
        DEEP_GEMM.fp8_gemm_nt(codes_of(x), held(w), y)
        return y

    @limits(provider=GROUPED, schemes="fp8_block", dtypes={"x": HALF}, K=multiple_of(16), N=multiple_of(8))
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return by_expert(x, w, counts)

    @limits(
        provider=GROUPED,
        schemes="fp8_block",
        dtypes={"x": HALF, "w13": same_as("x"), "w2": same_as("x")},
        H=multiple_of(16),
        I=multiple_of(16),
    )
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(self, x, w13, w2, ids - first_expert, weights)

    # -- scores of the indexer ---------------------------------------------------------------------------------------

    @limits(provider=PAGED, schemes="fp8_keys", T=at_least(1), G=at_most(64), D=128, block_size=PAGE)
    def indexer_scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, scale: float) -> Tensor:
        parts = [scores[:, : batch.max_kv] for _, scores in _scores(iq, w, keys, batch, scale)]
        return torch.cat(parts)

    @limits(provider=PAGED, schemes="fp8_keys", T=at_least(1), G=at_most(64), D=128, block_size=PAGE)
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        found = [highest(scores, batch.native.visible[rows], k) for rows, scores in _scores(iq, w, keys, batch, scale)]
        return Selection(SelectionSpec(batch.T, k), Rows(*map(torch.cat, zip(*found))))


def _scores(iq: Tensor, w: Tensor, keys: Pages, batch: Batch, scale: float) -> Iterator[tuple[slice, Tensor]]:
    """Some rows and their float32 scores, as wide as the table of pages; each row is a request of one, of 32 or 64 heads.

    The scales of the queries go into the heads' weights. Behind the last key, where the library leaves what was there, is -inf.
    """
    plan, more = batch.native, (32 if iq.shape[1] <= 32 else 64) - iq.shape[1]
    width = plan.block_table.shape[1] * PAGE
    cache = keys["packed"].view(keys.spec.n_blocks, PAGE, 1, -1)
    position = torch.arange(width, device=iq.device)
    for rows in _chunks(0, batch.T, 4 * width):
        visible = plan.visible[rows, None]
        codes, factor = codes_of(F.pad(iq[rows], (0, 0, 0, more)))
        weights = F.pad(scale * w[rows].float(), (0, more)) * factor[..., 0]
        length = visible.clamp(min=1)  # what it makes of a row without keys nobody says
        table = plan.block_table.clamp(min=0).index_select(0, plan.row_request[rows])
        schedule = DEEP_GEMM.get_paged_mqa_logits_metadata(length, PAGE, DEEP_GEMM.get_num_sms())
        scores = DEEP_GEMM.fp8_paged_mqa_logits(codes[:, None], cache, weights, length, table, schedule, width, False)
        yield rows, scores.masked_fill(position >= visible, -torch.inf)
