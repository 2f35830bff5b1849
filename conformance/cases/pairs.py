"""A covering design: calls in which the classes of everything that a case may choose meet in pairs.

A kernel that is right along each axis may be wrong where two of them meet: few rows and a wide operand, a remainder and a
stride, a long context and small pages. What a case chooses are factors: its sizes, attributes, dtypes, layout, batch, optional
operands, schemes and values. A pair of their classes is met by a case that has both, in each regime once: of few rows and of
many, and under a scheme, since for these there are kernels of their own. Cases are made for pairs that none has met, and of
these a level takes, as far as its time goes, what meets most pairs for its cost.

Where values are such that places cannot be told apart (zeros, equals) a case meets only the pairs of these values.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from porthal.conformance.cases.boundaries import TELLING, ends, most_of, sizes_of, values
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.classes import ENDS, FEW, FORMS, KEYS, batch_of, form_of, has_form, points, size_class
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.domain import absences, combos, free_symbols, mixed, schemes_alike
from porthal.conformance.cases.legal import LAYOUTS, VIEWS, elements, refusal, unsuited
from porthal.conformance.cases.profiles import Profile
from porthal.conformance.level import Level
from porthal.hal.contract import PAGE_SIZES, Contract
from porthal.hal.spans import Reals

Array = np.ndarray[Any, Any]
Met = tuple[Array, int, bool]  # the places of a case's classes, its regime, and whether its values tell places apart
Recipes = tuple[tuple[str, str], ...]
PAGE = "block_size"
SEEN = "seen"  # how many keys a choice has: as many as it takes, one more, or any number
PLAIN = (*TELLING, "normal", "seesaw")  # values by which places are told apart
SAME = "broadcast"  # a layout in which they are not
UNCODED = ("special", "rim", "extreme")  # not finite, or near the end of float32: what codes say of it is not specified
CODED_ROWS = 1024  # of a composite under a scheme: of more rows some code of an intermediate may be either of two
COPIED = 0.012  # seconds, from which on a case is one of copies, if that costs so much less:
LESS = 0.7
CHEAP = 0.02  # seconds, below which a case of few rows is one in a second dtype, too
WORTH = {"form": 3.0, "dtypes": 2.0, "recipes": 0.5, "schemes": 0.3}  # of a class, whose product a pair counts; of others 1
FEW_VIEWED = 9.0  # and a layout with few rows
MANY, CODED = 1, 2  # bits of a regime: rows are not few, under a scheme
FIRST = 300.0  # and a class that no case has had; ten times that where it is none of a size, as such have no neighbours
HUGE = size_class(4096) + 2
DEAD = 6  # failures, after which a class that no case has is left out
USUAL = size_class(9)
RARE = 1e15  # more than all pairs are worth
USUALLY = {"absent": 2, "view": 4, SEEN: 4}  # every so many calls a pair takes what is not usual
TRIES = 4  # at a pair: what meets most beside it, what is usual, and twice with large sizes, of which others may need more


@dataclass(frozen=True)
class Factor:
    """Something that a case chooses, and its classes: of a size numbers (see `classes`), of anything else the values."""

    name: str
    classes: tuple[Any, ...]
    sized: bool = False


def factors(contract: Contract, level: Level, profile: Profile, recipes: Sequence[Recipes]) -> list[Factor]:
    """Everything that a case of an op chooses, rows first. A width that a contract lists alone stays unless all is tested."""
    most, kinds = reach(contract, profile), {o.kind for o in contract.signature.operands}
    free = [s for s in free_symbols(contract) if s == contract.rows or level.thorough or len(contract.cases[s]) > 1]
    sizes = list(dict.fromkeys([contract.rows, *free])) if contract.rows else free
    found = [Factor(s, tuple(c for c in _classes(1, most.get(s, 64), level) if _lawful(contract, s, c)), True) for s in sizes]
    for name, attribute in contract.attributes.items():
        listed = contract.cases.get(name, ())
        if attribute.type is int:
            low = min(0 in (span if isinstance(span := contract.legal.get(name, (1,)), Sequence) else (1,)), 1)
            high = max(most.get(name, 0), *listed, 1)
            found.append(Factor(name, tuple(_classes(1 - low, high, level)), True))
        elif name in contract.legal:
            span = contract.allowed(name, SimpleNamespace())
            more = ends(span) if level.thorough or not isinstance(span, Reals) else ends(span)[:2]
            found.append(Factor(name, tuple(dict.fromkeys([*listed, *more]))))
        elif listed:
            found.append(Factor(name, tuple(listed)))
    if "Batch" in kinds:
        found.append(Factor(KEYS, tuple(_classes(1, most[KEYS], level)), True))
        found.append(Factor("form", FORMS))
        if "k" in contract.cases:
            found.append(Factor(SEEN, ("", "all", "one more")))
    if PAGE in contract.legal:
        found.append(Factor(PAGE, tuple(_classes(1, 1024, level)), True))
    found.append(Factor("dtypes", (*combos(contract), *mixed(contract))))
    found.append(Factor("view", ("", *(v for v in (*VIEWS, *LAYOUTS) if v != SAME and not unsuited(contract, v)))))
    found.append(Factor("absent", ((), *absences(contract))))
    found.append(Factor("schemes", ((), *schemes_alike(contract))))
    found.append(Factor("recipes", ((), *recipes)))
    return [f for f in found if len(f.classes) > 1]


def reach(contract: Contract, profile: Profile) -> dict[str, int]:
    """The largest size of each symbol; of an attribute that a model does without, as much as its other sizes permit."""
    most = most_of(contract, profile)
    for name, attribute in contract.attributes.items():
        if attribute.type is int and name in contract.legal and most.get(name, 0) <= 1:
            most[name] = contract.allowed(name, SimpleNamespace(**most))[-1]  # type: ignore[index]
    return most


def _lawful(contract: Contract, name: str, label: int) -> list[int]:
    """The points of a class of sizes that no rule about this size forbids."""
    rules = [rule for words, rule in contract.rules if name in words.split()]
    return [p for p in points(label) if all(rule(SimpleNamespace(**{name: p})) for rule in rules)]


def _classes(low: int, high: int, level: Level) -> Iterator[int]:
    """Those of all sizes from `low` to `high`; of huge ones only those that leave a remainder, where not all is tested."""
    for label in dict.fromkeys(size_class(v) for end in ENDS for v in (end, end - 1) if v >= low):
        if any(low <= p <= high for p in points(label)) and (level.thorough or label < HUGE or label % 2):
            yield label


class Design:
    """The pairs of an op's classes: which are met, and cases for the others."""

    def __init__(self, contract: Contract, level: Level, profile: Profile, recipes: Sequence[Recipes]) -> None:
        self.contract, self.level, self.most = contract, level, reach(contract, profile)
        self.factors = factors(contract, level, profile, recipes)
        self.at = {f.name: n for n, f in enumerate(self.factors)}
        starts = np.cumsum([0, *(len(f.classes) for f in self.factors)])
        self.slices = [slice(int(a), int(b)) for a, b in pairwise(starts)]
        self.places = {f.name: {c: int(a) + n for n, c in enumerate(f.classes)} for f, a in zip(self.factors, starts)}
        self.owner = np.repeat(np.arange(len(self.factors)), [len(f.classes) for f in self.factors])
        few = [place for label, place in self.places.get(contract.rows, {}).items() if label < 2 * FEW]
        self.few, self.together = set(few), self._together()
        self.open = self._worths()
        self.seen = np.zeros(len(self.owner), bool)
        self.first = np.where(np.array([f.sized for f in self.factors])[self.owner], FIRST, 10 * FIRST)
        self.failed = np.zeros(len(self.owner), int)  # how often no case of a class could be made
        self.used: Counter[tuple[str, int]] = Counter()
        self.turn = 0

    def _together(self) -> Array:
        """Which classes a call may have at once, as far as that is known before one is made."""
        found = np.ones((len(self.owner), len(self.owner)), bool)
        rows, recipes = self.places.get(self.contract.rows, {}), self.places.get("recipes", {})
        coded = [place for schemes, place in self.places.get("schemes", {}).items() if schemes]
        apart = [(a, b) for n, a in rows.items() for form, b in self.places.get("form", {}).items() if not has_form(n, form)]
        apart += [(a, b) for of, a in recipes.items() for b in coded if any(recipe in UNCODED for _, recipe in of)]
        apart += [(a, b) for n, a in rows.items() for b in coded if self.contract.decomposition and n > size_class(CODED_ROWS)]
        for a, b in apart:
            found[a, b] = found[b, a] = False
        return found

    def _worths(self) -> Array:
        """What a pair is worth in each regime, until a case has met it."""
        worth = np.concatenate([[self._worth(f, c) for c in f.classes] for f in self.factors])
        pairs = np.where(self.owner[:, None] != self.owner, worth[:, None] * worth, 0) * self.together
        rows, places = self.owner == self.at.get(self.contract.rows, -1), np.arange(len(self.owner))
        few, under = np.isin(places, list(self.few)), self.places.get("schemes", {})
        coded = np.isin(places, [place for schemes, place in under.items() if schemes])
        chosen = np.array([not (f.sized or f.name in ("form", "dtypes")) for f in self.factors])[self.owner]
        found = np.stack([2 * pairs, pairs] * (1 + bool(coded.any())))
        for regime, open_in in enumerate(found):
            many = regime & MANY
            closed = rows & (few if many else ~few)
            closed |= np.isin(places, [under[()]]) | ~self.together[:, coded].any(-1) if regime & CODED else coded
            open_in[closed] = open_in[:, closed] = 0
            if not many and not rows.any():
                open_in[:] = 0
            for recipe, place in self.places.get("recipes", {}).items():
                if regime != MANY and not plain(recipe):  # such values are met by each class once, and by schemes
                    closed = ~coded if many else coded | True
                    open_in[place, closed] = open_in[closed, place] = 0
            for view, place in self.places["view"].items():
                if view:  # a layout is met by each class of rows, and of sizes once
                    closed = chosen if many else ~rows
                    open_in[place, closed] = open_in[closed, place] = 0
                    open_in[place, rows] *= 1 if many else FEW_VIEWED
                    open_in[rows, place] *= 1 if many else FEW_VIEWED
        return found

    def _worth(self, f: Factor, of: Any) -> float:
        """Of a class: of a size that is more than a few, and of few rows, most."""
        if f.sized:
            return 3.0 if of >= 2 * FEW or f.name == self.contract.rows else 1.0
        return WORTH.get(f.name, 1.0)

    # -- what a case meets -------------------------------------------------------------------------------------------

    def classes_of(self, case: Case) -> Met:
        """The places of a case's classes, its regime, and whether by its values places are told apart."""
        env = sizes_of(case)
        known: dict[str, Any] = {**case.attributes, "dtypes": case.dtypes, "view": case.view, "absent": case.absent}
        known |= {"recipes": case.recipes, "schemes": case.schemes}
        known |= {"form": form_of(case.batch, case.distinct) if case.batch else ""}
        known[SEEN] = {0: "all", 1: "one more"}.get(env.get(KEYS, 0) - env.get("k", 0), "")
        found = []
        for f in self.factors:
            key = size_class(env[f.name]) if f.sized and f.name in env else known.get(f.name)
            if (place := self.places[f.name].get(key)) is not None:
                found.append(place)
        regime = (MANY if not found or found[0] not in self.few else 0) | (CODED if case.schemes else 0)
        return np.array(found), regime, plain(case.recipes) and case.view != SAME

    def gain(self, met: Met) -> float:
        """What the pairs are worth that a case meets and none has met; a class that none has had counts more."""
        found, regime, plain = met
        new = self.open[regime][np.ix_(found, found)]
        if not plain:
            new = new[self._masking(found)]
        return float(new.sum()) + float(self.first[found][~self.seen[found]].sum())

    def meet(self, met: Met) -> None:
        found, regime, plain = met
        self.seen[found] = True
        of = found if plain else found[self._masking(found)]
        self.open[regime][np.ix_(of, found)] = False
        self.open[regime][np.ix_(found, of)] = False

    def _masking(self, found: Array) -> Array:
        """Of a case's classes its values and its layout."""
        owners = self.owner[found]
        masks: Array = (owners == self.at.get("recipes", -1)) | (owners == self.at["view"])
        return masks

    # -- cases for what is not met -----------------------------------------------------------------------------------

    def pool(self, count: int) -> list[tuple[Case, float, Met]]:
        """So many cases at most, each for a pair that none before has met; what no legal case has that is not dearer than
        the level allows is closed."""
        found: list[tuple[Case, float, Met]] = []
        kept = self.open.copy(), self.seen.copy()
        for _ in range(2 * count):
            if len(found) == count or not self.open.any():
                break
            degree = self.open.sum(-1)
            regime, a = divmod(int((degree * np.where(self.seen, 1, self.first**2)).argmax()), len(self.owner))
            b = int((self.open[regime, a] * degree[regime]).argmax())
            case, cost = self._case(regime, a, b)
            if case:
                met = self.classes_of(case)
                self.meet(met)
                found.append((case, cost, met))
            if self.open[regime, a, b]:
                self.failed[a] += 1
                none = [a] if self.failed[a] >= DEAD and not self.seen[a] else []
                for state in (self.open, kept[0]):
                    state[regime, a, b] = state[regime, b, a] = False
                    state[:, none] = state[:, :, none] = False
        self.open, self.seen = kept
        return found

    def _case(self, regime: int, a: int, b: int) -> tuple[Case | None, float]:
        """A case that has these two classes, and what it costs; None where none is legal, or within what a level allows."""
        fixed = {int(self.owner[p]) for p in (a, b)}
        self.turn += 1
        for attempt in range(TRIES):
            chosen = self._filled(regime, a, b, usual=attempt > 0)
            if SEEN in chosen and self.at[KEYS] in fixed:  # k says how many keys are all, and one more
                chosen |= {"k": chosen[KEYS]} if self.at[SEEN] in fixed else {SEEN: ""}
            for i, f in enumerate(self.factors if attempt > 1 else ()):
                if f.name in self.contract.signature.symbols() and f.name != self.contract.rows and i not in fixed:
                    chosen[f.name] = f.classes[-min(attempt - 1, len(f.classes))]
            case, cost = self._afforded(chosen, fixed, attempt)
            if case and {a, b} <= set(self.classes_of(case)[0].tolist()):
                for f in self.factors:
                    if f.sized:
                        self.used[f.name, chosen[f.name]] += 1
                return case, cost
            if attempt and not case and cost:
                break  # legal, but dear
        return None, 0.0

    def _filled(self, regime: int, a: int, b: int, usual: bool) -> dict[str, Any]:
        """A class for each factor: of two these, of the others what meets most with those before, or what is usual."""
        taken = {int(self.owner[p]): p for p in (a, b)}
        order = [(n + self.turn) % len(self.factors) for n in range(len(self.factors))]
        for n in sorted(order, key=lambda n: n != self.at.get(self.contract.rows, -1)):
            if n in taken:
                continue
            f, part, before = self.factors[n], self.slices[n], list(taken.values())
            score = self.open[regime, part][:, before].sum(-1) * (not usual)
            if f.sized:
                score -= np.abs(np.array(f.classes) - USUAL)  # of what meets as much neither tiny nor huge
            if self.turn % USUALLY.get(f.name, 1) or (usual and not f.sized):  # most calls as most are
                score[1:] -= RARE
            if n == self.at.get(self.contract.rows, -1):
                score[[(place not in self.few) != regime & MANY for place in range(part.start, part.stop)]] = -np.inf
            if f.name == "schemes":
                score[slice(None, 1) if regime & CODED else slice(1, None)] = -np.inf
            score[~self.together[part][:, before].all(-1)] = -np.inf
            taken[n] = part.start + int(score.argmax())
        return {f.name: f.classes[taken[n] - self.slices[n].start] for n, f in enumerate(self.factors)}

    def _afforded(self, chosen: dict[str, Any], fixed: set[int], attempt: int) -> tuple[Case | None, float]:
        """The case of these classes, of which sizes that are not fixed become smaller until a level can afford it."""
        for smaller in (0, 4, 2 * len(ENDS)):
            for i, f in enumerate(self.factors):
                if f.sized and smaller and i not in fixed:
                    chosen[f.name] = max(chosen[f.name] - smaller, min(chosen[f.name], 2 * FEW - 2))
            case, cost = self._built(chosen, attempt), 0.0
            if case is None:
                break
            cost, n = seconds(case), elements(case)
            if cost > COPIED and self.contract.independent and chosen.get("form") != "shared":
                fewer = replace(case, distinct=8 if self.level.thorough else 4)
                if not refusal(fewer) and (less := seconds(fewer)) < LESS * cost:
                    case, cost, n = fewer, less, elements(fewer)
            if cost <= self.level.pair and n <= (self.level.copied if case.distinct else self.level.elements):
                return case, cost + n / ELEMENTS
        return None, cost

    def _built(self, chosen: Mapping[str, Any], attempt: int) -> Case | None:
        """The case of these classes; in turn sizes of one class are equal, and more keys are seen than are chosen."""
        contract, alike, beyond = self.contract, self.turn % 3 == 0 and not attempt, (self.turn + attempt) % 2
        given: dict[int, int] = {}

        def point(name: str) -> int:
            listed = contract.cases.get(name, ()) if name != PAGE else values(PAGE_SIZES)
            most = max(self.most.get(name, 0), *listed) if listed else self.most.get(name, 2**20)
            own = sorted({v for v in (*listed, most, most - 1) if size_class(v) == chosen[name]}, reverse=True)
            within = [p for p in dict.fromkeys((*own, *_lawful(contract, name, chosen[name]))) if p <= most] or [1]
            v = within[(self.used[name, chosen[name]] + attempt) % len(within)]
            same = given.setdefault(chosen[name], v)
            return same if alike and same <= most else v

        dims = {s: point(s) if s in chosen else contract.cases.get(s, (1,))[0] for s in self._symbols()}
        size = (point(PAGE) if PAGE in chosen else 0) if PAGE in contract.legal else 0
        facts: dict[str, Any] = dict(dims)
        for name in dict.fromkeys([*(n for n in contract.legal if n in contract.attributes), *contract.attributes]):
            attribute = contract.attributes[name]
            if name not in chosen:
                facts[name] = contract.cases.get(name, (attribute.default,))[0]
            elif attribute.type is not int:
                facts[name] = chosen[name]
            elif name not in contract.legal:
                facts[name] = min(contract.cases[name], key=lambda v: abs(size_class(v) - chosen[name]))
            else:
                span = contract.allowed(name, SimpleNamespace(**facts))
                if isinstance(span, Reals) or not len(span):
                    return None
                wanted = point(name)
                facts[name] = wanted if wanted in span else span[max(bisect_right(span, wanted) - 1, 0)]
        batch = ""
        if "form" in chosen:
            exact = {"all": 0, "one more": 1}.get(chosen.get(SEEN, ""))
            keys = max(point(KEYS), facts.get("k", 0) + 9 if beyond else 0) if exact is None else facts["k"] + exact
            batch = batch_of(chosen["form"], dims[contract.rows], keys, size, bool(contract.signature.mutated))
        case = Case(
            contract.name,
            tuple(dims.items()),
            tuple((a, t.type(facts[a])) for a, t in contract.attributes.items() if t.type(facts[a]) != t.default),
            chosen.get("dtypes", combos(contract)[0]),
            chosen.get("recipes", ()),
            chosen.get("absent", ()),
            batch,
            size,
            view=chosen["view"],
            schemes=chosen.get("schemes", ()),
        )
        return None if refusal(case) else case

    def _symbols(self) -> list[str]:
        rows = [self.contract.rows] if self.contract.rows else []
        return list(dict.fromkeys([*rows, *free_symbols(self.contract)]))


