"""Calls at the ends of what a backend's kernels state: the first and the last size that they take, and each that they name.

What a kernel states is where it is most easily wrong: a buffer of 1023, a table that ends before the number of its
documentation. Such calls depend on the backend; their tokens stand alone like all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from numbers import Integral
from typing import Any

from porthal.conformance.cases.boundaries import STEP, sizes_of
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.domain import Combo, schemes_alike
from porthal.conformance.cases.legal import LARGEST
from porthal.conformance.cases.made import Made
from porthal.conformance.level import BRING_UP
from porthal.hal import Backend, Kernel, contracts
from porthal.hal.contract import CallSpec, Contract
from porthal.hal.limits import Limit
from porthal.hal.scheme import NONE

ELEMENTS = 2**25
SECONDS = 5.0  # that a call may take
ROWS = 9
NAMED = 4


def edges(backend: Backend) -> list[Case]:
    """For each own kernel a call at each end of each of its limits, as far as memory goes."""
    found: dict[str, Case] = {}
    for op, kernels in backend.own().items():
        for kernel in kernels if op in contracts() else ():
            found |= {case.token: case for case in _Edges(contracts()[op], backend, kernel).cases()}
    return list(found.values())


class _Edges(Made):
    def __init__(self, contract: Contract, backend: Backend, kernel: Kernel) -> None:
        super().__init__(contract, BRING_UP.name)
        self.backend, self.kernel, self.stated = backend, kernel, kernel.limits.facts

    def cases(self) -> Iterator[Case]:
        for name, limit in self.stated.items():
            for end in _numbers(limit):
                yield from self._first(name, end)

    def _first(self, name: str, end: int) -> Iterator[Case]:
        """The call that the kernel takes where this fact is at this end, in the first dtypes that it takes; in sizes that are
        usual, or where that is too much in the least."""
        schemes = next((s for s in ((), *schemes_alike(self.contract)) if self._takes(s)), ())
        deep = "deep" if self.has_batch and "k" in self.contract.cases else ""
        least = {s: min(filter(None, self.contract.cases[s])) for s in self.free if s not in (self.rows, *self.stated)}
        for sizes, combo in product(({}, least), self.combos):
            dtypes = self._dtypes(combo)
            others = {other: self._usual(other, limit, dtypes) for other, limit in self.stated.items() if other != name}
            facts: dict[str, Any] = {**sizes, **{n: v for n, v in others.items() if v is not None}, name: end}
            rows, size = facts.pop(self.rows, ROWS) if self.rows else 0, facts.pop("block_size", 0)
            made = self._made(facts, rows=rows, most=ELEMENTS, dtypes=combo, schemes=schemes, block_size=size, batch=deep)
            found = [case for case in made if seconds(case) < SECONDS and self._taken(case, dtypes, name, end)]
            if found:
                yield found[0]
                return

    def _taken(self, case: Case, dtypes: dict[str, str], name: str, end: int) -> bool:
        """Whether the kernel takes a call that has this fact; of what the batch alone decides few do."""
        sizes = sizes_of(case)
        requests = {dim: sizes[STEP] for o in self.contract.signature.of_kind("Batch") for dim in o.dims[1:2]}
        dims: dict[str, Any] = {**sizes, **requests}
        attrs = {a: attribute.default for a, attribute in self.contract.attributes.items()} | case.attributes
        if {**attrs, **dims}.get(name) != end:
            return False
        try:
            return not self.kernel.refuses(CallSpec(dims, dtypes, attrs, dict(case.schemes)))
        except Exception:
            return True  # of a plugin's own: the case says what it is

    def _takes(self, schemes: tuple[tuple[str, str], ...]) -> bool:
        stated = dict(schemes)
        return all(self.kernel.limits.schemes.holds(stated.get(name, NONE), {}) for name in self.contract.schemes)

    def _dtypes(self, combo: Combo) -> dict[str, str]:
        any_case = Case(self.contract.name, (), (), combo)
        return {o.name: any_case.dtype(o.name) for o in self.contract.signature.operands if o.typed}

    def _usual(self, name: str, limit: Limit, dtypes: dict[str, str]) -> object:
        """Of what the limit takes a value that the contract lists, or else one that the limit names."""
        listed = self._near(name) if name in self.contract.cases else [ROWS]
        return next((v for v in (*listed, *_numbers(limit)) if limit.holds(v, dtypes)), None)


def _numbers(limit: Limit) -> list[int]:
    """Where it begins or ends, and of the numbers that it names the first and the last few."""
    named = sorted(set(_sizes(limit.named)))
    return sorted({*_sizes(limit.ends), *named[:NAMED], *named[-NAMED:]})


def _sizes(values: Iterable[Any]) -> list[int]:
    whole = [int(n) for n in values if isinstance(n, Integral) and not isinstance(n, bool)]
    return [n for n in whole if 0 <= n <= LARGEST["size"]]
