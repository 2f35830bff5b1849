"""Caches of int8 codes: keys of the indexer with a float16 scale each, and packed rows of latents, 128 of which share one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.ascend.attention import HEADS, PAGE, only_of_rows_with_keys, selected
from porthal.backends.ascend.calls import HALVES, NPU
from porthal.backends.ascend.int8 import coded, quantised
from porthal.backends.ascend.plan import memory, paged
from porthal.backends.ascend.rows import SOME
from porthal.backends.torch import schemes
from porthal.hal import Batch, Pages, PagesSpec, Selection, any_of, at_most, limits, one_of, same_as

PACKED = "packed"  # in a cache of such rows
WIDTHS = (512, 64)  # of latents and rotated keys in a packed row: 512 codes, 128 bytes, 4 scales of 4 bytes
ROW = 656


def packs(spec: PagesSpec) -> bool:
    """Whether a cache is of the rows that attention reads, see porthal.hal.layouts.ASCEND."""
    return spec.scheme == "int8_tile_latents" and spec.dtype != "float32" and tuple(w for _, w in spec.fields) == WIDTHS


def unpacked(spec: PagesSpec, rows: Tensor) -> dict[str, Tensor]:
    """The fields of int8 [slots, 656], all of them views."""
    (c, width), (kp, _) = spec.fields
    codes, rotated, scales = rows.split([width, 128, 16], dim=1)
    return {c: codes, kp: rotated.view(getattr(torch, spec.dtype)), f"{c}_scale": scales.view(torch.float32), PACKED: rows}


class Int8Caches:
    @limits(
        provider="torch_npu.npu_dynamic_quant+npu_scatter_nd_update_",
        schemes=one_of("int8_keys", "int8_half_keys", "int8_latents", "int8_tile_latents"),
        dtypes={"pages": HALVES},
        T=SOME,
    )
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """A packed row is written as bytes, at once. Codes by a float16 scale are not those by the op's float32 one."""
        assert pages.spec.quantised
        (name, scheme), width = pages.spec.quantised, first.shape[1]
        if scheme.scale == "float16":
            codes, scale = schemes.quantised(scheme, first).values()
        else:
            tile = scheme.block[1] or width
            codes, scale = coded(F.pad(first, (0, -width % tile)).unflatten(1, (-1, tile)))
        parts = {name: codes.flatten(1)[:, :width]}
        if second is not None:
            parts[pages.spec.fields[1][0]] = second
        parts[f"{name}_scale"] = scale
        if PACKED in pages.native:
            parts = {PACKED: torch.cat([part.contiguous().view(torch.int8) for part in parts.values()], dim=1)}
        for name, rows in parts.items():
            NPU.npu_scatter_nd_update_(input=memory(pages, name), indices=batch.native.rows, updates=rows.contiguous())
        return pages

    @limits(
        provider="torch_npu.npu_dynamic_quant+npu_quant_lightning_indexer",
        tie="any",
        schemes="int8_half_keys",
        dtypes={"iq": HALVES, "w": any_of(same_as("iq"), one_of("float32")), "keys": same_as("iq")},
        G=at_most(64),
        D=128,
        block_size=PAGE,
        k=at_most(2048),
    )
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        """The op takes head weights and the queries' scales in float16. Their product is rounded to it once: the ReLU lets
        positive factors pass, so the queries' scales are 1, and a row's largest weight is 2^15, far from where float16 ends."""
        plan = batch.native
        codes, each = quantised(iq)
        exact = w.float() * each
        weights = (exact * (2.0**15 / exact.abs().amax(-1, keepdim=True).clamp(min=2.0**-100))).half()
        found = NPU.npu_quant_lightning_indexer(
            query=codes,
            key=paged(keys, 0),
            weights=weights,
            query_dequant_scale=torch.ones_like(weights),
            key_dequant_scale=keys["k_scale"].view(keys.spec.n_blocks, keys.spec.block_size, 1),
            query_quant_mode=0,
            key_quant_mode=0,
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
        provider="torch_npu.npu_kv_quant_sparse_flash_attention",
        schemes="int8_tile_latents",
        dtypes={"q_latent": HALVES, "q_rope": same_as("q_latent"), "kv": same_as("q_latent")},
        N=HEADS,
        C=WIDTHS[0],
        R=WIDTHS[1],
        block_size=PAGE,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        plan, rows = batch.native, sel.native
        keys = kv[PACKED].view(kv.spec.n_blocks, kv.spec.block_size, 1, ROW)
        o = NPU.npu_kv_quant_sparse_flash_attention(
            query=torch.cat([q_latent, q_rope], dim=-1),
            key=keys,
            value=keys,
            sparse_indices=rows.indices[:, None].contiguous(),
            scale_value=scale,
            key_quant_mode=2,
            value_quant_mode=2,
            block_table=plan.block_table,
            actual_seq_lengths_query=plan.cu_q[1:],
            actual_seq_lengths_kv=plan.kv_len,
            sparse_block_size=1,
            layout_query="TND",
            layout_kv="PA_BSND",
            sparse_mode=3,
            attention_mode=2,
            quant_scale_repo_mode=1,
            tile_size=128,
            rope_head_dim=WIDTHS[1],
        )
        return only_of_rows_with_keys(o, rows)
