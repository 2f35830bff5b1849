"""A call of a model as a case: as large as memory and the time of its judgement allow, and what one such call stands for.

What is made smaller, in this order, is what changes least of a kernel's work: rows that differ, experts that nothing reads,
requests, experts together with their rows, independent columns, rows of a prompt, and widths at last. Of what is not read at
all, as most of an embedding's table, there is little more than caches hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, spelled
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.legal import LARGEST, copyable, elements, refusal
from porthal.hal import CallSpec, UsageError, contracts
from porthal.hal.calls import distinct
from porthal.hal.contract import Contract
from porthal.hal.dtypes import itemsize
from porthal.hal.scheme import NONE

FEW = 4  # distinct rows of a call that is one of copies, and
AMONG_EXPERTS = 64  # where rows choose experts, so that as many are chosen as by rows that all differ
BLOCK_SIZE = 64
ROWS, WIDE, COLUMNS = 256, 512, 2048  # of a prompt, of a dim, and of independent columns, that are made no smaller
WRITTEN = 2**10  # keys before the rows of a call that writes a cache and reads nothing of it
SPARE = 2**28  # bytes of a call of which a part is not read
HELPS = 0.9  # of what a call is too large by, at most left after a step that makes it smaller
BALANCE = 10.0  # operations that take as long as to move a byte, on no device in particular
EXPERTS = "E"


@dataclass(frozen=True)
class Bounds:
    """Bytes of a call's operands, and the seconds that one core may take to judge it, as the suite expects them."""

    memory: float = 2**29
    seconds: float = 3.0