ELEMENTS = 1e9  # that are drawn, placed and compared in a second


def plain(recipes: Recipes) -> bool:
    """Whether by these values places are told apart."""
    return all(recipe in PLAIN for _, recipe in recipes)


def pair_cases(
    contract: Contract, level: Level, planned: Iterable[Case], profile: Profile, recipes: Sequence[Recipes]
) -> Iterator[Case]:
    """Of cases for the pairs that planned ones do not meet those that meet most for their cost, as far as the level's time
    for them goes."""
    design = Design(contract, level, profile, recipes)
    for case in planned:
        if not (case.fault or case.seq):
            design.meet(design.classes_of(case))
    pool = design.pool(level.pooled)
    waiting = [(-design.gain(met) / cost, n) for n, (_, cost, met) in enumerate(pool)]
    heapify(waiting)
    left = level.pairs * len(design.factors)
    while waiting and left > 0:
        _, n = heappop(waiting)
        case, cost, met = pool[n]
        worth = -design.gain(met) / cost
        if worth < 0 and waiting and worth > waiting[0][0]:  # less than when it was put there
            heappush(waiting, (worth, n))
        elif worth < 0:
            design.meet(met)
            left -= cost
            yield case
            if level.thorough and cost < CHEAP and not (met[1] or case.view):  # kernels have a way for each dtype
                kinds = [combo for combo in combos(contract) if combo != case.dtypes]
                other = replace(case, dtypes=kinds[n % len(kinds)]) if kinds else case
                yield from [] if refusal(other) else [other]
