"""What sparse attention gains: the cost of one token against its context, of the indexer, of attention to what it selects, and
of attention to all keys."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from porthal.bench.run import COLD, Run
from porthal.bench.scale import Bounds, Sized
from porthal.bench.workloads import Row, Workload
from porthal.conformance.cases.compositions import Request
from porthal.conformance.cases.profiles import home_of
from porthal.model.config import Config
from porthal.model.load import stepped

SHORTEST = 2**10
INDEXER, SPARSE, DENSE = PARTS = ("indexer", "sparse", "dense")
OPS = {INDEXER: "indexer_topk", SPARSE: "sparse_mla", DENSE: "sparse_mla"}
HEAD = ("context", "pairs, sparse of dense", "prompt's pairs", "indexer", "attention", "together", "dense", "dense/sparse")


def curve(dtype: str, bounds: Bounds) -> Workload:
    """The three calls of one layer for one token at the end of each context: dense is the same attention with all keys
    selected."""
    config = Config.read(home_of())
    rows = []
    for context in contexts(config.max_position_embeddings):
        requests = (Request(1, context),)
        known = dict(stepped(config.shallow(), [(1, context)], dtype))
        for part in PARTS:
            spec = known[OPS[part]]
            if part == DENSE:
                spec = replace(spec, dims={**spec.dims, "k": context})
            sized = Sized.of(OPS[part], spec, requests).within(bounds)
            rows.append(Row(part, f"curve, context {context}", sized.case, sized.stands_for, sized.scaled))
    return Workload("curve", dtype, tuple(rows), {"topk": config.index_topk})


def contexts(longest: int) -> list[int]:
    return [SHORTEST << n for n in range((longest // SHORTEST).bit_length())]


def pairs(context: int, k: int) -> int:
    """How many pairs of a query and a key a prompt of this length has, each query with at most k keys."""
    short = min(context, k)
    return short * (short + 1) // 2 + (context - short) * k


def crossing(at: Sequence[float], a: Sequence[float], b: Sequence[float]) -> float | None:
    """Where a falls below b and stays there, between two points by their logarithms; None where it does not."""
    for n in range(len(at) - 1, -1, -1):
        if a[n] >= b[n]:
            if n == len(at) - 1:
                return None
            before, after = math.log(a[n] / b[n]), math.log(a[n + 1] / b[n + 1])
            return math.exp(math.log(at[n]) + math.log(at[n + 1] / at[n]) * before / (before - after))
    return at[0] if at else None


def seconds(run: Run, backend: str) -> dict[int, dict[str, float]]:
    """Of each context the time of its parts, as far as all of them were measured."""
    cold = {m.token: m.summary.median for m in run.timed if m.backend == backend and m.cache == COLD}
    found: dict[int, dict[str, float]] = {}
    for row in run.workload.rows:
        if row.case.token in cold:
            found.setdefault(int(row.group.rpartition(" ")[2]), {})[row.step] = row.calls * cold[row.case.token]
    return {context: parts for context, parts in found.items() if set(parts) == set(PARTS)}


def markdown(run: Run) -> Iterator[str]:
    """The table of docs/results: one layer, one token, per backend; and where the curves cross."""
    k = int(str(run.workload.facts["topk"]))
    for name, side in run.sides.items():
        found = seconds(run, name)
        if not found:
            continue
        threads = f"{side.threads} thread{'s' * (side.threads > 1)}"
        yield from ("", f"`{name}` on {side.facts.device} ({side.facts.place}), {threads}, {side.clock}, caches cold:", "")
        yield "| " + " | ".join(HEAD) + " |"
        yield "|" + "---|" * len(HEAD)
        yield from (_line(context, k, parts) for context, parts in found.items())
        yield ""
        yield from _crossings(found)


def _line(context: int, k: int, parts: Mapping[str, float]) -> str:
    together = parts[INDEXER] + parts[SPARSE]
    cells = (
        f"{context}",
        f"{min(context, k)} of {context}",
        f"{1 - pairs(context, k) / pairs(context, context):.0%} fewer",
        *(f"{1e3 * s:.3g} ms" for s in (parts[INDEXER], parts[SPARSE], together, parts[DENSE])),
        f"{parts[DENSE] / together:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def _crossings(found: Mapping[int, Mapping[str, float]]) -> Iterator[str]:
    at = list(found)
    sparse = [found[c][INDEXER] + found[c][SPARSE] for c in at]
    told = {
        "Indexer and sparse attention together cost less than dense attention": (sparse, [found[c][DENSE] for c in at]),
        "Sparse attention costs less than the indexer that selects for it": (
            [found[c][SPARSE] for c in at],
            [found[c][INDEXER] for c in at],
        ),
    }
    for sentence, (a, b) in told.items():
        where = crossing(at, a, b)
        yield f"{sentence} {'at no context up to ' + str(at[-1]) if where is None else f'from a context of {where:.0f} on'}."