@dataclass(frozen=True)
class Sized:
    """A call in the sizes of a step, and the sizes it is made in: dims with rows among them, and requests."""

    contract: Contract
    spec: CallSpec
    full: tuple[Request, ...]
    found: tuple[Request, ...]
    dims: Mapping[str, int]
    few: int = FEW

    @classmethod
    def of(cls, op: str, spec: CallSpec, requests: tuple[Request, ...]) -> Sized:
        """From a recorded call; the requests of its batch are those of the step, or have one row each."""
        contract = contracts()[op]
        takes = contract.signature.of_kind("Batch")
        rows = _size(spec, contract.rows) if contract.rows else 0
        found = requests if not takes or sum(r.q for r in requests) == rows else tuple(r._replace(q=1) for r in requests)
        if takes and sum(r.q for r in found) != rows:
            raise UsageError(f"{op} has {rows} rows: expected those of the step's requests, or one for each of them")
        pages = contract.signature.of_kind("Pages")
        if takes and pages and all(p.mutated for p in pages):
            found = tuple(r._replace(kv=max(r.q, min(r.kv, WRITTEN))) for r in found)
        bound = {d for o in takes for d in o.dims} - {contract.rows} | {"block_size", "P"} | set(contract.attributes)
        return cls(contract, spec, found, found, {s: _size(spec, s) for s in spec.dims if s not in bound})

    @property
    def rows(self) -> int:
        return self.dims.get(self.contract.rows, 0)

    @cached_property
    def case(self) -> Case:
        c, spec = self.contract, self.spec
        takes, paged = bool(c.signature.of_kind("Batch")), bool(c.signature.of_kind("Pages"))
        first, whole = first_float(c), c.signature.symbols()
        optional = [o.name for o in c.signature.operands if o.optional and spec.dtypes and o.name not in spec.dtypes]
        fields = [n for o in c.signature.of_kind("Pages") for n, w, may in o.fields if may and w not in self.dims]
        made = Case(
            c.name,
            tuple((s, n) for s, n in self.dims.items() if s in whole),
            tuple((a, c.attributes[a].type(v)) for a, v in spec.attrs.items() if v != c.attributes[a].default),
            ((first, spec.dtypes[first]),) if first in spec.dtypes else (),
            absent=(*optional, *fields),
            batch=spelled(self.found) if takes else "",
            block_size=int(_size(spec, "block_size", BLOCK_SIZE)) if takes or paged else 0,
            schemes=tuple((o, name) for o, name in spec.schemes.items() if name != NONE),
        )
        others = {o: t for o, t in spec.dtypes.items() if made.dtype(o) != t}
        made = replace(made, dtypes=(*made.dtypes, *others.items()))
        few = min(max(self.rows, 2), AMONG_EXPERTS) if EXPERTS in self.dims else self.few
        return replace(made, distinct=few) if copyable(c) and not made.schemes else made

    @property
    def bytes(self) -> float:
        """Of the operands and results, every request with pages of its own."""
        pages = self.contract.signature.of_kind("Pages")
        apart = replace(self.case, distinct=0) if pages and not any(p.mutated for p in pages) else self.case
        return elements(apart) * float(itemsize(self.case.dtype(first_float(self.contract) or "float32")))

    def _excess(self, bounds: Bounds) -> float:
        """How many times too large it is: at most 1 where it fits."""
        most = LARGEST["copied" if self.case.distinct else "elements"]
        sizes = [self.bytes / bounds.memory, seconds(self.case) / bounds.seconds, elements(self.case) / most]
        return max(*sizes, *(n / LARGEST["size"] for n in self.dims.values()))

    def within(self, bounds: Bounds) -> Sized:
        """The largest call of this kind within the bounds; UsageError where there is none."""
        made = self
        while made.bytes > SPARE and (less := next(made._unread(), None)):
            made = less
        while (now := made._excess(bounds)) > 1:
            smaller = next((s for s in made._smaller() if s._excess(bounds) <= HELPS * now), None)
            if smaller is None:
                break
            made = smaller
        if why := refusal(made.case):
            raise UsageError(f"{self.contract.name} cannot be called as a step does: {why}")
        return made

    def _smaller(self) -> Iterator[Sized]:
        dims, rows, widths = dict(self.dims), self.contract.rows, sorted(self.dims, key=lambda s: -self.dims[s])
        chosen = self.rows * _size(self.spec, "k", 1)
        experts = dims.get(EXPERTS, 0)
        if self.few > 2:  # takes nothing from the kernel
            yield replace(self, few=self.few // 2)
        if experts > chosen > 0:
            yield replace(self, dims={**dims, EXPERTS: chosen})
        if self.case.batch and len(self.found) > 1:
            yield self._with_requests(self.found[: len(self.found) // 2])
        if experts and self.rows > 1 and experts >= 2 * _size(self.spec, "k", 1):
            yield replace(self, dims={**dims, EXPERTS: experts // 2, rows: self.rows // 2})
        if experts and experts >= 2 * _size(self.spec, "k", 1):
            yield replace(self, dims={**dims, EXPERTS: experts // 2})
        narrower = {s: replace(self, dims={**dims, s: dims[s] // 2}) for s in widths if s not in (rows, EXPERTS, "k")}
        yield from (narrower[s] for s in narrower if dims[s] > COLUMNS and s in self.contract.independent)
        if self.case.batch and max(r.q for r in self.found) > ROWS:
            yield self._with_requests(tuple(r._replace(q=max(ROWS, r.q // 2)) for r in self.found))
        elif self.rows > ROWS and not self.case.batch:
            yield replace(self, dims={**dims, rows: self.rows // 2})
        yield from (narrower[s] for s in narrower if dims[s] > WIDE)

    def _unread(self) -> Iterator[Sized]:
        """With less of what the call does not read."""
        for symbol in sorted(self.dims, key=lambda s: -self.dims[s]):
            made = replace(self, dims={**self.dims, symbol: self.dims[symbol] // 2})
            if self.dims[symbol] > WIDE and made.stands_for == self.stands_for:
                yield made

    def _with_requests(self, found: tuple[Request, ...]) -> Sized:
        return replace(self, found=found, dims={**self.dims, self.contract.rows: sum(r.q for r in found)})

    @property
    def stands_for(self) -> float:
        """How many calls of this size do the work of the one that it was made from: what moves or computes, in proportion."""
        full, made = (_weight(self, *sizes) for sizes in ((self.full, self.spec.dims), (self.found, self.dims)))
        return full / made if made else 1.0

    @property
    def scaled(self) -> str:
        """What was made smaller, in words."""
        told = [f"{len(self.found)} of {len(self.full)} requests"] if len(self.found) < len(self.full) else []
        for symbol, size in self.dims.items():
            full = _size(self.spec, symbol)
            if size < full and (symbol != self.contract.rows or not told):
                told.append(f"{symbol} {size} of {full}")
        if told and (times := self.stands_for) > 1.001:
            told.append(f"{times:.3g} calls stand for one")
        elif told:
            told.append("as much work")
        return ", ".join(told)


def _weight(sized: Sized, found: tuple[Request, ...], dims: Mapping[str, Any]) -> float:
    """What a call costs on no device in particular."""
    facts = len(found), max((r.kv for r in found), default=0)
    batch = {symbol: n for o in sized.contract.signature.of_kind("Batch") for symbol, n in zip(o.dims[1:], facts)}
    spec = replace(sized.spec, dims={**sized.spec.dims, **dims, **batch})
    [call] = distinct([(sized.contract.name, spec)])
    return float(max(call.flops, BALANCE * call.bytes))


def _size(spec: CallSpec, name: str, default: int = 0) -> int:
    """A dim or an attribute of a call, whose sizes are no ranges."""
    size = spec.dims.get(name, spec.attrs.get(name, default))
    assert isinstance(size, int)
    return size
