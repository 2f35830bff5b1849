"""One step's requests, built on the host."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from porthal.hal.errors import UsageError
from porthal.hal.operands.operand import Operand, Parts

if TYPE_CHECKING:
    from porthal.hal.signature import OperandSpec

Ints = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Batch(Operand):
    """One step's requests. The queries are the last `q_len` positions of each request. Logical form: the four fields.

    cu_q         int32 [R+1]  cumulative query rows, starting at 0
    kv_len       int32 [R]    keys visible to the request's last row, after this step's write; 0 marks a padded request
    block_table  int32 [R,B]  page ids, -1 tail
    block_size   slots per page

    Requests that decode (at most 8 query rows) come first. Rejected drafts are dropped by a smaller kv_len next step.
    `native` is what `backend.plan` made of it, once per step.
    """

    cu_q: Ints
    kv_len: Ints
    block_table: Ints
    block_size: int
    native: Any = field(default=None, repr=False)

    @classmethod
    def build(
        cls, q_lens: Sequence[int], kv_lens: Sequence[int], tables: Iterable[Sequence[int]], block_size: int
    ) -> Batch:
        """From plain lengths and page lists; pages beyond a request's length may be missing."""
        rows = [list(t) for t in tables]
        if not len(q_lens) == len(kv_lens) == len(rows):
            raise UsageError(
                f"Batch got {len(q_lens)} query lengths, {len(kv_lens)} key lengths and {len(rows)} page lists: "
                "give one of each per request"
            )
        columns = max(map(len, rows), default=0)
        table = [row + [-1] * (columns - len(row)) for row in rows]
        cu_q = np.asarray([0, *accumulate(q_lens)])
        pages = np.asarray(table, np.int32).reshape(len(rows), columns)
        return cls(cu_q.astype(np.int32), np.asarray(kv_lens, np.int32), pages, block_size)

    def __post_init__(self) -> None:
        for name in ("cu_q", "kv_len", "block_table"):
            value = getattr(self, name)
            if not isinstance(value, np.ndarray) or value.dtype != np.int32:
                kind = getattr(value, "dtype", type(value).__name__)
                raise UsageError(f"Batch.{name} is {kind}: expected a NumPy int32 array")
        if self.block_size < 1:
            raise UsageError(f"Batch.block_size is {self.block_size}: expected at least 1 slot per page")
        ends, lengths = self.cu_q.tolist(), self.kv_len.tolist()  # faster than NumPy for few requests
        q_lens = [end - start for start, end in pairwise(ends)]
        if len(ends) != self.R + 1 or ends[0] != 0 or min(q_lens, default=0) < 0:
            raise UsageError(f"Batch.cu_q is {ends}: expected {self.R + 1} rising counts from 0")
        if self.block_table.ndim != 2 or len(self.block_table) != self.R:
            shape = list(self.block_table.shape)
            raise UsageError(f"Batch.block_table has shape {shape}: expected {self.R} rows of page ids, one per request")
        for r, (q_len, kv_len) in enumerate(zip(q_lens, lengths)):
            if kv_len < q_len and kv_len != 0:
                raise UsageError(
                    f"request {r} has {q_len} query rows but kv_len {kv_len}: "
                    "kv_len counts the step's own rows too (0 only for a padded request)"
                )
        columns = self.block_table.shape[1]
        if self.block_table.min(initial=0) >= 0 and max(lengths, default=0) <= columns * self.block_size:
            return
        need = -(-self.kv_len // self.block_size)
        held = np.logical_and.accumulate(self.block_table >= 0, axis=1).sum(1)  # pages before the first -1
        if (need > held).any():
            r = int(np.argmax(need > held))
            raise UsageError(
                f"request {r} needs {need[r]} pages for kv_len {self.kv_len[r]}: its block table has {held[r]}"
            )

    @property
    def R(self) -> int:
        return len(self.kv_len)

    @property
    def T(self) -> int:
        return int(self.cu_q[-1])

    @cached_property
    def q_len(self) -> Ints:
        return self.cu_q[1:] - self.cu_q[:-1]

    @cached_property
    def max_kv(self) -> int:
        return int(self.kv_len.max(initial=0))

    @cached_property
    def row_request(self) -> Ints:
        """int32 [T]: the request each query row belongs to."""
        return np.repeat(np.arange(self.R, dtype=np.int32), self.q_len)

    @cached_property
    def positions(self) -> Ints:
        """int32 [T]: each query row's position in its request; 0 in padded requests."""
        start = (self.kv_len - self.q_len)[self.row_request]
        within = np.arange(self.T, dtype=np.int32) - self.cu_q[:-1][self.row_request]
        return np.where(self.kv_len[self.row_request] > 0, start + within, 0).astype(np.int32)

    @cached_property
    def visible(self) -> Ints:
        """int32 [T]: how many positions each query row may look at (its own included); 0 in padded requests."""
        return np.where(self.kv_len[self.row_request] > 0, self.positions + 1, 0).astype(np.int32)

    @cached_property
    def slots(self) -> Ints:
        """int64 [T]: the cache slot each query row is written to; -1 is not written."""
        page = self.positions // self.block_size
        if not self.block_table.shape[1]:
            return np.full(self.T, -1, np.int64)
        block = self.block_table[self.row_request, page].astype(np.int64)
        slot = block * self.block_size + self.positions % self.block_size
        return np.where((self.visible > 0) & (block >= 0), slot, -1)

    @cached_property
    def last_rows(self) -> Ints:
        """int32 [R]: the last query row of each request; -1 where it has none."""
        return np.where(self.q_len > 0, self.cu_q[1:] - 1, -1).astype(np.int32)

    @cached_property
    def n_decode(self) -> int:
        """How many leading requests have at most 8 query rows."""
        long = self.q_len > 8
        return int(np.argmax(long)) if long.any() else self.R

    def slots_of(self, request: int) -> Ints:
        """int64 [kv_len]: the cache slots of a request's visible positions, in order."""
        pos = np.arange(self.kv_len[request], dtype=np.int64)
        return self.block_table[request].astype(np.int64)[pos // self.block_size] * self.block_size + (
            pos % self.block_size
        )

    def within(self, capacity: Batch) -> Batch:
        """This batch with the rows, requests and table columns of another, padded by requests without keys at its end.

        UsageError where it needs more than the other has: a longer request, or slots of another size, as well.
        """
        if self.block_size != capacity.block_size:
            raise UsageError(f"the batch has block_size {self.block_size}, expected {capacity.block_size} as it was planned")
        mine, most = ((b.T, b.R, b.block_table.shape[1], b.max_kv) for b in (self, capacity))
        for what, here, there in zip(("query rows", "requests", "table columns", "keys of a request"), mine, most):
            if here > there:
                raise UsageError(f"the batch has {here} {what}, expected at most {there}: plan one with room for more")
        if mine[:3] == most[:3]:
            return self
        rows, requests, columns = (there - here for here, there in zip(mine[:3], most[:3]))
        if rows and not requests:
            raise UsageError(f"the batch has {self.T} query rows and no room for a request that pads them to {capacity.T}")
        padded = np.arange(1, requests + 1) * rows // max(requests, 1)
        cu_q = np.concatenate([self.cu_q, self.T + padded]).astype(np.int32)
        table = np.pad(self.block_table, ((0, requests), (0, columns)), constant_values=-1)
        return Batch(cu_q, np.pad(self.kv_len, (0, requests)), table, self.block_size)

    def with_native(self, native: Any) -> Batch:
        return replace(self, native=native)

    def owned(self) -> Batch:
        """A copy with arrays of its own, over which a backend may write another batch of these sizes."""
        made = Batch.__new__(Batch)
        vars(made).update(vars(self), cu_q=self.cu_q.copy(), kv_len=self.kv_len.copy(), block_table=self.block_table.copy())
        return made

    def leaves(self) -> tuple[Any, ...]:
        return (self.cu_q, self.kv_len, self.block_table)

    # -- as an operand -----------------------------------------------------------------------------------------------

    def sizes(self, declared: OperandSpec) -> list[tuple[str, int]]:
        return [*zip(declared.dims, (self.T, self.R, self.max_kv)), ("block_size", self.block_size)]

    @property
    def dtype(self) -> str:
        return ""

    def parts(self) -> Parts:
        return {name: np.asarray(getattr(self, name)) for name in self.names(None)}

    @classmethod
    def names(cls, spec: None) -> tuple[str, ...]:
        return ("cu_q", "kv_len", "block_table", "block_size")

    @classmethod
    def of(cls, spec: None, parts: Mapping[str, Ints]) -> Batch:
        return cls(parts["cu_q"], parts["kv_len"], parts["block_table"], int(parts["block_size"]))

    def place(self, services: Any, into: Any = None) -> Batch:
        planned: Batch = services.plan(self, into) if into else services.plan(self)
        return planned

    def carry(self, source: Any, target: Any) -> Batch:
        return self.with_native(None).place(target)
