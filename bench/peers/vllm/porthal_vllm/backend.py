"""vLLM's and SGLang's kernels in the build that vLLM loads on a processor with AVX-512 and bfloat16."""

import torch
from porthal_peer import Packed, like, local

from porthal.hal import Pages, limits, multiple_of, one_of
from porthal_vllm.kernels import BLOCKS, C, VecPacking, Vllm, load, vec_experts

load("_C")
HALVES = one_of("bfloat16", "float16")
SPLITS = 8  # of a row's keys, as vLLM calls it


class Sgl:
    """SGLang's kernels, which compute on 16-bit numbers alone."""

    @limits(provider="_C.weight_packed_linear", dtypes={"x": HALVES}, K=multiple_of(32), N=multiple_of(16), out=one_of("x"))
    def linear(self, x, w, *, out="x"):
        y = x.new_empty((x.shape[0], w.spec.shape[0]))
        if len(x):
            C.weight_packed_linear(y, _rows(x), w.native[0], None, True)
        return y

    @limits(provider="_C.bmm_cpu", dtypes={"x": HALVES}, K=multiple_of(32), M=multiple_of(32))
    def head_linear(self, x, w):
        y = x.new_empty((x.shape[1], x.shape[0], w.spec.shape[1]))
        if len(x):
            C.bmm_cpu(y, _rows(x).transpose(0, 1), w.native[0], True, None)
        return y.transpose(0, 1)

    @limits(provider="_C.biased_topk_cpu", tie="any", n_group=one_of(1), E=one_of(64, 128, 256, 384))
    def moe_route(self, logits, bias, *, k, scale, n_group=1, topk_group=1):
        logits = logits.contiguous()
        weights, ids = C.biased_topk_cpu(logits, logits, bias.contiguous(), k, True, "sigmoid", 0, scale, True)
        return ids, weights

    @limits(provider="_C.fused_experts_cpu", dtypes={"x": HALVES}, H=multiple_of(32), I=multiple_of(32))
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        ids, weights = local(ids, weights, first_expert, w13.spec.shape[0])
        y, none = like(x), [None] * 8
        if len(x):
            C.fused_experts_cpu(y, x.contiguous(), w13.native[0], w2.native[0], weights, ids, 0, *none, None, None, True)
        return y

    @limits(provider="_C.decode_attention_cpu", dtypes={"q_latent": HALVES}, C=multiple_of(32), R=multiple_of(32))
    def sparse_mla(self, q_latent, q_rope, kv, sel, batch, *, scale):
        """Every row is a request whose keys are those that it has selected."""
        at, length = self.rows(sel)
        o, keys = torch.zeros_like(q_latent, memory_format=torch.contiguous_format), _keys(kv)[:, None]
        rows = torch.nonzero(length > 0).flatten()
        if not len(rows):
            return o
        at, size = at[rows].clamp(min=0).long(), kv.spec.block_size
        slots = batch.native.block_table[batch.native.row_request[rows].long()].gather(1, at // size) * size + at % size
        q, N, C_ = torch.cat([q_latent, q_rope], -1)[rows], q_latent.shape[1], q_latent.shape[2]
        part, scratch = q.new_empty((len(rows), N, C_)), torch.empty((len(rows), N, SPLITS, C_ + 1))
        values, ends = keys[..., :C_], length[rows].long()
        C.decode_attention_cpu(
            q, keys, values, part, None, None, None, scratch, slots.int(), torch.arange(len(rows)), ends, scale, 0.0, False, -1,
            None, None,
        )  # fmt: skip
        o[rows] = part
        return o

    def alloc_pages(self, spec):
        if len(spec.fields) != 2:
            return super().alloc_pages(spec)
        (c, width), (kp, further) = spec.fields
        keys = self._zeros((spec.slots, width + further), spec.dtype)
        return Pages(spec, {c: keys[:, :width], kp: keys[:, width:]})

    def pack(self, spec, plain):
        taken = spec.op in ("linear", "head_linear", "moe_experts") and plain.dtype != torch.float32
        fits = spec.shape[-1] % 32 == 0 and spec.shape[-2] % (16 if spec.op == "linear" else 32) == 0
        return C.convert_weight_packed(plain) if taken and fits else super().pack(spec, plain)


class Wide(VecPacking):
    """The experts in float32 alone: those of 16 bits are packed for the kernel above."""

    @limits(provider="_C.cpu_fused_moe (vec)", dtypes={"x": one_of("float32")}, **BLOCKS)
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        return vec_experts(x, w13, w2, ids, weights, first_expert)


def _rows(x):
    """With elements side by side, without which its kernels raise."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _keys(kv):
    """Latent and rotary part of each key beside each other, as `alloc_pages` has laid them out."""
    c, kp = (kv[name] for name, _ in kv.spec.fields)
    if kp.data_ptr() == c.data_ptr() + c.shape[1] * c.element_size() and c.stride() == kp.stride():
        return c.as_strided((c.shape[0], c.shape[1] + kp.shape[1]), c.stride())
    return torch.cat([c, kp], dim=1)


class VllmCpu(Sgl, Vllm, Wide, Packed):
    pass
