"""sample: one program per row, without a sort. What a sort would tell is asked of sums over all logits at least as high.

The highest key whose sum (of ones, or of probabilities) reaches a target is found two bits at a time. Equal logits have equal
probabilities, so that a place among them follows from a division.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch
from porthal.backends.cuda.kernels.ordering import key_of


@triton.jit
def _rank(x):
    """uint32, rising with the logit."""
    return key_of(x).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _block(logits, at, V, top, temperature):
    """Keys, probabilities times a constant, and which logits may be drawn."""
    x = tl.load(logits + at, mask=at < V, other=float("-inf")).to(tl.float32)
    real = (x == x) & (x > float("-inf"))
    shares = tl.where(real, tl.exp((tl.where(real, x, top) - top) / temperature), 0.0)
    return _rank(x), shares, real


@triton.jit
def _edge(logits, V, top, temperature, target, COUNTS: tl.constexpr, BEYOND: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key at which the sum reaches the target, or is beyond it."""
    edge, digit = tl.full((), 0, tl.uint32), tl.arange(0, 4)
    for turn in range(16):
        tried = edge | (digit.to(tl.uint32) << (30 - 2 * turn))
        sums = tl.zeros((4, BLOCK), tl.float32)
        for start in range(0, V, BLOCK):
            keys, shares, real = _block(logits, start + tl.arange(0, BLOCK), V, top, temperature)
            weights = real.to(tl.float32) if COUNTS else shares
            sums += tl.where(keys[None, :] >= tried[:, None], weights[None, :], 0.0)
        reached = tl.sum(sums, 1)
        enough = reached > target if BEYOND else reached >= target
        edge |= tl.sum((enough & (digit > 0)).to(tl.int32), 0).to(tl.uint32) << (30 - 2 * turn)
    return edge


@triton.jit
def _around(logits, V, top, temperature, edge, BLOCK: tl.constexpr):
    """The sum and the number of what is above an edge, what each at the edge adds, and how many are there."""
    above, level = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    mass, share = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        keys, shares, real = _block(logits, start + tl.arange(0, BLOCK), V, top, temperature)
        above += (real & (keys > edge)).to(tl.int32)
        level += (real & (keys == edge)).to(tl.int32)
        mass += tl.where(keys > edge, shares, 0.0)
        share = tl.maximum(share, tl.where(keys == edge, shares, 0.0))
    return tl.sum(mass, 0), tl.sum(above, 0), tl.max(share, 0), tl.sum(level, 0)


@triton.jit
def _sample(logits, u, temperature, top_k, top_p, ids, V, slogits, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * slogits
    heat, within = tl.load(temperature + row), tl.arange(0, BLOCK)
    highest, finite = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.int32)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + within, mask=start + within < V, other=float("-inf")).to(tl.float32)
        real = (x == x) & (x > float("-inf"))
        highest = tl.maximum(highest, tl.where(real, x, float("-inf")))
        lowest = tl.minimum(lowest, tl.where(real, x, float("inf")))
        finite += real.to(tl.int32)
    top, count = tl.max(highest, 0), tl.sum(finite, 0)
    edge, place = _rank(top), 1
    if (heat > 0) & (count > 0) & (top < float("inf")):
        limit = tl.load(top_k + row)
        limit = tl.where(limit > 0, tl.minimum(limit, count), count)
        last = _rank(tl.min(lowest, 0))
        if limit < count:
            last = _edge(logits, V, top, heat, limit.to(tl.float32), True, False, BLOCK)
        mass, above, share, level = _around(logits, V, top, heat, last, BLOCK)
        kept, last_place = limit, limit - above
        total = mass + share * last_place
        if tl.load(top_p + row) < 1:
            target = tl.maximum(tl.load(top_p + row) * total, 1e-30)
            reached = _edge(logits, V, top, heat, target, False, False, BLOCK)
            mass, above, share, level = _around(logits, V, top, heat, reached, BLOCK)
            needed = tl.minimum(tl.maximum(tl.ceil((target - mass) / tl.maximum(share, 1e-38)).to(tl.int32), 1), level)
            if (level > 0) & (above + needed < kept):
                last, kept, last_place, total = reached, above + needed, needed, mass + share * needed
        target = tl.load(u + row) * total
        edge = _edge(logits, V, top, heat, target, False, True, BLOCK)
        mass, above, share, level = _around(logits, V, top, heat, edge, BLOCK)
        place = tl.minimum(tl.floor((target - mass) / tl.maximum(share, 1e-38)).to(tl.int32) + 1, level)
        if (level == 0) | (above + place > kept):
            edge, place = last, last_place
    passed, drawn = 0, 0
    for start in range(0, V, BLOCK):
        at = start + within
        x = tl.load(logits + at, mask=at < V, other=0.0)
        same = (at < V) & (_rank(x) == edge)
        order = passed + tl.cumsum(same.to(tl.int32), 0)
        drawn += tl.sum(tl.where(same & (order == place), at, 0), 0)
        passed += tl.sum(same.to(tl.int32), 0)
    tl.store(ids + row, drawn)


def sample(logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, ids: Tensor) -> None:
    logits = dense_rows(logits)
    T, V = logits.shape
    given = (x.contiguous() for x in (u, temperature, top_k, top_p))
    block = block_of(V, 4096)
    launch(_sample, T, logits, *given, ids, V, logits.stride(0), BLOCK=block, num_warps=16 if block > 2048 else 4)
