"""Kernels of our own in Triton, and the device that they run on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from porthal.backends.cuda.kernels.argmax import argmax, parts_of
from porthal.backends.cuda.kernels.grouped_gemm import grouped_gemm
from porthal.backends.cuda.kernels.indexer_scores import indexer_scores
from porthal.backends.cuda.kernels.kv_write import kv_write
from porthal.backends.cuda.kernels.moe_permute import copy_sorted, sort_by_expert
from porthal.backends.cuda.kernels.moe_route import moe_route
from porthal.backends.cuda.kernels.moe_unpermute import combine, invert
from porthal.backends.cuda.kernels.rms_norm import rms_norm
from porthal.backends.cuda.kernels.rope import rope
from porthal.backends.cuda.kernels.sample import sample
from porthal.backends.cuda.kernels.silu_mul import silu_mul
from porthal.backends.cuda.kernels.sparse_mla import sparse_mla
from porthal.backends.cuda.kernels.topk import topk
from porthal.backends.torch.collectives import number_of_rank
from porthal.backends.torch.interfaces.packed import Packed
from porthal.hal import (
    Batch,
    CallSpec,
    Kernel,
    Pages,
    Place,
    Rows,
    Selection,
    SelectionSpec,
    Unavailable,
    Weight,
    dtype,
    limits,
)

F = TypeVar("F", bound=Callable[..., Any])
SCORES = 1 << 28  # bytes of indexer scores held at a time
INTERPRETED = 100  # rows: an interpreted program takes milliseconds
COPIES = {"kv_write", "moe_permute"}  # move bits, so that the interpreter may have them in bfloat16


def own(kernel: F) -> F:
    """A kernel in Triton, launched on its backend's device rather than on the current one."""

    @wraps(kernel)
    def call(self: Own, *args: Any, **attrs: Any) -> Any:
        with self.current():
            return kernel(self, *args, **attrs)

    return limits(provider="Triton")(call)  # type: ignore[return-value]


