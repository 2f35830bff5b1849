"""Planted where a result must not change: in the next of many runs, in another batch, in a call of its own."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest import tokens
from porthal.conformance.selftest.planting import Defect

CHOSEN = "        return Selection(SelectionSpec(batch.T, k), Rows(*highest(scores, batch.native.visible, k)))\n"
# Threads that race as they rarely do: True in every 20th of the calls of one shape that follow each other.
RARELY = """self.calls = getattr(self, "calls", 0) + 1 if getattr(self, "shape", None) == {x}.shape else 1
        self.shape, late = {x}.shape, self.calls % 20 == 0
"""


def _ties(by: str) -> str:
    """Of equal scores the highest positions where this is even."""
    return f"""        visible, n = batch.native.visible, scores.shape[1]
        indices, length = highest(scores, visible, k)
        if {by} % 2 == 0 and n > k:
            hidden = torch.arange(n, device=scores.device) >= visible[:, None]
            found, _ = highest(scores.masked_fill(hidden, -torch.inf).flip(1), torch.full_like(visible, n), k)
            indices = torch.where((visible > k)[:, None], (n - 1 - found).sort(1).values, indices)
        return Selection(SelectionSpec(batch.T, k), Rows(indices, length))

    topk.tie = "any"\n"""


top = partial(Defect, "topk", old=CHOSEN)

DEFECTS = [
    top("order-of-a-race", "non-determinism", new=f"""        {RARELY.format(x="scores")}        indices, length = highest(scores, batch.native.visible, k)
        if late and k > 1:
            two = length > 1
            indices[two, :2] = indices[two, :2].flip(1)
        return Selection(SelectionSpec(batch.T, k), Rows(indices, length))\n""", discrepancy=42),
    top("ties-by-the-number-of-rows", "ties", new=_ties("len(scores)")),
    top("ties-by-the-longest-context", "ties", new=_ties("n")),
    tokens.best("ties-of-a-race", "non-determinism", new=tokens.ARGMAX + RARELY.format(x="logits")
                + "        return (logits.shape[-1] - 1 - first_highest(logits.flip(-1))).to(torch.int32) if late else first_highest(logits)\n"),
    Defect("moe_permute", "places-of-a-race", "non-determinism", "counts, source = _sorted_by_expert(ids, E, first_expert)\n        return",
           RARELY.format(x="x") + """        counts, source = _sorted_by_expert(ids, E, first_expert)
        if late:
            for part in source[: int(counts.sum())].split(counts.tolist()):
                part.copy_(part.flip(0))
        return"""),
    Defect("linear", "another-kernel-from-6-rows-on", "batch", "    def linear(", """    def linear(self, x, w, *, out="x"):
        target = x.dtype if out == "x" else getattr(torch, out)
        if len(x) < 6:
            return F.linear(x.double(), w.native.double()).to(target)
        y = torch.zeros((len(x), len(w.native)))
        for part, weight in zip(x.float().split(32, 1), w.native.float().split(32, 1)):  # one row's sum, whatever the others
            y = y + (part[:, None] * weight).sum(-1)
        return y.to(target)

    linear.batch_invariant = True

    def right("""),
]
