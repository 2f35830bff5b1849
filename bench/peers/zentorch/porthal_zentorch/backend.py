"""zentorch's operators with the arguments that people have: no copy that its schemas do not ask for."""

import torch
import zentorch  # noqa: F401, registers them
from porthal_peer import gathered, like, local

from porthal.backends.torch.backend import Torch
from porthal.hal import limits, one_of, same_as

Z = torch.ops.zentorch
NORM = {"weight": same_as("x")}


class Zentorch(Torch):
    @limits(provider="zentorch_rms_norm", dtypes=NORM)
    def rms_norm(self, x, weight, *, eps=1e-5):
        return Z.zentorch_rms_norm(x, weight, eps)

    @limits(provider="zentorch_add_rms_norm_", dtypes=NORM)
    def add_rms_norm(self, x, residual, weight, *, eps=1e-5):
        y, r = (a.clone(memory_format=torch.contiguous_format) for a in (x, residual))
        Z.zentorch_add_rms_norm_(y, weight, r, eps)
        return y, r

    @limits(provider="zentorch_linear_unary", out=one_of("x"))
    def linear(self, x, w, *, out="x"):
        return Z.zentorch_linear_unary(x, w.native, None) if len(x) else like(x, 0, w.spec.shape[0])

    @limits(provider="zentorch_bmm")
    def head_linear(self, x, w):
        if not len(x):
            return like(x, 0, *w.spec.shape[:2])
        return Z.zentorch_bmm(x.transpose(0, 1), w.native.transpose(1, 2)).transpose(0, 1)

    @limits(provider="zentorch_embedding")
    def embedding(self, ids, table):
        return Z.zentorch_embedding(table.native, ids.long()) if len(ids) else like(table.native, 0, table.spec.shape[1])

    @limits(provider="zentorch_fused_moe")
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        ids, weights = local(ids, weights, first_expert, w13.spec.shape[0])
        y = like(x)
        if len(x):
            Z.zentorch_fused_moe(y, x.contiguous(), w13.native, w2.native, None, None, weights, ids, False, "silu")
        return y

    @limits(provider="zentorch_sdpa")
    def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale):
        """Each row gathers its keys and is a sequence of one; the values are padded to the width of the keys."""
        o = torch.zeros_like(q_latent)
        rows, keys, inside = gathered(self, kv, sel, batch)
        if not len(rows):
            return o
        joint = torch.cat(keys, -1)[:, None].repeat(1, q_latent.shape[1], 1, 1)
        q = torch.cat([q_latent, q_rope], -1)[rows][:, :, None].contiguous()
        mask = torch.where(inside, 0.0, -torch.inf).to(q.dtype)[:, None, None].repeat(1, q.shape[1], 1, 1)
        found, _ = Z.zentorch_sdpa(q, joint, joint, 0.0, False, attn_mask=mask, scale=scale)
        o[rows] = found[:, :, 0, : q_latent.shape[2]]
        return o
