"""DeepGEMM's grouped products, as CUDA's package has them and Moore Threads' MATE under the same name.

Checked against DeepGEMM 0274ad7 and MATE 0.2.2. Rows of an expert begin at a multiple of the library's alignment; an expert
id of -1 marks rows that are not computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.backend import Torch, _chunks
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
    """Where M rows of experts lie, with room for every distribution, so that nothing waits for the counts."""

    place: Tensor  # int64 [M]; behind the room for a row of no expert
    expert: Tensor  # int32 [room], -1 for a place without a row


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
    """Rows by expert times its matrix; what is behind them is zero."""
    position = torch.arange(x.shape[0], device=x.device)
    rows = _aligned(torch.searchsorted(counts.cumsum(0), position, right=True), counts)
    return _product(_placed(x, rows), w, rows).index_select(0, rows.place)


def experts(chip: Torch, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer of these experts, of whom ids count from 0. Rows are copied into their places once, and never sorted back."""
    (T, k), E, flat = ids.shape, w13.spec.shape[0], ids.flatten()
    expert, choice = torch.sort(flat.masked_fill((flat < 0) | (flat >= E), E), stable=True)
    edges = torch.searchsorted(expert, torch.arange(E + 1, dtype=expert.dtype, device=x.device))
    rows = _aligned(expert, edges.diff())
    h = chip.silu_mul(_product(_placed(x.index_select(0, choice // k), rows), w13, rows)[:-1])
    y = _product(h, w2, rows)
    places = torch.empty_like(choice).index_copy_(0, choice, rows.place).view(T, k)
    out = torch.empty_like(x)
    for part in _chunks(0, T, 8 * k * x.shape[1]):
        chosen = y.index_select(0, places[part].flatten()).view(-1, k, x.shape[1])
        out[part] = (weights[part, :, None] * chosen.float()).sum(1)
    return out


def _aligned(expert: Tensor, counts: Tensor) -> Aligned:
    """Of rows by expert, each with the number of its own, which is that of all experts for a row of none."""
    step = int(DEEP_GEMM.get_mk_alignment_for_contiguous_layout())
    M, experts = expert.shape[0], counts.shape[0]
    room = -(-(M + min(experts, M) * (step - 1)) // step) * step
    gaps = -counts % step
    moved = F.pad(gaps.cumsum(0) - gaps, (0, 1), value=room)[expert]
    place = (torch.arange(M, device=expert.device) + moved).clamp(max=room)
    marks = torch.full((room + 1,), -1, dtype=torch.int32, device=expert.device)
    return Aligned(place, marks.index_copy_(0, place, expert.to(torch.int32))[:-1])


def _placed(x: Tensor, rows: Aligned) -> Tensor:
    """Zeros where no row lies, as the library computes there, too."""
    room = x.new_zeros(rows.expert.shape[0] + 1, x.shape[1])
    return room.index_copy_(0, rows.place, x)[:-1]


def _product(x: Tensor, w: Weight, rows: Aligned) -> Tensor:
    """With a row of zeros behind, for rows of no expert."""
    y = x.new_zeros(x.shape[0] + 1, w.spec.shape[1])
    if w.spec.quantised:
        DEEP_GEMM.m_grouped_fp8_gemm_nt_contiguous(codes_of(x), held(w), y[:-1], rows.expert)
    else:
        DEEP_GEMM.m_grouped_bf16_gemm_nt_contiguous(x, w.native, y[:-1], rows.expert)
    return y


def codes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as codes of e4m3, and a float32 scale for each 128 of a row's. By PyTorch: the library has no call for that."""
    parts = quantised(scheme_of("fp8_group"), x)
    return parts["codes"].view(torch.float8_e4m3fn), parts["scale"]


def held(w: Weight) -> tuple[Tensor, Tensor]:
    return w.native["codes"].view(torch.float8_e4m3fn), w.native["scale"]
