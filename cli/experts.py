"""`porthal generate --stats`: which experts rows have chosen, and which ranks they went to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from porthal.hal import Backend
    from porthal.hal.binding import Function
    from porthal.model.layout import Layout

MOST = 8  # experts that are named


class Chosen:
    """A wrap for `bind`: the experts that rows of this rank have chosen, over all layers."""

    def __init__(self, backend: Backend, count: int) -> None:
        self.backend, self.count = backend, count
        self.rows: Counter[int] = Counter()

    def __call__(self, op: str, function: Function) -> Function:
        if op != "moe_route":
            return function

        def call(*args: Any, **attrs: Any) -> Any:
            ids, weights = function(*args, **attrs)
            self.rows.update(self.backend.to_numpy(ids).reshape(-1).tolist())
            return ids, weights

        return call

    def told(self, layout: Layout | None) -> dict[str, list[int]]:
        """Rows of each expert, and of each rank; every rank calls it."""
        mine = [self.rows[expert] for expert in range(self.count)]
        if layout is None:
            return {"rows_of_experts": mine, "rows_of_ranks": [sum(mine)]}
        each = [json.loads(said) for said in layout.comm.gather("stats", json.dumps(mine).encode())]
        ranks = [0] * layout.comm.size
        for rank, rows in enumerate(each):
            for expert, place in enumerate(layout.chosen(self.count, rank)):
                ranks[layout.owner(self.count, place)] += rows[expert]
        return {"rows_of_experts": [sum(rows) for rows in zip(*each)], "rows_of_ranks": ranks}

    def words(self, told: Mapping[str, list[int]]) -> Iterator[str]:
        """The same for people."""
        if not told:
            return
        experts, ranks = told["rows_of_experts"], told["rows_of_ranks"]
        total, mean = sum(experts), sum(ranks) / len(ranks)
        order = sorted(range(self.count), key=lambda expert: -experts[expert])
        most = ", ".join(f"{expert} {experts[expert] / max(total, 1):.0%}" for expert in order[:MOST])
        more = f", {self.count - MOST} more" if self.count > MOST else ""
        yield f"experts: {total} rows over all layers, of which go to expert {most}{more}"
        yield f"ranks: {', '.join(map(str, ranks))} rows; the fullest has {max(ranks) / max(mean, 1e-9):.2f} times the mean"
