"""Ascend's own kernels. Every limit stated here is from Huawei's op-plugin pages for torch_npu (2026-08), by op name."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch_npu

from porthal.backends.ascend import VISIBLE
from porthal.backends.ascend.attention import Attention
from porthal.backends.ascend.experts import Experts
from porthal.backends.ascend.int8 import Int8
from porthal.backends.ascend.int8_caches import ROW, Int8Caches, packs, unpacked
from porthal.backends.ascend.plan import NpuPlan
from porthal.backends.ascend.prolog import Prolog
from porthal.backends.ascend.rows import Rows
from porthal.backends.torch.backend import Plan
from porthal.backends.torch.vendor import Vendor
from porthal.hal import Batch, Pages, PagesSpec, Place, Unavailable

EAGER = "written", "targets"  # of a plan: read by the base's cache write alone, which is never captured


class Ascend(Rows, Prolog, Experts, Attention, Int8, Int8Caches, Vendor):
    """An NPU. Pages keep one contiguous tensor per field, which is the layout PA_BSND; lengths are int32 on the device."""

    kind, engine = "npu", "hccl"
    package, visible = "torch_npu", VISIBLE

    def describe(self) -> str:
        return f"{super().describe()}, torch_npu {torch_npu.__version__}"

    @property
    def place(self) -> Place:
        if hasattr(ctypes.CDLL(None), "porthal_stub_runtime"):
            return "vendor package on a stub runtime"
        return super().place

    # -- operands ----------------------------------------------------------------------------------------------------

    def alloc_pages(self, spec: PagesSpec) -> Pages:
        """With a page in front, see `memory`."""
        page = spec.block_size
        if packs(spec):
            return Pages(spec, unpacked(spec, self._zeros((page + spec.slots, ROW), "int8")[page:]))
        form = Pages.form(spec).items()
        return Pages(spec, {n: self._zeros((page + slots, width), dtype)[page:] for n, ((slots, width), dtype) in form})

    def plan(self, batch: Batch, into: Batch | None = None) -> Batch:
        planned = super().plan(batch)
        made = NpuPlan(*planned.native)
        made.rows = made.slots[:, None] + batch.block_size
        if into is not None:
            held: NpuPlan = into.native
            fields = zip(Plan._fields, held, made)
            rows = self.write(held.rows, made.rows)
            made = NpuPlan(*(new if name in EAGER else self.write(old, new) for name, old, new in fields))
            made.rows = rows
        made.take_over(into)
        return planned.with_native(made)

    # -- graph capture -----------------------------------------------------------------------------------------------

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        try:
            return super().capture(run)
        except RuntimeError as error:
            if "207008" in str(error):  # Insufficient_Stream_Resources
                raise Unavailable(f"{self} has no stream left for another graph (error 207008): capture fewer") from None
            raise
