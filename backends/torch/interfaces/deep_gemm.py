"""DeepGEMM's grouped products, as CUDA's package has them and Moore Threads' MATE under the same name.

Checked against DeepGEMM 0274ad7 and MATE 0.2.2. Rows of an expert begin at a multiple of the library's alignment; an expert
id of -1 marks rows that are not computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from porthal.backends.torch.backend import Torch, _combine, _row_of, _rows_or_zero, _sorted_by_expert
from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.schemes import quantised
from porthal.hal import Weight, limits, multiple_of, same_as, scheme_of

# The fourth argument is m_indices or grouped_layout, by version. The alignment is 128 on NVIDIA's chips and 256 in MATE.
DEEP_GEMM = Library(
    "deep_gemm",
    m_grouped_bf16_gemm_nt_contiguous="a b d m_indices /",
    m_grouped_fp8_gemm_nt_contiguous="a b d m_indices /",
    get_mk_alignment_for_contiguous_layout="",
    fp8_gemm_nt="a b d /",
    get_num_sms="",
    get_paged_mqa_logits_metadata="context_lens block_kv num_sms /",
    fp8_paged_mqa_logits="q kv_cache weights context_lens block_table schedule_meta max_context_len clean_logits /",
)
GROUPED = "deep_gemm.m_grouped_bf16_gemm_nt_contiguous+get_mk_alignment_for_contiguous_layout"


class Aligned(NamedTuple):
    """Where the rows of M sorted ones lie, with room for every distribution, so that nothing waits for the counts."""

    expert: Tensor  # int32 [room], -1 for a row that stands for none
    origin: Tensor  # int32 [room]: its sorted row, or -1


class DeepGemm(Torch):
    @limits(provider=GROUPED, dtypes={"x": "bfloat16", "w": same_as("x")}, K=multiple_of(8), N=multiple_of(8))
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return by_expert(x, w, counts)

    @limits(
        provider=GROUPED,
        dtypes={"x": "bfloat16", "w13": same_as("x"), "w2": same_as("x")},
        H=multiple_of(8),
        I=multiple_of(8),
    )
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(self, x, w13, w2, ids - first_expert, weights)


def by_expert(x: Tensor, w: Weight, counts: Tensor) -> Tensor:
    """Rows by expert times its matrix; what is behind them is undefined."""
    rows = _aligned(counts, x.shape[0])
    y = _product(_rows_or_zero(x, rows.origin), w, rows)
    out = x.new_zeros(x.shape[0] + 1, y.shape[1])  # what stands for no row lands behind the last
    return out.index_copy_(0, rows.origin.long() % len(out), y)[:-1]


def experts(chip: Torch, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer of these experts, of whom ids count from 0. Rows are copied into their places once, and never sorted back."""
    counts, source = _sorted_by_expert(ids, w13.spec.shape[0], 0)
    rows = _aligned(counts, source.shape[0])
    places = torch.where(rows.origin >= 0, source[rows.origin.clamp(min=0)], -1)
    h = chip.silu_mul(_product(_rows_or_zero(x, _row_of(places, ids.shape[1])), w13, rows))
    return _combine(_product(h, w2, rows), places, weights)


def _aligned(counts: Tensor, M: int) -> Aligned:
    step = int(DEEP_GEMM.get_mk_alignment_for_contiguous_layout())
    experts = counts.shape[0]
    room = -(-(M + min(experts, M) * (step - 1)) // step) * step
    ends = ((counts + step - 1) // step * step).cumsum(0)
    place = torch.arange(room, device=counts.device)
    expert = torch.searchsorted(ends, place, right=True)
    inside = expert.clamp(max=experts - 1)
    rank = place - (ends - (counts + step - 1) // step * step)[inside]
    filled = (expert < experts) & (rank < counts[inside])
    origin = (counts.cumsum(0) - counts)[inside] + rank
    return Aligned(*(torch.where(filled, v, -1).to(torch.int32) for v in (expert, origin)))


def _product(x: Tensor, w: Weight, rows: Aligned) -> Tensor:
    y = x.new_zeros(x.shape[0], w.spec.shape[1])
    if w.spec.quantised:
        DEEP_GEMM.m_grouped_fp8_gemm_nt_contiguous(codes_of(x), held(w), y, rows.expert)
    else:
        DEEP_GEMM.m_grouped_bf16_gemm_nt_contiguous(x, w.native, y, rows.expert)
    return y


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as codes of e4m3, and a float32 scale for each 128 of a row's. By PyTorch: the library has no call for that."""
    parts = quantised(scheme_of("fp8_group"), x)
    return parts["codes"].view(torch.float8_e4m3fn), parts["scale"]


def held(w: Weight) -> tuple[Tensor, Tensor]:
    return w.native["codes"].view(torch.float8_e4m3fn), w.native["scale"]
