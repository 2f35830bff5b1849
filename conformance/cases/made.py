"""One call at a time of an op: what a rule of the plan fixes, and everything else at its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.domain import Combo, combos, first_float, free_symbols, options, takes_integers
from porthal.conformance.cases.legal import elements, refusal
from porthal.conformance.cases.pairs import plain
from porthal.conformance.cases.provocations import COMPANIONS
from porthal.conformance.cases.values import ANY_OP, FLOATING, RELATED
from porthal.conformance.level import level_of
from porthal.hal.contract import Contract
from porthal.hal.signature import symbols

DEFAULT_ROWS = 7
PAGE = 64  # slots, where a case is about something else


class Made:
    """The calls of one contract at a level; dtypes take turns where not each is met."""

    def __init__(self, contract: Contract, level: str) -> None:
        self.contract, self.level = contract, level_of(level)
        operands = contract.signature.operands
        results = contract.signature.results
        self.sized = {s for o in (*operands, *results) for d in o.dims for s in symbols(d)}
        self.has_batch = bool(contract.signature.of_kind("Batch"))
        self.has_pages = bool(contract.signature.of_kind("Pages"))
        self.free = free_symbols(contract)
        self.rows = contract.rows
        self.attrs = [s for s in contract.cases if s in contract.attributes]
        self.first = first_float(contract)
        self.combos = combos(contract)
        self.turn = 0

    def _next(self) -> Combo:
        """The dtypes that are next in turn."""
        self.turn += 1
        return self.combos[self.turn % len(self.combos)]

    def _each(self) -> list[Combo]:
        """All dtypes, or at bring-up the next in turn."""
        return self.combos if self.level.thorough else [self._next()]

    def _made(
        self, fixed: Mapping[str, Any] | None = None, rows: int = DEFAULT_ROWS, most: int = 0, **fields: Any
    ) -> Iterator[Case]:
        """The case with these values, everything else at its default; nothing where no legal or affordable one exists."""
        facts = self._legal(dict(fixed or {}), rows)
        if facts is None:
            return
        attributes = self.contract.attributes
        dims = [(s, facts[s]) for s in dict.fromkeys((self.rows, *self.free)) if s]
        attrs = [(a, attributes[a].type(facts[a])) for a in attributes if a in facts]
        case = Case(
            self.contract.name,
            tuple(dims),
            tuple((a, v) for a, v in attrs if v != attributes[a].default),
            **fields,
        )
        if self.has_batch and not case.batch:
            case = replace(case, batch="mixed")
        if (self.has_pages or self.has_batch) and not case.block_size:
            case = replace(case, block_size=PAGE)
        if not refusal(case) and elements(case) <= (most or self.level.elements):
            yield case

    def _legal(self, fixed: dict[str, Any], rows: int) -> dict[str, Any] | None:
        """Values for every dim and attribute that fulfil the contract's rules, as near the defaults as those allow."""
        fixed = {self.rows: rows, **fixed} if self.rows else fixed
        names = [s for s in (*self.free, *self.attrs) if s not in fixed]
        for found in product(*(self._near(s) for s in names)):
            facts = {**fixed, **dict(zip(names, found))}
            defaults = {a.name: a.default for a in self.contract.attributes.values()}
            if not self.contract.broken(SimpleNamespace(**{**defaults, **facts})):
                return facts
        return None

    def _near(self, name: str) -> list[Any]:
        """A symbol's values, the default first: the smallest size of at least 8, the first where there is none."""
        found = list(self.contract.cases[name])
        if name in self.sized and max(found) >= 8:
            found.sort(key=lambda v: (v < 8, v))
        return found

    def recipes(self) -> Iterator[tuple[tuple[str, str], ...]]:
        """One value generator at a time, in every operand that lists it; integers everywhere, so that results are exact."""
        names = [o.name for o in self.contract.signature.operands if o.kind != "Batch"]
        for chosen in {r: None for n in names for r in options(self.contract, n)[1:]}:
            taken = [(n, chosen) for n in names if chosen in options(self.contract, n)]
            if chosen in COMPANIONS:
                kind, beside = COMPANIONS[chosen]
                others = [n for n in names if kind in (self.contract.signature[n].kind, options(self.contract, n)[0])]
                taken += [(n, beside) for n in others if (n, chosen) not in taken]
            if chosen == "integer":
                taken = [(n, chosen) for n in names if takes_integers(self.contract, n)]
            yield tuple(taken)

    def telling(self) -> list[tuple[tuple[str, str], ...]]:
        """Values that meet other variations: where not all is tested those by which places are told apart."""
        return [r for r in self.recipes() if self.level.thorough or plain(r)]

    def _unlisted(self) -> Iterator[tuple[str, str]]:
        """Unlisted generators that the op must take all the same: plain ones in its first floats, any for indices."""
        listed = {o.name: options(self.contract, o.name) for o in self.contract.signature.operands if o.kind != "Batch"}
        floats = [name for name, recipes in listed.items() if recipes[0] in FLOATING]
        floats.sort(key=lambda name: self.contract.signature[name].kind != "array")
        for name, recipes in listed.items():
            domain = ANY_OP if name in floats[:1] else RELATED.get(recipes[0], ())
            yield from ((name, recipe) for recipe in domain if recipe not in recipes)
