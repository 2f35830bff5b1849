"""Norms, rotary embedding, SwiGLU and the cache write: what treats each row by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from porthal.backends.ascend.calls import FLOATS, NPU
from porthal.backends.ascend.plan import memory, turn
from porthal.backends.torch.tables import spliced
from porthal.hal import Batch, Pages, any_of, at_least, at_most, limits, one_of, same_as

MODES = {"interleaved": "interleave", "half": "half"}
SOME = at_least(1)  # rows: the pages of these ops do not take empty tensors


class Rows:
    @limits(provider="torch_npu.npu_rms_norm", dtypes={"x": FLOATS, "weight": any_of(same_as("x"), one_of("float32"))})
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        y: Tensor = NPU.npu_rms_norm(input=x, gamma=weight, epsilon=eps)[0]
        return y

    @limits(provider="torch_npu.npu_add_rms_norm", dtypes={"x": FLOATS, "weight": same_as("x")}, T=SOME)
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        y, _, r = NPU.npu_add_rms_norm(x1=x, x2=residual, gamma=weight, epsilon=eps)
        return y, r

    @limits(provider="torch_npu.npu_swiglu", dtypes={"x": FLOATS}, T=SOME)
    def silu_mul(self, x: Tensor) -> Tensor:
        y: Tensor = NPU.npu_swiglu(input=x.contiguous(), dim=-1)
        return y

    @limits(provider="torch_npu.npu_rotary_mul", dtypes={"x": FLOATS}, T=SOME, N=at_most(999), width=at_most(894))
    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        """In float32, as tables in bfloat16 are no better than its 8 bits."""
        cos, sin = batch.native.table(turn, theta, width, layout, torch.float32)
        part = x[..., start : start + width].float().contiguous()
        return spliced(x, NPU.npu_rotary_mul(input=part, r1=cos, r2=sin, rotary_mode=MODES[layout]), start)

    @limits(provider="torch_npu.npu_scatter_nd_update_", dtypes={"pages": FLOATS}, T=SOME)
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        """The op takes no index -1: rows that are not written go to the page in front, so shapes do not follow padding."""
        for (name, _), rows in zip(pages.spec.fields, (first, second)):
            NPU.npu_scatter_nd_update_(input=memory(pages, name), indices=batch.native.rows, updates=rows)
        return pages