def closed_cache() -> Path | None:
    """The folder that Triton would write compiled kernels to, where it may not."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    return None if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else folder


class Own(Packed):
    """A GPU; with TRITON_INTERPRET=1, and so with --emulated, Triton's interpreter on CPU tensors.

    processors   how many programs run at a time, at least
    shared       bytes of shared memory that a program may have
    """

    name = "cuda"
    processors: int
    shared: int

    def __init__(self, device: str = "") -> None:
        self.emulated = os.environ.get("TRITON_INTERPRET") == "1"
        if self.emulated:
            if device:
                raise Unavailable(f"the emulated device of {self.name} has no number: expected {self.name!r}, not {device!r}")
            super().__init__("cpu")
            self.processors, self.shared = 4, 1 << 20
            return
        super().__init__(f"cuda:{device or number_of_rank(torch.cuda.device_count())}")
        found = torch.cuda.get_device_properties(self.device)
        if (found.major, found.minor) < (8, 0):
            raise Unavailable(
                f"{found.name} has compute capability {found.major}.{found.minor}: the kernels need 8.0 (A100) or later; "
                f"use backend 'torch:{self.device}'"
            )
        if closed := closed_cache():
            raise Unavailable(f"Triton cannot write its cache to {closed}: set TRITON_CACHE_DIR to a folder of your own")
        most = triton.runtime.driver.active.utils.get_device_properties(torch.device(self.device).index)
        self.processors, self.shared = most["multiprocessor_count"], most["max_shared_mem"]

    def __str__(self) -> str:
        return self.name if self.emulated else f"{self.name}:{torch.device(self.device).index}"

    @property
    def place(self) -> Place:
        return "emulated device" if self.emulated else "hardware"

    def describe(self) -> str:
        return f"Triton {triton.__version__}{'’s interpreter' if self.emulated else ''} on {super().describe()}"

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.emulated else torch.cuda.device(self.device)

    def refuses(self, op: str, kernel: Kernel, spec: CallSpec) -> str | None:
        if self.emulated and kernel.provider == "Triton":
            if "bfloat16" in spec.dtypes.values() and op not in COPIES:
                return "Triton's interpreter takes the bits of bfloat16 for integers: needs a GPU"
            rows = spec.dims.get("T", spec.dims.get("M"))
            if isinstance(rows, int) and rows > INTERPRETED:  # a model, bound for a range of rows, may take its time
                return f"{rows} rows, Triton's interpreter is given calls of at most {INTERPRETED}"
        return super().refuses(op, kernel, spec)

    # -- graphs ------------------------------------------------------------------------------------------------------

    @property
    def captures(self) -> bool:
        return not self.emulated

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        if self.emulated:
            return super().capture(run)
        graph = torch.cuda.CUDAGraph()
        with self.current(), torch.no_grad():
            run()  # compiles what is not compiled yet
            with torch.cuda.graph(graph):
                results = run()

        def replay() -> Any:
            with self.current():
                graph.replay()
            return results

        return replay

    # -- row by row --------------------------------------------------------------------------------------------------

    @own
    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
        y = self.empty(x.shape, dtype(x))
        rms_norm(x, None, weight, y, None, eps)
        return y

    @own
    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
        y, r = self.empty(x.shape, dtype(x)), self.empty(x.shape, dtype(x))
        rms_norm(x, residual, weight, y, r, eps)
        return y, r

    @own
    def rope(self, x: Tensor, batch: Batch, *, theta: float, layout: str, start: int, width: int) -> Tensor:
        y = self.empty(x.shape, dtype(x))
        rope(x, batch.native.positions, y, theta, layout, start, width)
        return y

    @own
    def silu_mul(self, x: Tensor) -> Tensor:
        y = self.empty((x.shape[0], x.shape[1] // 2), dtype(x))
        silu_mul(x, y)
        return y

    # -- experts -----------------------------------------------------------------------------------------------------

    @own
    def moe_route(
        self, logits: Tensor, bias: Tensor, *, k: int, scale: float, n_group: int = 1, topk_group: int = 1
    ) -> tuple[Tensor, Tensor]:
        ids, weights = self.empty((len(logits), k), "int32"), self.empty((len(logits), k), "float32")
        moe_route(logits, bias, ids, weights, scale, n_group, topk_group)
        return ids, weights

    @own
    def moe_permute(self, x: Tensor, ids: Tensor, *, E: int, first_expert: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        counts, source, _ = self._sorted(ids, E, first_expert)
        rows = self.empty((ids.numel(), x.shape[1]), dtype(x))
        copy_sorted(x, source, rows, ids.shape[1])
        return rows, counts, source

    def _sorted(self, ids: Tensor, E: int, first_expert: int) -> tuple[Tensor, Tensor, Tensor]:
        counts = self.empty((E,), "int32")
        source, target = (self.empty((ids.numel(),), "int32") for _ in range(2))
        sort_by_expert(ids, counts, source, target, first_expert, self.empty)
        return counts, source, target

    @own
    def moe_unpermute(self, sorted: Tensor, source: Tensor, weights: Tensor) -> Tensor:
        y, target = self.empty((len(weights), sorted.shape[1]), dtype(sorted)), self.empty(source.shape, "int32").fill_(-1)
        invert(source, target)
        combine(sorted, target, weights, y)
        return y

    @own
    def grouped_gemm(self, x: Tensor, w: Weight, counts: Tensor) -> Tensor:
        y = self.empty((x.shape[0], w.native.shape[1]), dtype(x))
        grouped_gemm(x, w.native, counts, y, self.processors, self.shared)
        return y

    @own
    def moe_experts(
        self, x: Tensor, w13: Weight, w2: Weight, ids: Tensor, weights: Tensor, *, first_expert: int = 0
    ) -> Tensor:
        """Rows are gathered by the first product, which also applies the gate, and added up after the second."""
        E, H, I = w2.native.shape
        counts, source, target = self._sorted(ids, E, first_expert)
        h, rows = self.empty((ids.numel(), I), dtype(x)), self.empty((ids.numel(), H), dtype(x))
        grouped_gemm(x, w13.native, counts, h, self.processors, self.shared, source, ids.shape[1])
        grouped_gemm(h, w2.native, counts, rows, self.processors, self.shared)
        y = self.empty(x.shape, dtype(x))
        combine(rows, target, weights, y)
        return y

    # -- paged cache and sparse attention ----------------------------------------------------------------------------

    @own
    def kv_write(self, pages: Pages, batch: Batch, first: Tensor, second: Tensor | None = None) -> Pages:
        given = [(rows, pages[name]) for (name, _), rows in zip(pages.spec.fields, (first, second)) if rows is not None]
        kv_write(batch.native.slots, given)
        return pages

    @own
    def indexer_scores(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, scale: float) -> Tensor:
        scores = self.empty((batch.T, batch.max_kv), "float32")
        [key] = keys.leaves()
        indexer_scores(iq, w, key, batch.native, slice(None), keys.spec.block_size, scores, scale)
        return scores

    @own
    def topk(self, scores: Tensor, batch: Batch, *, k: int) -> Selection:
        found = Rows(self.empty((batch.T, k), "int32"), self.empty((batch.T,), "int32"))
        topk(scores, batch.native.visible, *found)
        return Selection(SelectionSpec(batch.T, k), found)

    @own
    def indexer_topk(self, iq: Tensor, w: Tensor, keys: Pages, batch: Batch, *, k: int, scale: float) -> Selection:
        """Scores of some rows at a time, which stay in the cache until they are ranked; none of rows that take all they see."""
        found = Rows(self.empty((batch.T, k), "int32"), self.empty((batch.T,), "int32"))
        width, size = batch.block_table.shape[1] * batch.block_size, keys.spec.block_size
        step = max(1, SCORES // (4 * max(width, 1)))
        [key] = keys.leaves()
        scores = self.empty((min(step, batch.T), width), "float32")
        for start in range(0, batch.T, step):
            rows = slice(start, min(start + step, batch.T))
            part = scores[: rows.stop - start]
            if width > k:
                indexer_scores(iq[rows], w[rows], key, batch.native, rows, size, part, scale, beyond=k)
            topk(part, batch.native.visible[rows], *(x[rows] for x in found))
        return Selection(SelectionSpec(batch.T, k), found)

    @own
    def sparse_mla(
        self, q_latent: Tensor, q_rope: Tensor, kv: Pages, sel: Selection, batch: Batch, *, scale: float
    ) -> Tensor:
        o, plan = self.empty(q_latent.shape, dtype(q_latent)), batch.native
        sparse_mla(
            q_latent, q_rope, *kv.leaves(), *self.rows(sel), plan.row_request, plan.block_table, kv.spec.block_size, scale, o,
            self.processors, self.shared, self.empty,
        )  # fmt: skip
        return o

    # -- next token --------------------------------------------------------------------------------------------------

    @own
    def argmax(self, logits: Tensor) -> Tensor:
        T, V = logits.shape
        ids = self.empty((T,), "int32")
        argmax(logits, self.empty((T, parts_of(V)), "int64"), ids)
        return ids

    @own
    def sample(self, logits: Tensor, u: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
        ids = self.empty((len(logits),), "int32")
        sample(logits, u, temperature, top_k, top_p, ids)
        return ids
