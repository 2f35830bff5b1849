"""What PyTorch has a single operator for; the rest is inherited."""

import torch
import torch.nn.functional as F
from porthal_peer import gathered, local

from porthal.backends.torch.backend import Torch
from porthal.hal import Rows, Selection, SelectionSpec, limits, multiple_of_bytes, one_of, same_as

NORM = {"weight": same_as("x")}


class Eager(Torch):
    @limits(provider="F.rms_norm", dtypes=NORM)
    def rms_norm(self, x, weight, *, eps=1e-5):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    @limits(provider="F.layer_norm", dtypes={**NORM, "bias": same_as("x")})
    def layer_norm(self, x, weight, bias, *, eps=1e-6):
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)

    @limits(provider="F.silu")
    def silu_mul(self, x):
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @limits(provider="F.linear")
    def linear(self, x, w, *, out="x"):
        return super().linear(x, w, out=out)

    @limits(provider="F.grouped_mm", K=multiple_of_bytes(16, of="x"), N=multiple_of_bytes(16, of="x"))
    def grouped_gemm(self, x, w, counts):
        if not len(x):
            return x.new_empty((0, w.spec.shape[1]))
        return F.grouped_mm(x.contiguous(), w.native.transpose(1, 2), offs=counts.cumsum(0).int())

    @limits(provider="F.grouped_mm", H=multiple_of_bytes(16, of="x"), I=multiple_of_bytes(16, of="x"))
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        E, k = w13.spec.shape[0], ids.shape[1]
        if not len(x):
            return torch.empty_like(x)
        ids, weights = local(ids, weights, first_expert, E)
        flat, order = ids.flatten().sort(stable=True)
        offs = torch.bincount(flat, minlength=E).cumsum(0).int()
        gate, up = F.grouped_mm(x[order // k], w13.native.transpose(1, 2), offs=offs).chunk(2, dim=-1)
        made = F.grouped_mm(F.silu(gate) * up, w2.native.transpose(1, 2), offs=offs)
        parts = torch.empty_like(made).index_copy_(0, order, made).view(len(x), k, -1)
        return (parts.float() * weights[..., None]).sum(1).to(x.dtype)

    @limits(provider="torch.topk", tie="any")
    def topk(self, scores, batch, *, k):
        visible = batch.native.visible[:, None]
        hidden = torch.arange(scores.shape[1]) >= visible
        shown = scores.clamp(min=torch.finfo(scores.dtype).min)  # so that -inf means hidden
        found = shown.masked_fill_(hidden, -torch.inf).topk(min(k, scores.shape[1]), dim=-1).indices.int()
        length = visible.clamp(max=k)
        indices = F.pad(found, (0, k - found.shape[1]), value=-1)
        return Selection(SelectionSpec(batch.T, k), Rows(indices.masked_fill_(torch.arange(k) >= length, -1), length[:, 0]))

    @limits(provider="torch.argmax")
    def argmax(self, logits):
        return logits.argmax(-1).int()

    @limits(provider="torch.topk (of sigmoid)", tie="any", n_group=one_of(1))
    def moe_route(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
        s = torch.sigmoid(logits)
        ids = (s + bias).topk(k, dim=-1).indices
        chosen = s.gather(1, ids)
        return ids.int(), scale * chosen / (chosen.sum(-1, keepdim=True) + 1e-20)

    @limits(provider="F.scaled_dot_product_attention")
    def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale):
        """Each row gathers its keys and is a sequence of one, whose heads share them."""
        o = torch.zeros_like(q_latent)
        rows, keys, inside = gathered(self, kv, sel, batch)
        if not len(rows):
            return o
        q = torch.cat([q_latent, q_rope], -1)[rows][:, None]
        joint, values = torch.cat(keys, -1)[:, None], keys[0][:, None]
        o[rows] = F.scaled_dot_product_attention(q, joint, values, inside[:, None, None], scale=scale)[:, 0]
        return o
