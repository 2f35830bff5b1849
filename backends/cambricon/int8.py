"""Cambricon's calls on codes of int8: products, and the cache of the indexer's keys and of latents."""

from __future__ import annotations

import torch
from torch import Tensor

from porthal.backends.cambricon.calls import EXPERTS, HALF, TMO, by_block, chosen, codes_of, experts, product
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.interfaces.slots import int32_slots
from porthal.hal import Batch, Pages, Selection, Weight, any_of, at_least, at_most, limits, multiple_of, one_of


class Int8(Packed):
    @limits(
        provider="torch_mlu_ops.scaled_quantize+scaled_matmul",
        schemes="int8_channel",
        dtypes={"x": HALF},
        T=at_least(1),
        out="x",
    )
    def linear(self, x: Tensor, w: Weight, *, out: str = "x") -> Tensor:
        codes, scale = codes_of(x)
        per_row = w.native["scale"][:, 0].contiguous()
        return TMO.scaled_matmul(codes, w.native["codes"], scale, per_row, x.dtype, a_quant_bit_size=8)

    @limits(provider="torch_mlu_ops.scaled_quantize+smooth_quant_group_gemm", schemes="int8_channel", dtypes={"x": HALF})
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        return product(x, w, counts)

    @limits(
        provider=EXPERTS.format("scaled_quantize+smooth_quant_group_gemm"),
        schemes="int8_channel",
        dtypes={"x": HALF},
        T=at_least(1),
    )
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        return experts(x, w13, w2, ids - first_expert, weights)

    @limits(
        provider="torch_mlu_ops.quant_to_paged_cache+reshape_paged_cache",
        schemes=one_of("int8_keys", "int8_latents"),
        T=at_least(1),
    )
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """What the call with codes makes of a slot below 0 nobody says: the first row that is written stands in for such."""
        plan, [(name, _), *other] = batch.native, pages.spec.fields
        if not (batch.slots >= 0).any():
            return pages
        rows, slots = first.index_select(0, plan.written), plan.targets.to(torch.int32)
        codes, scale = by_block(pages, pages[name]), by_block(pages, pages[f"{name}_scale"])[..., 0]
        TMO.quant_to_paged_cache(rows[:, None], None, codes, None, scale, None, slots)
        if second is not None:
            held = by_block(pages, pages[other[0][0]])
            TMO.reshape_paged_cache(second[:, None].contiguous(), None, held, None, plan.table(int32_slots)[0])
        return pages

    kv_write.capturable = False

    @limits(
        provider="torch_mlu_ops.scaled_quantize+masked_indexer_select_paged_kv",
        tie="any",
        schemes="int8_keys",
        dtypes={"w": one_of("bfloat16", "float32")},
        T=at_least(1),
        G=at_most(64),
        D=128,
        block_size=any_of(one_of(1), multiple_of(16)),
    )
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        return chosen(iq, w, batch, k, scale, by_block(keys, keys["k"]), by_block(keys, keys["k_scale"]))
