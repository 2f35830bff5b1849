"""moe_route: one program per row, with the experts of each group in a row of its block."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import dense_rows, launch
from porthal.backends.cuda.kernels.ordering import LOWEST, first_highest, key_of


@triton.jit
def _moe_route(
    logits, bias, ids, weights, slogits, scale, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
    K: tl.constexpr, BG: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group, inner = tl.arange(0, BG), tl.arange(0, BE)
    expert = group[:, None] * SIZE + inner[None, :]
    real = (group[:, None] < GROUPS) & (inner[None, :] < SIZE)
    s = 1.0 / (1.0 + tl.exp(-tl.load(logits + row * slogits + expert, mask=real, other=0.0)))
    biased = s + tl.load(bias + expert, mask=real, other=0.0)
    biased = tl.where(real & (biased == biased), biased, float("-inf"))
    if GROUPS > 1:
        sums = tl.max(biased, 1)
        at = tl.min(tl.where(biased == sums[:, None], inner[None, :], BE), 1)
        if SIZE > 1:
            sums += tl.max(tl.where(inner[None, :] == at[:, None], float("-inf"), biased), 1)
        ranks = tl.where(group < GROUPS, key_of(sums), LOWEST)
        kept = group < 0
        for _ in range(KEPT):
            chosen = first_highest(ranks, group, BG)
            kept |= group == chosen
            ranks = tl.where(group == chosen, LOWEST, ranks)
        biased = tl.where(kept[:, None], biased, float("-inf"))

    keys = tl.where(real, key_of(biased), LOWEST)
    place = tl.arange(0, BK)
    found, values = tl.zeros((BK,), tl.int32), tl.zeros((BK,), tl.float32)
    for j in range(K):
        best = tl.max(tl.max(keys, 1), 0)
        chosen = tl.min(tl.min(tl.where(keys == best, expert, GROUPS * SIZE), 1), 0)
        here = real & (expert == chosen)
        found = tl.where(place == j, chosen, found)
        values = tl.where(place == j, tl.sum(tl.sum(tl.where(here, s, 0.0), 1), 0), values)
        keys = tl.where(here, LOWEST, keys)
    tl.store(ids + row * K + place, found, mask=place < K)
    tl.store(weights + row * K + place, scale * values / (tl.sum(values, 0) + 1e-20), mask=place < K)


def moe_route(logits: Tensor, bias: Tensor, ids: Tensor, weights: Tensor, scale: float, groups: int, kept: int) -> None:
    logits, bias = dense_rows(logits), bias.contiguous()
    size, k = logits.shape[1] // groups, ids.shape[1]
    launch(
        _moe_route, len(logits), logits, bias, ids, weights, logits.stride(0), scale, SIZE=size, GROUPS=groups, KEPT=kept,
        K=k, BG=triton.next_power_of_2(groups), BE=triton.next_power_of_2(size), BK=triton.next_power_of_2(k), num_warps=2,
    )  # fmt: skip
