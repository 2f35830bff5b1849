"""What the torch backend's attention takes at GLM-5's size: 64 heads, C=512, R=64, k=2048, 32 index heads of 128."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

import porthal
from porthal.backends.torch.backend import CHUNK_BYTES
from porthal.hal import Batch, Pages, PagesSpec, Selection

T = 256


class Measured(NamedTuple):
    """A call's processor time per row in ms, the most bytes that it held, and those of its results."""

    name: str
    ms: float
    peak: int
    results: int

    @property
    def within(self) -> bool:
        """At most CHUNK_BYTES besides the results, or the results twice, while their chunks are joined."""
        return self.peak <= self.results + max(self.results, CHUNK_BYTES)

    def __str__(self) -> str:
        sizes = f"peak {self.peak / 2**20:.1f} MiB, results {self.results / 2**20:.1f}"
        return f"{self.name}: {self.ms:.1f} ms per row, {sizes}"


def peak_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """The most that the allocator held during the call beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert len(held) > 10, "the profiler saw no allocations"
    return int(held.max()), out


def measured(name: str, call: Callable[[], Any]) -> tuple[Measured, Any]:
    start = time.process_time()
    peak, out = peak_bytes(call)
    spent = 1e3 * (time.process_time() - start) / T
    return Measured(name, spent, peak, sum(x.nbytes for x in (out.leaves() if isinstance(out, Selection) else (out,)))), out


def attention_over(S: int) -> Iterator[Measured]:
    """The indexer's selection and the attention over it, both over a context of S tokens."""
    ops, n = porthal.bind("torch", overrides={}, fallback="error"), S // 64
    batch = ops.plan(Batch.build([T], [S], [np.random.default_rng(0).permutation(n).tolist()], 64))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    kv = Pages(PagesSpec((("c", 512), ("kp", 64)), "float32", n, 64), {"c": random(S, 512), "kp": random(S, 64)})
    keys = Pages(PagesSpec((("k", 128),), "float32", n, 64), {"k": random(S, 128)})
    iq, w, q, qr = random(T, 32, 128), random(T, 32), random(T, 64, 512), random(T, 64, 64)
    indexed, sel = measured(f"indexer_topk S={S}", lambda: ops.indexer_topk(iq, w, keys, batch, k=2048, scale=1 / 64))
    yield indexed
    yield measured(f"sparse_mla S={S}", lambda: ops.sparse_mla(q, qr, kv, sel, batch, scale=1 / 16))[0]
