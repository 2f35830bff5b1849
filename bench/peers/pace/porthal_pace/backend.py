"""PACE's kernels, all in bfloat16, called as pace/ops/backends calls them."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from porthal_peer import Packed, like, local

from porthal.hal import limits, multiple_of, one_of, same_as

# With AMX, which it would take where it finds it, its experts end the process with an illegal instruction.
os.environ.setdefault("LIBXSMM_TARGET", "cpx")
torch.ops.load_library(str(Path(find_spec("pace").submodule_search_locations[0]) / "lib/libpace_cpp.so"))
P = torch.ops.pace
BF16 = {"x": one_of("bfloat16")}
NORM = {**BF16, "weight": same_as("x")}
BLOCK = 32  # rows of a weight that its products take together; columns are packed by 64


class Pace(Packed):
    @limits(provider="pace.rmsnorm", dtypes=NORM)
    def rms_norm(self, x, weight, *, eps=1e-5):
        return P.rmsnorm(x, weight, eps)

    @limits(provider="pace.fused_add_rmsnorm", dtypes=NORM)
    def add_rms_norm(self, x, residual, weight, *, eps=1e-5):
        return tuple(P.fused_add_rmsnorm(x, residual, weight, eps))

    @limits(provider="pace.layernorm", dtypes={**NORM, "bias": same_as("x")})
    def layer_norm(self, x, weight, bias, *, eps=1e-6):
        return P.layernorm(x, weight, bias, eps)

    @limits(provider="pace.libxsmmlinear_plain", dtypes=BF16, N=multiple_of(BLOCK), K=multiple_of(64), out=one_of("x"))
    def linear(self, x, w, *, out="x"):
        if not len(x):
            return like(x, 0, w.spec.shape[0])
        return P.libxsmmlinear_plain(x[None], w.native[0], None)[0]

    @limits(provider="pace.libxsmm_moe_engine", dtypes=BF16, H=multiple_of(64), I=multiple_of(64))
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        E = w13.spec.shape[0]
        ids, weights = local(ids, weights, first_expert, E)
        y = torch.zeros_like(x, memory_format=torch.contiguous_format)  # the engine adds to it
        if len(x):
            gate, up = w13.native[0]
            P.libxsmm_moe_engine(
                y, x.contiguous(), ids.long(), weights, gate, up, w2.native[0], None, None, None, "silu", E
            )
        return y

    def pack(self, spec, plain):
        inner = spec.shape[1] // 2 if spec.operand == "w13" else spec.shape[-2]
        if spec.op not in ("linear", "moe_experts") or plain.dtype != torch.bfloat16 or inner % BLOCK or spec.shape[-1] % 64:
            return None
        return tuple(map(_blocked, plain.chunk(2, 1))) if spec.operand == "w13" else _blocked(plain)


def _blocked(w):
    """[..., N, K] as [..., N/32, K/64, 32 pairs, 32, 2]."""
    *E, N, K = w.shape
    return w.reshape(*E, N // BLOCK, BLOCK, K // 64, 32, 2).movedim(-4, -2).contiguous()
