"""Planted where calls are captured as a graph: each is right when it is called, and wrong in a replay."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

BEFORE = "    def _written(self, batch: Batch) -> np.ndarray[Any, Any]:\n"
SUM = "        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)\n"
LENGTHS = "Rows(*highest(scores, batch.native.visible, k))"
captured = partial(Defect, kind="graph capture", source="capture")


def method(op: str, name: str, text: str) -> Defect:
    """One more method of the class."""
    return captured(op, name, old=BEFORE, new=f"{text}\n{BEFORE}")


DEFECTS = [
    method("sparse_mla", "table-in-new-memory", """
    def plan(self, batch, into=None):
        planned = super().plan(batch)
        if into is not None:
            [self.write(*pair) for pair in zip(into.native[:-1], planned.native)]
        return planned
"""),
    method("rope", "plan-in-new-memory", """
    def plan(self, batch, into=None):
        return super().plan(batch)
"""),
    method("rope", "position-as-a-number", """
    def rope(self, x, batch, **attrs):
        fixed = batch.native._replace(positions=torch.from_numpy(batch.positions))
        return super().rope(x, batch.with_native(fixed), **attrs)
"""),
    method("linear", "weight-in-new-memory", """
    def prepare(self, spec, read, into=None):
        return super().prepare(spec, read)

    def linear(self, x, w, *, out="x"):  # which is prepared by the class that has it
        return super().linear(x, w, out=out)
"""),
    method("indexer_scores", "cache-in-new-memory", """
    def from_logical(self, spec, arrays, into=None):
        return super().from_logical(spec, arrays)
"""),
    method("add_rms_norm", "residual-added-in-place", """
    def add_rms_norm(self, x, residual, weight, *, eps=1e-5):
        r = torch.from_numpy(np.zeros(x.shape, np.float32))  # cleared where it is allocated, which is not captured
        r += x
        r += residual
        return super().add_rms_norm(r.to(x.dtype), torch.zeros_like(r), weight, eps=eps)[0].to(x.dtype), r.to(x.dtype)
"""),
    captured("indexer_topk", "longest-request-as-a-number", old=LENGTHS,
        new="Rows(*highest(scores, batch.native.visible + (batch.max_kv - batch.native.kv_len.amax()), k))"),
    captured("moe_experts", "sum-cleared-once", old=SUM + "        for j in range(ids.shape[1]):\n            y = y +",
        new="        y = torch.from_numpy(np.zeros(x.shape, np.float32))\n        for j in range(ids.shape[1]):\n            y +="),
    captured("kv_write", "asks-the-host-for-padding", old="        targets = plan.targets.clamp(min=0)\n",
        new="        targets = plan.targets.clamp(min=0) if plan.targets.amin() < 0 else plan.targets\n"),
    captured("kv_write", "rows-without-padding", old="def _written(", new="def _compacted("),
    captured("linear", "results-in-new-memory", old="            return results\n", new="            return results.clone()\n"),
    captured("silu_mul", "last-operation-not-repeated", old="held in recorder.calls:", new="held in recorder.calls[:-1]:"),
    captured("add", "operands-copied-at-capture", old="self.calls.append((func, args,", new="self.calls.append((func, [x.clone() if isinstance(x, Tensor) else x for x in args],"),
]  # fmt: skip
