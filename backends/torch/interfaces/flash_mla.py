"""FlashMLA's sparse attention, as CUDA's package has it and Moore Threads' MATE under the same name.

Its checks are those of FlashMLA 9241ae3 and MATE 0.2.2: 576 columns of bfloat16, 64 or 128 heads, whole blocks of 128 slots.
A packed row has 656 bytes: 512 codes of e4m3, a float32 scale for each 128 of them, 64 numbers of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.interfaces.packed import Packed
from porthal.backends.torch.interfaces.slots import Joint, joint, slots_of
from porthal.hal import Batch, Pages, PagesSpec, Selection, at_least, at_most, limits, same_as
from porthal.hal.layouts import FLASHMLA, Layout

FLASH_MLA = Library(
    "flash_mla",
    flash_mla_sparse_fwd="q kv indices sm_scale d_v topk_length",
    get_mla_metadata="",
    flash_mla_with_kvcache="q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata softmax_scale "
    "is_fp8_kvcache indices topk_length",
)
ROWS = 4096  # of a call
BLOCK = 128  # slots of a row are read in blocks of this size
BFLOAT16: dict[str, Any] = {"q_latent": "bfloat16", "q_rope": same_as("q_latent"), "kv": same_as("q_latent")}


class FlashMla(Joint):
    @limits(provider="flash_mla.flash_mla_sparse_fwd", dtypes=BFLOAT16, N=at_most(128), C=512, R=64)
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        """The cache is one tensor of rows for it."""

        def attend(q: Tensor, slots: Tensor, length: Tensor) -> Tensor:
            return FLASH_MLA.flash_mla_sparse_fwd(
                q=q, kv=joint(kv)[:, None], indices=slots[:, None], sm_scale=scale, d_v=512, topk_length=length
            )[0]

        return _in_parts(attend, q_latent, q_rope, *_padded(sel, batch))


class FlashMlaPacked(Packed):
    def _layout(self, spec: PagesSpec) -> Layout | None:
        taken = spec.scheme == "fp8_latents" and spec.dtype == "bfloat16"
        return FLASHMLA if taken and [width for _, width in spec.fields] == [512, 64] else super()._layout(spec)

    @limits(
        provider="flash_mla.flash_mla_with_kvcache+get_mla_metadata",
        schemes="fp8_latents",
        dtypes=BFLOAT16,
        T=at_least(1),
        N=at_most(128),
        C=512,
        R=64,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        """The form for decoding, in which each row is a request of one: it alone reads packed rows. Its schedule follows the
        lengths, so each call has one of its own."""

        def attend(q: Tensor, slots: Tensor, length: Tensor) -> Tensor:
            return FLASH_MLA.flash_mla_with_kvcache(
                q=q[:, None],
                k_cache=kv["packed"].view(kv.spec.n_blocks, kv.spec.block_size, 1, -1),
                block_table=None,
                cache_seqlens=None,
                head_dim_v=512,
                tile_scheduler_metadata=FLASH_MLA.get_mla_metadata()[0],
                softmax_scale=scale,
                is_fp8_kvcache=True,
                indices=slots[:, None],
                topk_length=length,
            )[0][:, 0]

        return _in_parts(attend, q_latent, q_rope, *_padded(sel, batch))


def _padded(sel: Selection, batch: Batch) -> tuple[Tensor, Tensor]:
    slots, length = slots_of(sel, batch)
    return F.pad(slots, (0, -slots.shape[1] % BLOCK), value=-1), length


def _queries(q_latent: Tensor, q_rope: Tensor) -> Tensor:
    """Heads are filled up with zeros, as rubbish there spoils the others."""
    T, heads, width = q_latent.shape
    q = q_latent.new_zeros(T, 64 if heads <= 64 else 128, 576)
    q[:, :heads, :width], q[:, :heads, width:] = q_latent, q_rope
    return q


def _in_parts(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q_latent: Tensor, q_rope: Tensor, slots: Tensor, length: Tensor
) -> Tensor:
    """Some rows at a time, as those of few heads take up to 64 times their memory. A row without keys is not defined."""
    heads, made = q_latent.shape[1], []
    for latent, turned, at, count in zip(*(x.split(ROWS) for x in (q_latent, q_rope, slots, length))):
        o = attend(_queries(latent, turned), at, count)[:, :heads]
        made.append(torch.where(count[:, None, None] > 0, o, 0))
    return made[0] if len(made) == 1 else torch.cat(made)
