"""indexer_scores: one program per tile of rows and block of keys, with the heads of all its rows in one product.

A tile's rows may be of several requests, which are met one after the other.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from porthal.backends.cuda.kernels.launching import block_of, dense_rows, launch


@triton.jit
def _indexer_scores(
    iq, w, keys, scores, visible, request, table, T, width, beyond, sq, sqg, sw, skey, stable, sscores, size, scale,
    G, D, BT: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BS)
    first_row, start = tl.program_id(0) // blocks * BT, tl.program_id(0) % blocks * BS
    t, s, d = first_row + tl.arange(0, BT), start + tl.arange(0, BS), tl.arange(0, BD)
    seen = tl.load(visible + t, mask=t < T, other=0)
    owner = tl.load(request + t, mask=t < T, other=-1).to(tl.int64)
    head = tl.arange(0, BT * BG)
    row, g = first_row + head // BG, head % BG
    here = ((row < T) & (g < G))[:, None] & (d[None, :] < D)
    q = tl.load(iq + row.to(tl.int64)[:, None] * sq + g[:, None] * sqg + d[None, :], mask=here, other=0.0)
    g = tl.arange(0, BG)
    weight = tl.load(
        w + t.to(tl.int64)[:, None] * sw + g[None, :], mask=(t < T)[:, None] & (g < G)[None, :], other=0.0
    ).to(tl.float32)
    found = tl.full((BT, BS), float("-inf"), tl.float32)
    last = tl.max(owner, 0)
    for r in range(tl.min(tl.where(t < T, owner, last), 0), last + 1):
        mine = (owner == r) & (seen > beyond)
        most = tl.max(tl.where(mine, seen, 0), 0)
        if start < most:
            page = tl.load(table + r * stable + s // size, mask=s < most, other=0)
            slot = page.to(tl.int64) * size + s % size
            key = tl.load(keys + slot[None, :] * skey + d[:, None], mask=(s < most)[None, :] & (d < D)[:, None], other=0.0)
            products = tl.dot(q, key, input_precision="ieee")
            products = tl.reshape(tl.where(products < 0, 0.0, products), (BT, BG, BS))
            found = tl.where(mine[:, None], scale * tl.sum(products * weight[:, :, None], 1), found)
    found = tl.where(s[None, :] < seen[:, None], found, float("-inf"))
    inside = (t < T)[:, None] & (s < width)[None, :]
    tl.store(scores + t.to(tl.int64)[:, None] * sscores + s[None, :], found, mask=inside)


def indexer_scores(
    iq: Tensor, w: Tensor, keys: Tensor, plan: Any, rows: slice, size: int, scores: Tensor, scale: float, beyond: int = 0
) -> None:
    """Scores of these `rows` of a planned batch; of those that see at most `beyond` keys nothing is computed."""
    iq, w, keys = dense_rows(iq), dense_rows(w), dense_rows(keys)
    (T, G, D), width, requests = iq.shape, scores.shape[1], len(plan.block_table)
    heads, wide = triton.next_power_of_2(G), iq.element_size() == 4
    together = 1 if 2 * requests > T else max(1, (64 if wide else 128) // heads)
    together = max(together, 16 // heads)
    block = 32 if wide else 128
    launch(
        _indexer_scores, triton.cdiv(T, together) * triton.cdiv(width, block), iq, w, keys, scores, plan.visible[rows],
        plan.row_request[rows], plan.block_table, T, width, beyond, iq.stride(0), iq.stride(1), w.stride(0), keys.stride(0),
        plan.block_table.stride(0), scores.stride(0), size, scale, G, D, BT=together, BG=heads, BD=block_of(D, 1 << 16),
        BS=block, num_warps=8 if together * heads >= 128 else 4, num_stages=1,
    )  # fmt: skip
