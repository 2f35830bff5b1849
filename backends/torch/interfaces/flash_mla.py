"""FlashMLA's sparse attention, as CUDA's package has it and Moore Threads' MATE under the same name.

Its checks are those of FlashMLA 9241ae3 and MATE 0.2.2: 576 columns of bfloat16, 64 or 128 heads, whole blocks of 128 slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from porthal.backends.torch.interfaces.library import Library
from porthal.backends.torch.interfaces.slots import Joint, joint, slots_of
from porthal.hal import Batch, Pages, Selection, at_most, limits, same_as

FLASH_MLA = Library("flash_mla", flash_mla_sparse_fwd="q kv indices sm_scale d_v topk_length")
BLOCK = 128  # slots of a row are read in blocks of this size


class FlashMla(Joint):
    @limits(
        provider="flash_mla.flash_mla_sparse_fwd",
        dtypes={"q_latent": "bfloat16", "q_rope": same_as("q_latent"), "kv": same_as("q_latent")},
        N=at_most(128),
        C=512,
        R=64,
    )
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        """The cache is one tensor of rows for it. Heads are filled up with zeros, as rubbish there spoils the others."""
        slots, length = slots_of(sel, batch)
        T, heads, width = q_latent.shape
        q = q_latent.new_zeros(T, 64 if heads <= 64 else 128, 576)
        q[:, :heads, :width], q[:, :heads, width:] = q_latent, q_rope
        o = FLASH_MLA.flash_mla_sparse_fwd(
            q=q,
            kv=joint(kv)[:, None],
            indices=F.pad(slots, (0, -slots.shape[1] % BLOCK), value=-1)[:, None],
            sm_scale=scale,
            d_v=512,
            topk_length=length,
        )[0]
        return torch.where(length[:, None, None] > 0, o[:, :heads], 0)  # a row without keys is not defined
