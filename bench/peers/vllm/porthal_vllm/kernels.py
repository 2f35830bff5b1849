"""vLLM's own kernels for CPUs, called as vllm/_custom_ops.py calls them. Which of its builds runs is the class's matter."""

from importlib.util import find_spec
from pathlib import Path

import torch
from porthal_peer import like, local

from porthal.hal import limits, multiple_of, one_of, same_as

C = torch.ops._C
NORM = {"weight": same_as("x")}


def load(build):
    """One of the wheel's libraries; the Python package around it, which needs a hundred others, stays out."""
    torch.ops.load_library(str(Path(find_spec("vllm").submodule_search_locations[0]) / f"{build}.abi3.so"))


class Vllm:
    @limits(provider="_C.rms_norm", dtypes=NORM, H=multiple_of(8))
    def rms_norm(self, x, weight, *, eps=1e-5):
        y = like(x)
        C.rms_norm(y, x, weight.contiguous(), eps)
        return y

    @limits(provider="_C.fused_add_rms_norm", dtypes=NORM, H=multiple_of(8))
    def add_rms_norm(self, x, residual, weight, *, eps=1e-5):
        y, r = x.clone(memory_format=torch.contiguous_format), residual.clone(memory_format=torch.contiguous_format)
        C.fused_add_rms_norm(y, r, weight.contiguous(), eps)
        return y, r

    @limits(provider="_C.silu_and_mul", I=multiple_of(8))
    def silu_mul(self, x):
        y = like(x, x.shape[0], x.shape[1] // 2)
        C.silu_and_mul(y, x)
        return y

    @limits(provider="_C.rotary_embedding", dtypes={"x": one_of("float32")}, start=one_of(0))  # its table has the dtype of x
    def rope(self, x, batch, *, theta, layout, start, width):
        y = x.clone(memory_format=torch.contiguous_format)
        half = torch.arange(0, width, 2, dtype=torch.float32)
        angle = batch.native.positions.float()[:, None] * theta ** (-half / width)
        table = torch.cat([angle.cos(), angle.sin()], dim=-1)  # of each row its own
        rows = torch.arange(x.shape[0])
        C.rotary_embedding(rows, y.flatten(1), None, x.shape[2], table, layout == "half")
        return y

    @limits(provider="_C.greedy_argmax", dtypes={"logits": one_of("float32")})
    def argmax(self, logits):
        return C.greedy_argmax(logits).flatten().int()


BLOCKS = {"H": multiple_of(32), "I": multiple_of(32)}


def vec_experts(x, w13, w2, ids, weights, first_expert):
    y = like(x)
    ids, weights = local(ids, weights, first_expert, w13.spec.shape[0])
    if len(x):
        C.cpu_fused_moe(y, x.contiguous(), w13.native[0], w2.native[0], None, None, weights, ids, False, "silu", "vec")
    return y


class VecPacking:
    def pack(self, spec, plain):
        if spec.op != "moe_experts" or spec.shape[1] % 32 or spec.shape[2] % 32:
            return super().pack(spec, plain)
        packed = torch.empty_like(plain)
        C.prepack_moe_weight(plain, packed, "vec")
        return packed


class Vec(VecPacking):
    """Experts in plain vector code."""

    @limits(provider="_C.cpu_fused_moe (vec)", **BLOCKS)
    def moe_experts(self, x, w13, w2, ids, weights, *, first_expert=0):
        return vec_experts(x, w13, w2, ids, weights, first_expert)
