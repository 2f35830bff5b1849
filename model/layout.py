"""Which part of a model each rank has, and which rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from porthal.hal import Batch, Binding, Communicator, UsageError
from porthal.model.config import Config
from porthal.model.tokens import ids_array

KINDS = ("ep", "dp+ep", "tp+ep")


@dataclass(frozen=True)
class Layout:
    """How a model lies on the ranks of a group. Of E routed experts rank r has r*E//ranks to (r+1)*E//ranks - 1, or those that
    `table` lists for it, in every layer: an expert that many rows choose may have copies on several ranks. What ranks exchange
    counts places: rank r has as many as it has experts, behind those of the ranks before.

    ep     what is not a routed expert is on every rank and computed there for all rows, of which each dispatches its share
    dp+ep  a rank computes the main layers for its own requests; what ranks with no request do is take part in the experts
    tp+ep  each rank has its share of the attention heads and of the dense layers

    Every rank makes the same calls of collectives and comes to the same tokens.
    """

    comm: Communicator
    kind: str = "ep"
    table: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"layout is {self.kind!r}: expected one of {', '.join(KINDS)}")

    @property
    def data(self) -> bool:
        return self.kind == "dp+ep"

    @property
    def tensor(self) -> bool:
        return self.kind == "tp+ep"

    def recorded(self) -> Layout:
        """The same for calls that are only recorded."""
        return replace(self, comm=Communicator(self.comm.spec, None))

    def replicated(self) -> Layout:
        """Experts alone are shared: the MTP layer, whose selections all drafts use, lies so where requests are shared."""
        return replace(self, kind="ep") if self.data else self

    def fits(self, config: Config) -> None:
        """UsageError where a config cannot be laid out so; it says for how many ranks it can."""
        ranks = self.comm.size
        for name in ("num_attention_heads", "intermediate_size") if self.tensor else ():
            if (size := getattr(config, name)) % ranks:
                good = ", ".join(str(n) for n in range(1, 65) if not size % n)
                raise UsageError(f"layout tp+ep: {name} is {size} on {ranks} ranks, expected a number of ranks from {good}")

        if self.table:
            self._fits_table(config.n_routed_experts)

    def _fits_table(self, count: int) -> None:
        ranks, lengths = self.comm.size, sorted({len(row) for row in self.table})
        if len(self.table) != ranks or len(lengths) != 1:
            raise UsageError(
                f"the table of experts lists {len(self.table)} ranks with {', '.join(map(str, lengths))} experts: expected "
                f"{ranks}, each with equally many"
            )
        listed = {expert for row in self.table for expert in row}
        if wrong := sorted(listed - set(range(count))) or sorted(set(range(count)) - listed):
            what = "has" if wrong[0] in listed else "lacks"
            raise UsageError(f"the table of experts {what} expert {wrong[0]}: expected 0 to {count - 1}, each at least once")
        for rank, row in enumerate(self.table):
            if twice := [expert for expert in row if row.count(expert) > 1]:
                where = f"expert {twice[0]} twice on rank {rank}"
                raise UsageError(f"the table of experts has {where}: expected copies on other ranks")

    def agreed(self, **facts: Any) -> int:
        """This rank, once all are given the same: UsageError on each where they are not."""
        self.comm.agree("generate", facts)
        return self.comm.rank

    def experts(self, count: int) -> Sequence[int]:
        """Those of this rank, in the order of their places."""
        return self.table[self.comm.rank] if self.table else self.places(count)

    def total(self, count: int) -> int:
        """How many places all ranks have together."""
        return sum(map(len, self.table)) or count

    def places(self, count: int, rank: int | None = None) -> range:
        """Those of a rank; of this one where none is named."""
        rank, ranks, total = self.comm.rank if rank is None else rank, self.comm.size, self.total(count)
        return range(rank * total // ranks, (rank + 1) * total // ranks)

    def most(self, count: int) -> int:
        """How many places a rank has at most."""
        return -(-self.total(count) // self.comm.size)

    def chosen(self, count: int, rank: int) -> list[int]:
        """Of each expert the place to which a rank sends: its own copy, else one that differs from rank to rank."""
        placed = [expert for row in self.table for expert in row] or list(range(count))
        copies: list[list[int]] = [[] for _ in range(count)]
        for place, expert in enumerate(placed):
            copies[expert].append(place)
        own = self.places(count, rank)
        return [next((place for place in found if place in own), found[rank % len(found)]) for found in copies]

    def owner(self, count: int, place: int) -> int:
        """The rank that has a place."""
        return next(rank for rank in range(self.comm.size) if place in self.places(count, rank))

    def share(self, size: int) -> slice:
        """This rank's part of so many rows, heads or columns."""
        rank, ranks = self.comm.rank, self.comm.size
        return slice(rank * size // ranks, (rank + 1) * size // ranks)


def owner_of(page: int, ranks: int) -> int:
    """The rank of a request whose first page this is: by multiples of the golden ratio, which are spread evenly whatever the
    distance from one request's pages to the next's."""
    return (page * 0x9E3779B9 % 2**32) * ranks >> 32


@dataclass(frozen=True)
class Part:
    """The rows of a batch that are a rank's own: those of its requests. `batch` is None where it has none."""

    batch: Batch | None
    rows: Sequence[int]
    back: Sequence[int]  # of each row of the whole batch, where it lies behind those of the ranks before

    @classmethod
    def of(cls, ops: Binding, layout: Layout, batch: Batch) -> Part:
        """A request belongs to the rank of its first page, which it keeps while it lasts."""
        ranks, rank = layout.comm.size, layout.comm.rank
        firsts = batch.block_table[:, 0].tolist() if batch.block_table.shape[1] else [-1] * batch.R
        owners = [owner_of(max(page, 0), ranks) for page in firsts]
        if layout.comm.native is None:  # calls are recorded as of a rank that has all requests
            owners = [rank] * batch.R
        starts, lengths = batch.cu_q.tolist(), batch.q_len.tolist()
        order = [i for r in range(ranks) for i, owner in enumerate(owners) if owner == r]
        rows = {i: range(starts[i], starts[i] + lengths[i]) for i in order}
        gathered = [row for i in order for row in rows[i]]
        back = [0] * len(gathered)
        for at, row in enumerate(gathered):
            back[row] = at
        mine = [i for i in order if owners[i] == rank]
        if not mine:
            return cls(None, [], back)
        tables = [[page for page in batch.block_table[i].tolist() if page >= 0] for i in mine]
        part = Batch.build([lengths[i] for i in mine], [int(batch.kv_len[i]) for i in mine], tables, batch.block_size)
        return cls(ops.plan(part), [row for i in mine for row in rows[i]], back)

    def taken(self, ops: Binding, x: Any) -> Any:
        """The own rows of x."""
        return ops.take_rows(x, ops.from_numpy(ids_array(self.rows)))

    def whole(self, ops: Binding, layout: Layout, x: Any) -> Any:
        """All rows, of which each rank gives its own."""
        gathered, _ = ops.all_gather_v(x, layout.comm, M=len(self.back))
        return ops.take_rows(gathered, ops.from_numpy(ids_array(self.back)))
