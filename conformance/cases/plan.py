"""Which calls are tested: cases derived from a contract.

What a call chooses is varied in pairs (see `pairs`), and at the numbers at which kernels break (see `boundaries`); calls in a
model's own sizes are beside them (see `profiles`). Here stands what is tested by itself: values, programs, threads, faults,
what is far apart in memory, and known discrepancies. Levels differ only in how much of it they take; a case does not know
the level it came from.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import cycle, islice, product
from math import prod
from types import SimpleNamespace
from typing import Any

from porthal.conformance.cases.boundaries import boundary_cases, ends, most_of, telling
from porthal.conformance.cases.capture import calls
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import CROWD, LONGEST, Request, parted, requests, spelled
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.discrepancies import named, of_op
from porthal.conformance.cases.domain import (
    Combo,
    absences,
    first_float,
    fitting,
    options,
    per_expert,
    schemes_alike,
)
from porthal.conformance.cases.legal import FAR, FAULTS, LAYOUTS, PAST_2G, THREADS, VIEWS, refusal
from porthal.conformance.cases.made import DEFAULT_ROWS, PAGE, Made
from porthal.conformance.cases.pairs import LESS, SAME, pair_cases
from porthal.conformance.cases.profiles import MODEL, profile_cases, profile_of
from porthal.conformance.cases.programs import programs
from porthal.conformance.cases.ranked import ranked_cases
from porthal.conformance.cases.values import TIED
from porthal.conformance.level import BRING_UP, level_of
from porthal.hal import scheme_of
from porthal.hal.contract import Contract
from porthal.hal.dtypes import itemsize
from porthal.hal.signature import ARRAY, evaluate, symbols

MANY_ROWS = 65536  # where 16-bit row counters and launch grids overflow
PICKED_ROWS = 33  # of which some are chosen
SOME_ROWS = 259  # of calls with values of their own: in the dtypes that are served less, or in turn
SERVED = "bfloat16"
ALIKE = 24  # all sizes of a call, in the third dtype
CORNERS = ((0, 1, 1, 0), (1, 0, 0, 1), (2,), (0,), (1,))  # for attribute after attribute in turn, which of its ends a call has
LOADED_ROWS = 100  # where experts have different loads
FIRST_LOADS = ("even", "crowded", "skewed")  # at bring-up
EXPERTS = 256  # of GLM-5
NARROW = 32  # widths of so many experts
FAINT, LEAN, VAULT, VERGE = "faint", "lean", "vault", "verge"
BLOCKED, OF_ROWS = ("uneven", "pegged"), ("halfway", "dim")  # what quantised blocks are about, and rows that a call quantises
RAGGED = (200, 150, 72)  # which no blocks fill
BLOCKS = (712, 456, 328)  # several blocks, the last of which is not full
LONG_BATCH, LONG_ROWS = "1/100000+1/65537", {"k": 2048}  # rows of scores as long as contexts are
LONG_TIES = ("shelves", "crest", "special")  # runs of equals longer than what is chosen, and numbers that are none
PROMPT = 768
HELD = (2**16, 2**20, 2**24)  # bytes of results that are held while the kernel is called again
CAPTURED = {5: "1/70+1/9+1/131+2/150", 6: "2/70+2/9+2/150"}  # rows and requests of a call that is captured
LONGEST_BATCH = f"1/{LONGEST}"
FIRST_SLOT = "1/0+1/1+1/0+1/9+2/150"  # requests of which one's row may be in slot 0, between padding,
FIRST_SLOT_REPLAYED = "1/70+1/130+1/9+1/150+1/20+1/30"  # and such as are so when they are replayed
SHUFFLED = 64  # orders of pages, in one of which it is


def cases(
    contract: Contract, level: str = BRING_UP.name, dtypes: Sequence[str] | None = None, model: str = MODEL
) -> list[Case]:
    """The cases of one contract at a level, in order, each once; `dtypes` keeps those whose first float is among them, and
    `model` says whose sizes the large ones have."""
    return [case for case in _planned(contract, level, model) if among(case, dtypes)]


def captured(contract: Contract, level: str = BRING_UP.name, dtypes: Sequence[str] | None = None) -> list[Case]:
    """The cases that are captured as a graph and replayed, for backends that do so."""
    if contract.collective:
        return []
    known = of_op(contract.name, capture=True)
    found = {case.token: case for case in (*_Plan(contract, level).captured(), *known)}
    return [case for case in found.values() if among(case, dtypes)]


@lru_cache(maxsize=256)
def _planned(contract: Contract, level: str, model: str) -> tuple[Case, ...]:
    if contract.collective:
        return tuple(ranked_cases(contract, level))
    found: dict[str, Case] = {}
    plan, profile = _Plan(contract, level), profile_of(model)
    planned = (*plan.cases(), *large(contract, level, model), *plan.schemed())
    planned += tuple(pair_cases(contract, plan.level, planned, profile, plan.telling()))
    planned += tuple(plan.layouts({case.view for case in planned}))
    for case in (*planned, *boundary_cases(contract, plan.level, planned, profile)):
        found.setdefault(case.token, case)
    return tuple(found.values())


@lru_cache(maxsize=256)
def large(contract: Contract, level: str, model: str = MODEL) -> tuple[Case, ...]:
    """The cases in a model's own sizes; values and layouts in turn, but the first of each is plain."""
    if contract.collective:
        return ()
    found = [case for case, _ in profile_cases(contract, level_of(level), profile_of(model))]
    views = [v for v in ("", "columns", "slices", "heads") if found and not refusal(replace(found[0], view=v))]
    turns = zip(found, cycle(telling(contract)), cycle(views))
    return tuple(replace(case, recipes=recipes, view=view) for case, recipes, view in turns)


def among(case: Case, dtypes: Sequence[str] | None) -> bool:
    """Whether a case's first float is of one of the dtypes, or nothing in it can be chosen."""
    return dtypes is None or not (first := first_float(case.contract)) or case.dtype(first) in dtypes


def _slots(case: Case) -> Any:
    """Where the rows of a call are written, or of a captured one in its first replay."""
    batch = (calls(case)[1] if case.capture else build(case)).batch
    return batch.slots if batch else ()


class _Plan(Made):
    def cases(self) -> Iterator[Case]:
        """What stands for itself; what meets in pairs is added to it."""
        yield from self._production()
        alike = dict.fromkeys([s for s in self.free if s != self.rows], ALIKE)
        for n, combo in enumerate([c for c in self.combos if len(c) <= 1]):
            same = self._made(alike, rows=ALIKE, dtypes=combo) if n > 1 else ()
            yield from list(same) or self._made(dtypes=combo)
        yield from self._made(rows=0, dtypes=self._next())
        if self.level.thorough:
            least = {s: min(self.contract.cases[s]) for s in self.free if s != self.rows}
            for rows in (MANY_ROWS, MANY_ROWS + 1):
                yield from self._many(least, rows, 4, dtypes=self._next())
            for name in self.contract.cases.get("scheme", ()):
                yield from self._many({**least, "scheme": name}, MANY_ROWS + 1, 4, dtypes=self._next())
        yield from self._legal_ends()
        yield from self._words()
        yield from self._loads()
        yield from self._forms()
        yield from self._programs()
        for seed, combo in product(self.level.seeds, self.combos):
            yield from self._made(rows=65, dtypes=combo, seed=seed)
        if self.level.thorough:
            for recipe, combo in product(self._unlisted(), self.combos):
                yield from self._made(recipes=(recipe,), dtypes=combo, rows=33)
        yield from named(self.contract.name, self.level)
        for fault in FAULTS:
            yield from self._made(fault=fault, dtypes=self._next())

    def schemed(self) -> Iterator[Case]:
        """Under every scheme that the op takes, or quantises by."""
        for name, word in product(self.contract.cases.get("scheme", ()), (*BLOCKED, *OF_ROWS)):
            for combo in self._each():
                yield from self._made({"scheme": name}, rows=PICKED_ROWS, dtypes=combo, recipes=((self.first, word),))
        yield from self._under_schemes()

    def _under_schemes(self) -> Iterator[Case]:
        """Few rows and many, one block and several, the last not full, values that blocks are about; a model's own sizes; and
        operands under different schemes."""
        signature, most = self.contract.signature, most_of(self.contract, profile_of(MODEL))
        for schemes in schemes_alike(self.contract):
            found = [signature[operand] for operand, _ in schemes]
            dims = [d for o in found for d in (*o.dims[-2:], *(width for _, width, _ in o.fields)) if len(symbols(d)) == 1]
            sizes = dict.fromkeys(s for d in dims for s in symbols(d) if s in self.free and s != self.rows)
            ragged = dict(zip(sizes, cycle(RAGGED)))
            values = [(signature[o].kind, o) for o, _ in schemes]
            recipes: list[tuple[tuple[str, str], ...]] = [tuple((o, word) for _, o in values) for word in BLOCKED]
            if len(values) == 1 and values[0][0] != "Pages":
                beside = ((self.first, "huge"),) if self.first else ()
                recipes += [(*beside, (values[0][1], word)) for word in ("vast", "slight")]
            rows = next((o.name for o in signature.of_kind(ARRAY) if o.typed and self.rows in o.dims), "")
            if rows and (scheme_of(schemes[0][1]).other or signature.mutated):
                recipes += [((rows, word),) for word in (*BLOCKED, *OF_ROWS)]
            bases = [c for c in self.combos if len(c) <= 1] or [()]
            served = [c for c in bases if dict(c).get(self.first) == SERVED] or bases[:1]
            part_by_part = self.contract.decomposition and all(kind == "Weight" for kind, _ in values)
            yield from self._made(dtypes=self._next(), schemes=schemes)
            others = {a: self.contract.cases[a][1] for a in self.attrs if len(self.contract.cases[a]) > 1}
            yield from self._made(others, dtypes=served[0], schemes=schemes)
            for group in absences(self.contract):
                yield from self._made(dtypes=served[0], schemes=schemes, absent=group)
            for combo in bases if self.level.thorough and not part_by_part else served:
                yield from self._made(dtypes=combo, schemes=schemes)
                yield from self._made(ragged, rows=PICKED_ROWS, dtypes=combo, schemes=schemes)
                for given in recipes:
                    made = partial(self._made, dtypes=combo, schemes=schemes, recipes=given)
                    yield from made()
                    if self.level.thorough:
                        yield from made(ragged, rows=PICKED_ROWS, most=MANY_ROWS * 64)
            page: dict[str, Any] = {"block_size": PAGE // 4} if self.has_pages or self.has_batch else {}
            several: dict[str, Any] = dict(zip(sizes, cycle(BLOCKS)))
            several |= {"out": "float32"} if "out" in self.attrs else {}
            yield from self._made(several, rows=SOME_ROWS, dtypes=self._next(), schemes=schemes, **page)
            for size in (1, 7, 24, 2 * PAGE) if self.has_pages and self.level.thorough else ():
                yield from self._made(dtypes=self._next(), schemes=schemes, block_size=size)
            if self.level.thorough:
                whole = {s: self.contract.cases[s][0] for s in self.free if s != self.rows}
                yield from self._made(whole, rows=5, dtypes=self._next(), schemes=schemes, most=MANY_ROWS * 256)
            for wide in sizes if self.level.thorough else list(sizes)[:1]:  # more blocks, or groups, than one pass holds
                least = {s: NARROW if s in sizes else min(self.contract.cases[s]) for s in self.free if s != self.rows}
                yield from self._made(
                    {**least, wide: most.get(wide, 0)}, rows=2, dtypes=served[0], schemes=schemes, recipes=recipes[0]
                )
            for many in (DEFAULT_ROWS, SOME_ROWS) if self.level.thorough else (DEFAULT_ROWS,):
                yield from self._made(rows=many, dtypes=served[0], schemes=schemes, view="columns")
        yield from self._mixed()

    def _mixed(self) -> Iterator[Case]:
        """Operands under schemes of their own: each beside others that are plain, and all in turn; as checkpoints have them."""
        taken = self.contract.schemes
        if len(taken) < 2:
            return
        for turn in range(max(map(len, taken.values()))):
            each = [(operand, names[(turn + n) % len(names)]) for n, (operand, names) in enumerate(taken.items())]
            one = each[turn % len(each)]
            for schemes in (tuple(each), (one,)):
                yield from self._made(rows=PICKED_ROWS, dtypes=self._next(), schemes=schemes)

    def captured(self) -> Iterator[Case]:
        """Calls of few rows, where there is a batch with different requests, and with two rows of each; also under schemes."""
        made = partial(self._made, rows=5, batch=CAPTURED[5] if self.has_batch else "", capture=True)
        for combo in self._each():
            yield from made(dtypes=combo)
        if self.has_batch:
            yield from self._made(rows=6, batch=CAPTURED[6], capture=True, dtypes=self._next())
        if self.has_batch and self.contract.signature.mutated:
            yield from self._beside_padding(FIRST_SLOT_REPLAYED, capture=True, dtypes=self._next())
        for name in self.contract.cases.get("scheme", ()):
            yield from made({"scheme": name}, dtypes=self._next())
        for schemes in schemes_alike(self.contract):
            yield from made(dtypes=self._next(), schemes=schemes)

    def _production(self) -> Iterator[Case]:
        """GLM-5's dims in its dtype with all rows different, where no calls in a model's own sizes have them: at several row
        counts and compositions, over a cache longer than top-k; a choice also among as many equals as there may be."""
        bases = [c for c in self.combos if len(c) <= 1]
        production = [c for c in bases if dict(c).get(self.first, "bfloat16") == "bfloat16"]
        wide = bool(large(self.contract, self.level.name, MODEL))
        dims = {s: self.contract.cases[s][0] for s in self.free if s != self.rows}
        attrs = {a: self.contract.cases[a][0] for a in self.attrs}
        deep = "deep" if self.has_batch and "k" in self.contract.cases else ""
        once = [] if wide else production
        for combo, rows in product(once, self.level.production_rows):
            yield from self._made(dims | attrs, rows=rows, dtypes=combo, batch=deep)
        for batch, combo in product(self.level.production_batches if self.has_batch else (), once):
            yield from self._made(dims | attrs, dtypes=combo, batch=batch)
        tied = [r for r in self.recipes() if self.contract.choice and all(recipe in TIED for _, recipe in r)]
        for recipes, combo in product(tied if self.level.thorough else tied[:1], production):
            yield from self._made(dims | attrs, rows=5, recipes=recipes, dtypes=combo, batch=deep)

    def _legal_ends(self) -> Iterator[Case]:
        """Attributes at the low and high ends of their ranges, in turn and together, and in the middle."""
        dims = {s: self._near(s)[0] for s in self.free if s != self.rows}
        for turn in CORNERS[: None if self.level.thorough else 3] if self.attrs else ():
            facts: dict[str, Any] = dict(dims)
            for name, end in zip(self._in_order(), cycle(turn)):
                found = ends(self.contract.allowed(name, SimpleNamespace(**facts)))
                facts[name] = found[min(end, len(found) - 1)]
            yield from self._made(facts, rows=3, dtypes=self._next())

    def _in_order(self) -> list[str]:
        """The attributes, each behind those that bound its range."""
        return [name for name in self.contract.legal if name in self.contract.attributes]

    def _words(self) -> Iterator[Case]:
        """Every word that an attribute may be, in every dtype, and written in place; also of numbers at the ends of dtypes."""
        words = [a for a in self.attrs if self.contract.attributes[a].type is str]
        ends_of = [word for word in (FAINT, VERGE) if self.first and word in options(self.contract, self.first)]
        for name in words:
            for value in ends(self.contract.allowed(name, SimpleNamespace())):
                for combo in self.combos:
                    yield from self._made({name: value}, rows=3, dtypes=combo)
                    for word in ends_of:
                        yield from self._made({name: value}, rows=3, dtypes=combo, recipes=((self.first, word),))
                yield from self._made({name: value}, dtypes=self._next(), seq="update")

    def _loads(self) -> Iterator[Case]:
        """As many experts as GLM-5 has, all with rows, one with most of them, and most without any."""
        experts = self.contract.cases.get("E", (0,))[0]
        ids = [o.name for o in self.contract.signature.operands if "even" in options(self.contract, o.name)]
        counted = per_expert(self.contract)
        least = {s: min(v for v in self.contract.cases[s] if v) for s in (*self.free, *self.attrs) if s != self.rows}
        least |= {s: min(least[s], NARROW) for s in self.free if s in least}
        sizes = {**least, "E": EXPERTS, **({"k": 8} if "k" in least else {})}
        for combo in self.combos if ids and "k" in least and self.level.thorough else ():  # sums of many terms
            yield from self._made({**sizes, "k": EXPERTS}, rows=24, dtypes=combo, most=MANY_ROWS * 128)
        for name in (*ids, *filter(None, [counted])) if experts else ():
            for recipe in [r for r in options(self.contract, name) if self.level.thorough or r in FIRST_LOADS]:
                made = partial(self._made, sizes, recipes=((name, recipe),), most=MANY_ROWS * 128)
                for rows in (LOADED_ROWS * 3, 8, 32) if self.level.thorough else (LOADED_ROWS * 3, 8):
                    yield from made(rows=rows, dtypes=self._next())

    def _forms(self) -> Iterator[Case]:
        """Values one at a time, and all rows alike; operands far apart in memory, and caches that end far from their start."""
        copied: dict[str, Any] = {"distinct": 16} if self.contract.independent and not self.has_batch else {}
        for n, recipes in enumerate(self.recipes()):
            few = PICKED_ROWS if self.contract.choice or self.contract.ranges else DEFAULT_ROWS
            few = LOADED_ROWS if per_expert(self.contract) in dict(recipes) else few
            for combo in self._each():
                wanted = dict(combo).get(self.first) != SERVED if self.level.thorough else n % 2
                made = partial(self._made, rows=SOME_ROWS, recipes=recipes, dtypes=combo)
                whole, alike = (list(made(**kind)) if wanted else [] for kind in ({}, copied))
                cheap = sum(map(seconds, alike)) < LESS * sum(map(seconds, whole))  # of copies fewer numbers tell
                found = alike if cheap or not whole else whole
                yield from (many := [c for c in found if seconds(c) <= 2 * self.level.pair])
                if not many or (self.level.thorough and combo == self.combos[0]):
                    yield from self._made(recipes=recipes, dtypes=combo, rows=few)
        for recipes in self.recipes() if self.has_batch and self.contract.choice and "k" in self.attrs else ():
            words = set(dict(recipes).values())
            if words & set(LONG_TIES) or (self.level.thorough and (self.contract.exact or words <= set(TIED))):
                yield from self._made(LONG_ROWS, recipes=recipes, rows=2, batch=LONG_BATCH, dtypes=self._next())
        if self.has_batch and self.level.thorough:
            sizes = {s: min(self.contract.cases[s]) for s in self.free if s != self.rows}
            sizes |= {"k": LONG_ROWS["k"]} if "k" in self.attrs else {}
            for recipes in ((), *[r for r in self.recipes() if dict(r).get(self.first) == "summit"]):
                yield from self._made(sizes, rows=1, batch=LONGEST_BATCH, recipes=recipes, dtypes=self._next())
        if self.contract.choice and self.has_batch and self.level.thorough:  # a prompt: each row sees one key more
            for past, combo in product((0, 2), self.combos):  # rows of one tile see fewer than are chosen, and more
                yield from self._made(rows=PROMPT, dtypes=combo, batch=f"{PROMPT}/{PROMPT + past}")
        if self.contract.signature.mutated and self.has_batch:
            for combo in self._each():  # a chunk of whole pages that begins within one
                yield from self._made(rows=PAGE, batch=f"{PAGE}/{PAGE + 19}", block_size=PAGE // 2, dtypes=combo)
            yield from self._beside_padding(FIRST_SLOT, dtypes=self._next())
        for combo in self._each():
            yield from self._made(view=SAME, dtypes=combo)
        yield from self._narrowed()
        yield from self._overflowing()
        if any(len(o.dims) > 1 for o in self.contract.signature.of_kind(ARRAY)):
            yield from self._made(view=FAR, dtypes=self._next())
        if self.has_pages:
            size = {combo: sum(itemsize(dtype) for _, dtype in combo) for combo in self.combos}
            narrow = [combo for combo in self.combos if size[combo] == min(size.values())]  # of wider ones they are 8 GiB
            for combo in narrow if self.level.thorough else narrow[:1]:
                yield from self._made(view=PAST_2G, dtypes=combo)
        yield from self._threads()

    def _beside_padding(self, batch: str, **fields: Any) -> Iterator[Case]:
        """A call, or its first replay, with a row that is written to slot 0, which may stand for padding, beside padding."""
        for case in self._made(rows=sum(r.q for r in requests(batch) or ()), batch=batch, **fields):
            seeded = [replace(case, seed=n) for n in range(SHUFFLED)]
            yield from islice((c for c in seeded if 0 in _slots(c)), 1)

    def _narrowed(self) -> Iterator[Case]:
        """Operands of float32 beside narrower ones, in numbers that become smaller when they are narrowed."""
        for combo in self.combos if self.first else ():
            for case in self._made(rows=PICKED_ROWS, dtypes=combo):
                wide = [o.name for o in self.contract.signature.operands if case.dtype(o.name) == "float32"]
                for name in wide if case.dtype(self.first) != "float32" else ():
                    if LEAN in fitting(self.contract, name):
                        yield replace(case, recipes=((name, LEAN),))

    def _overflowing(self) -> Iterator[Case]:
        """Results beyond float16's range, which are infinite, beside others: of kernels that round nothing on the way."""
        rounds = "may_round" in inspect.unwrap(self.contract.reference).__code__.co_names
        if self.contract.exact or self.contract.choice or self.contract.decomposition or self.has_pages or rounds:
            return
        for combo in [c for c in self.combos if dict(c).get(self.first) == "float16"]:
            for case in self._made(rows=PICKED_ROWS, dtypes=combo):
                alike = [o for o in self.contract.signature.operands if case.dtype(o.name) == "float16"]
                chosen = [(o.name, "seesaw" if o.kind == "Weight" else VAULT) for o in alike]
                yield replace(case, recipes=tuple((n, r) for n, r in chosen if r in fitting(self.contract, n)))

    def layouts(self, met: set[str]) -> Iterator[Case]:
        """A small call in each layout that none has met, as in pairs such calls may all have been too dear; and in each a call
        of one row, of which strides are easily mistaken, and of a few."""
        for view in (*VIEWS, *LAYOUTS):
            if view not in met:
                yield from self._made(view=view, dtypes=self._next())
            if view != SAME:
                for rows, combo in product((1, DEFAULT_ROWS) if self.level.thorough else (1,), self._each()):
                    yield from self._made(rows=rows, view=view, dtypes=combo)
        inner = {o.dims[1]: 1 for o in self.contract.signature.of_kind(ARRAY) if len(o.dims) > 2 and o.dims[1] in self.free}
        for view in ("columns", "slices") if inner and self.level.thorough else ("columns",) * bool(inner):
            yield from self._made(inner, view=view, dtypes=self._next())  # the stride of an axis of one says nothing

    def _threads(self) -> Iterator[Case]:
        """Several threads at once: at few rows, and at so many that a kernel takes memory for all of them; also as wide as
        GLM-5 is."""
        if self.level.thorough:
            for combo in self.combos:
                yield from self._made(view=THREADS, dtypes=combo)
            wide = {s: self.contract.cases[s][0] for s in self.free if s != self.rows}
            for rows in (64, 257):
                yield from self._made(wide, rows=rows, view=THREADS, dtypes=self._next(), most=MANY_ROWS * 64)
        for combo in [c for c in self.combos if len(c) <= 1] if self.level.thorough else [self._next()]:
            some = list(self._made(rows=64, view=THREADS, dtypes=combo, most=MANY_ROWS * 4))
            yield from some or self._made(view=THREADS, dtypes=combo)

    def _programs(self) -> Iterator[Case]:
        """Sequences of calls; results are held that are larger than what allocators treat in one way."""
        bases = [c for c in self.combos if len(c) <= 1]
        for name in programs(self.contract):
            sizes = [0] if name != "held" else HELD if self.level.thorough else HELD[:1]
            batch = "drafts" if name == "reuse" and self.has_batch else ""
            for size, combo in product(sizes, bases if self.level.thorough else [self._next()]):
                if size == HELD[-1] and self.first and dict(combo).get(self.first) != "bfloat16":
                    continue  # costly, and so in the dtype that is served
                yield from self._holding(size, combo) if size else self._made(seq=name, dtypes=combo, batch=batch)
        yield from self._made(rows=SOME_ROWS, seq="update", dtypes=self._next())  # kernels have another way for many rows
        for turn, schemes in enumerate(schemes_alike(self.contract)):
            known = [name for name in programs(self.contract) if name not in ("held", "reuse")]
            for name in known if self.level.thorough else known[turn % len(known) :][:1]:
                yield from self._made(seq=name, dtypes=self._next(), schemes=schemes)
            if self.level.thorough or not turn:
                yield from self._made(rows=SOME_ROWS, seq="update", dtypes=self._next(), schemes=schemes)

    def _holding(self, size: int, combo: Combo) -> Iterator[Case]:
        """The call whose first result just has more bytes than this, with as little else as there is."""
        result = next(r for r in self.contract.signature.results if not r.mutated)
        wide = {s for d in result.dims for s in symbols(d)}
        many = self.rows if self.rows in wide else symbols(result.dims[0])[0]
        free = [s for s in (*self.free, *self.attrs) if s != many]
        sizes = {s: (max if s in wide else min)(self.contract.cases[s]) for s in free if s in self.sized}
        if result.kind == "Selection" and self.has_batch and size == HELD[0]:  # rows that see no more than k select the same
            sizes |= {s: sorted(self.contract.cases[s])[-2] for s in symbols(result.dims[1])}

        def held(rows: int) -> int:
            """Bytes in a dtype of 16 bits; a batch's longest request, where that counts, has about as many keys as rows."""
            return 2 * prod(evaluate(d, {"S": rows, **sizes, many: rows}) for d in result.dims)

        rows = bisect_right(range(MANY_ROWS), size, key=held)
        few = {} if self.has_batch or size == HELD[0] or many != self.rows else {"distinct": 8}
        if size < held(rows) and (self.level.thorough or rows < MANY_ROWS // 8):
            yield from self._made({**sizes, many: rows}, dtypes=combo, seq="held", **few)

    def _many(self, fixed: Mapping[str, Any], rows: int, few: int, **fields: Any) -> Iterator[Case]:
        """The case with many rows: few of them differ where rows are independent, in requests of 64 and what is left, unless
        a cache for so many requests is too large."""
        if self.contract.independent:
            batch = spelled([Request(q, q + 40) for q in parted(rows)]) if self.has_batch else ""
            if found := list(self._made(fixed, rows=rows, batch=batch, distinct=few, **fields)):
                return iter(found)
        batch = "" if not self.has_batch else "prefill" if self.contract.signature.mutated else CROWD
        return self._made(fixed, rows=rows, batch=batch, **fields)
