"""Where kernels break: the ends of a legal range, and both sides of the numbers at which tiles, counters and grids end.

What is counted in a call are its dims, the products of the leading dims of each operand (rows of a grid), requests, keys,
pages, columns of the block table and slots; elements of each operand are addresses. A boundary is covered by planned cases
on both sides; of a size that a case chooses these are near: more than half of it, and at most twice as much. Of what is left
the reason is one of REASONS.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import cycle, islice, product
from math import sqrt
from types import SimpleNamespace
from typing import Any

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import CROWD, LONGEST, Request, lengths, parted, spelled
from porthal.conformance.cases.copies import ALTERNATIVES, SHARED
from porthal.conformance.cases.cost import operations, seconds
from porthal.conformance.cases.domain import combos, first_float, free_symbols, options, per_expert
from porthal.conformance.cases.legal import PAGES, PAST_2G, copyable, elements, held_pages, refusal
from porthal.conformance.cases.profiles import FIXED, Profile
from porthal.conformance.level import Level
from porthal.hal.contract import Contract
from porthal.hal.dtypes import itemsize
from porthal.hal.signature import evaluate, symbols
from porthal.hal.spans import Reals, Span

TILES = (16, 32, 64, 128, 256)
GRIDS = (2**10, 2**11, 2**12, 2**15, 2**16, 2**17)
FIRST = (2**8, 2**10, 2**12, 2**16, 2**17)  # at bring-up: where most kernels break, crossed by one
WIDEST = 2**14  # of what is no vocabulary
UNEVEN = 48  # full tiles, but no power of two


def values(span: Span) -> list[Any]:
    """What a plan takes of all legal values: those of `ends`, and both sides of every boundary between."""
    if isinstance(span, Reals) or not isinstance(span[0], int):
        return ends(span)
    return list(dict.fromkeys([*ends(span), *(v for n in (*TILES, UNEVEN, *GRIDS) for v in beside(span, n))]))


def ends(span: Span) -> list[Any]:
    """The lowest, the highest, and an odd one in the middle; of words all."""
    if isinstance(span, Reals):
        return [span.low, span.high, float(f"{1.37 * sqrt(span.low * span.high):.3g}")]
    return list(dict.fromkeys([span[0], span[-1], middle(span)] if isinstance(span[0], int) else span))


def middle(span: Sequence[Any]) -> Any:
    """The first odd value from the middle on, or the middle one."""
    half = span[len(span) // 2 :]
    return next((v for v in half[:2] if v % 2), half[0])


def beside(span: Sequence[int], n: int) -> list[int]:
    """The last of rising values up to n and the first above, where there are both."""
    below = bisect_right(span, n)
    return [span[below - 1], span[below]] if 0 < below < len(span) else []


# -- what a call counts ------------------------------------------------------------------------------------------------

COUNTED = 2**24  # elements that float32 counts, and about as many as 65,535 blocks of 256 hold
ADDRESSES = (COUNTED, 2**31, 2**32)  # elements, also those behind which 32-bit offsets wrap
TELLING = ("special", "rim", "shelves", "outlier", "rear", "summit", "halved")
REQUESTS = 1024  # of one step at most,
ROWS = 2**17 + 1  # and rows, for ops that nothing else bounds
ILLEGAL, BEYOND, MEMORY, TIME = "illegal by the contract", "beyond the model", "over memory", "over time"
REASONS = (ILLEGAL, BEYOND, MEMORY, TIME)
WHOLE = 2**11  # rows, from which on one request does not have all of them
ALONE, LENIENT = 2.0, 3.0  # times what a level allows: for a size that nothing else has, for as many elements as are counted
STEP = "requests"  # of a batch
TABLE = "columns"  # of its block table


@lru_cache(maxsize=256)
def counts(contract: Contract) -> tuple[str, ...]:
    """Expressions in the symbols of a contract: sizes, and products of them by which a kernel counts."""
    found: list[str] = []
    for o in (*contract.signature.operands, *contract.signature.results):
        found += [*o.dims, _product(o.dims[:-1])] if o.kind != "Batch" else []
        found += [w for _, w, _ in o.fields]
    kinds = {o.kind for o in contract.signature.operands}
    found += [contract.rows, STEP, "S", TABLE] * ("Batch" in kinds) + ["P", "P*block_size"] * ("Pages" in kinds)
    found += ["block_size"] * ("block_size" in contract.legal)
    found += [_product(o.dims) for o in contract.signature.operands if contract.dtypes.get(o.name) == ("int32",)]
    return tuple(e for e in dict.fromkeys(found) if e)


@lru_cache(maxsize=256)
def addressed(contract: Contract) -> tuple[str, ...]:
    """Expressions of how many elements the operands and results have."""
    both = (*contract.signature.operands, *contract.signature.results)
    found = [_product(o.dims) for o in both if o.kind != "Batch" and len(o.dims) > 1]
    found += [_product(("P", "block_size", w)) for o in contract.signature.of_kind("Pages") for _, w, _ in o.fields]
    return tuple(dict.fromkeys(found))


def _product(dims: Sequence[str]) -> str:
    """The product of expressions, as a sum of products."""
    terms = [""]
    for dim in dims:
        terms = [f"{a}*{b.strip()}".lstrip("*") for a in terms for b in dim.split("+")]
    return "+".join(terms) if dims else ""


def sizes_of(case: Case) -> dict[str, int]:
    """The symbols of a case, those that its batch and its cache bind among them."""
    contract = case.contract
    env: dict[str, int] = {k: v for k, v in case.attributes.items() if type(v) is int} | dict(case.dims)
    size, pages = case.block_size, held_pages(case)
    if case.batch:
        q_lens, kv_lens = lengths(case.batch, env[contract.rows], env.get("k", 0), size, case.stream)
        need = [-(-n // size) for n in kv_lens]
        env |= {STEP: len(q_lens), "S": max(kv_lens, default=0), TABLE: max(need, default=0)}
        pages = sum(need) + 3
        if case.batch in (CROWD, "long"):
            pages = PAGES
        elif case.distinct:
            own = sum(n - max(kv - q, 0) // size for n, kv, q in zip(need, kv_lens, q_lens))
            pages = SHARED + own if contract.signature.mutated else ALTERNATIVES * max(need, default=0)
    return env | {"P": pages, "block_size": size}


# -- what is covered ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Boundary:
    """One number that something counted may cross: the first planned cases on both sides, or why there are none."""

    op: str
    what: str
    at: int
    below: str
    above: str
    reason: str

    @property
    def covered(self) -> bool:
        return bool(self.below and self.above)


class _Met:
    """What is counted in planned cases: per boundary the first case on each side."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.below: dict[tuple[str, int], str] = {}
        self.above: dict[tuple[str, int], str] = {}

    def add(self, case: Case) -> None:
        if case.fault:
            return
        env, token = sizes_of(case), case.token
        for what in counts(self.contract):
            if (v := _value(what, env)) is not None:
                near = what.isidentifier() and what != "P"
                for n in (*TILES, *GRIDS):
                    if v <= n and (n < 2 * v or not near):
                        self.below.setdefault((what, n), token)
                    if n < v and (v <= 2 * n or not near):
                        self.above.setdefault((what, n), token)
        for what in addressed(self.contract):
            far = case.view == PAST_2G and ("P" in symbols(what) or (per_expert(self.contract) and "E" in symbols(what)))
            v = (_value(what, env) or 0) + (ADDRESSES[1] if far else 0)
            for n in ADDRESSES:
                self.above.setdefault((what, n), token) if v > n else self.below.setdefault((what, n), token)


def _value(what: str, env: Mapping[str, int]) -> int | None:
    try:
        return evaluate(what, env)
    except KeyError:  # of what is left out
        return None


def most_of(contract: Contract, profile: Profile) -> dict[str, int]:
    """The largest size of each symbol in a model, for as many requests as are served at once."""
    most: dict[str, int] = {}
    for spec in profile.of(contract):
        for name, value in (*spec.dims.items(), *spec.attrs.items()):
            v = value[1] if isinstance(value, tuple) else value
            if type(v) is int:
                most[name] = max(most.get(name, 0), v)
    rows = contract.rows
    by_one = contract.signature.of_kind("Selection")  # whose rows are drawn one by one
    for symbol in filter(None, dict.fromkeys([rows, *contract.independent[:1]])):
        most[symbol] = max(most.get(symbol, 0), REQUESTS if by_one and symbol not in contract.independent else ROWS)
    size = most.get("block_size", 64)
    if contract.signature.of_kind("Batch"):
        most |= {STEP: REQUESTS, "S": max(most.get("S", 0), profile.context), TABLE: -(-profile.context // size)}
    most["P"] = REQUESTS * -(-profile.context // size)
    if "block_size" in contract.legal:
        most["block_size"] = max(most.get("block_size", 0), contract.legal["block_size"][-1])  # type: ignore[index]
    if "k" in most:
        most["k"] *= 4  # a new model may choose more
    varied = [s for s in free_symbols(contract) if s != "k" and (len(contract.cases[s]) > 1 or most.get(s, 0) > FIXED)]
    for s in [s for s in varied if s not in (rows, *contract.independent[:1]) and most.get(s, 0) <= WIDEST]:
        most[s] *= 2  # and be wider
    return {s: max(n, *contract.cases.get(s, (0,))) if s not in contract.attributes else n for s, n in most.items()}


def coverage(contract: Contract, level: Level, planned: Iterable[Case], profile: Profile) -> list[Boundary]:
    """Every boundary of everything that an op counts."""
    met, most = _Met(contract), most_of(contract, profile)
    for case in planned:
        met.add(case)
    found = []
    for names, numbers in ((counts(contract), (*TILES, *GRIDS)), (addressed(contract), ADDRESSES)):
        for what in names:
            for n in numbers:
                below, above = met.below.get((what, n), ""), met.above.get((what, n), "")
                reason = "" if below and above else _reason(contract, level, what, n, bool(above), most)
                found.append(Boundary(contract.name, what, n, below, above, reason))
    return found


def _reason(contract: Contract, level: Level, what: str, n: int, above: bool, most: Mapping[str, int]) -> str:
    """Why no case lies on both sides of a number, or "" where one could."""
    if what == "block_size" and n >= most[what]:
        return f"{ILLEGAL}: at most {most[what]}"
    largest = _value(what, most)
    if largest is None or largest <= n:
        return f"{BEYOND}: at most {largest or 1}"
    first = first_float(contract)
    bytes_of = itemsize(contract.dtypes[first][1] if first else "float32")
    if n in ADDRESSES and n * bytes_of > level.copied * 4:
        return f"{MEMORY}: {n * bytes_of / 2**30:.0f} GiB"
    case = next(_joint(contract, _crossing(what, n, most)), None)
    if case is None:
        return ""
    if elements(case) > level.copied:
        return f"{MEMORY}: {elements(case) * 2 / 2**30:.1f} GiB"
    return f"{TIME}: {operations(case) / 1e9:.1f} GFLOP" if seconds(case) > level.seconds else ""


# -- cases for what is not ---------------------------------------------------------------------------------------------


def boundary_cases(contract: Contract, level: Level, planned: Iterable[Case], profile: Profile) -> Iterator[Case]:
    """Cases at the boundaries that no other planned case covers: at them and one above, as many sizes in one call as a level
    can afford; in all dtypes in turn."""
    met, most, turn = _Met(contract), most_of(contract, profile), cycle(combos(contract))
    recipes = cycle(telling(contract))
    for case in planned:
        met.add(case)
    for case in _wanted(contract, level, met, most):
        met.add(case)
        yield replace(case, dtypes=next(turn), recipes=next(recipes))


def telling(contract: Contract) -> list[tuple[tuple[str, str], ...]]:
    """Values in turn, in the first operand that lists some: the default, and those by which a column, a tie or a number that
    is none is seen wherever it stands; always these where the result is an id."""
    first = next(o.name for o in contract.signature.operands if o.kind != "Batch")
    listed: list[tuple[tuple[str, str], ...]] = [((first, recipe),) for recipe in TELLING if recipe in options(contract, first)]
    ids = contract.choice or (contract.exact and contract.dtypes.get(contract.signature.results[0].name) == ("int32",))
    return listed if ids and listed else [(), *listed]


def _wanted(contract: Contract, level: Level, met: _Met, most: Mapping[str, int]) -> Iterator[Case]:
    named = [s for s in _chosen(contract) if s in most]
    if level.thorough:
        yield from islice(_joint(contract, dict.fromkeys(named, 2)), 1)
    for n in (*TILES, *GRIDS) if level.thorough else FIRST:
        more = 1 if level.thorough or n in FIRST[::2] else 3  # a tail of one, or of nearly half of what is loaded at once
        for v, there in ((n, met.below), (n + more, met.above))[not level.thorough :]:
            yield from _afforded(contract, level, [s for s in named if (s, n) not in there and v <= most[s]], v)
    for what, n in product(counts(contract), (*TILES, *GRIDS) if level.thorough else FIRST[-2:-1]):
        if not what.isidentifier() and (what, n) not in met.above and (_value(what, most) or 0) > n:
            yield from (c for c in islice(_joint(contract, _crossing(what, n, most)), 1) if _cheap(c, level, LENIENT))
    for what in addressed(contract):
        if (what, COUNTED) not in met.above and (_value(what, most) or 0) > COUNTED:
            yield from (c for c in islice(_joint(contract, _crossing(what, COUNTED, most)), 1) if _cheap(c, level, LENIENT))
    for what in counts(contract) if level.thorough else ():
        if (what, TILES[0]) in met.above and (what, TILES[0]) not in met.below and not what.isidentifier():
            yield from islice(_joint(contract, dict.fromkeys((contract.rows, *symbols(what)), 1)), 1)


def _crossing(what: str, n: int, most: Mapping[str, int]) -> dict[str, int]:
    """Sizes that bring an expression just above a number: the largest of them as small as the others allow."""
    used = sorted(dict.fromkeys(symbols(what)), key=lambda s: most[s])
    sizes = {s: min(most[s], n + 1) for s in used[:-1]}
    none, one = (evaluate(what, {**sizes, used[-1]: v}) for v in (0, 1))
    return {**sizes, used[-1]: max(1, -(-(n + 1 - none) // (one - none)))}


def _cheap(case: Case, level: Level, times: float = 1.0) -> bool:
    return seconds(case) <= times * level.seconds and elements(case) <= level.copied


def _afforded(contract: Contract, level: Level, wanted: list[str], v: int) -> Iterator[Case]:
    if not wanted:
        return
    for case in _joint(contract, dict.fromkeys(wanted, v)):
        if _cheap(case, level, 1.0 if wanted[1:] else ALONE):
            yield case
            return
    if len(wanted) > 1:
        half = len(wanted) // 2
        yield from _afforded(contract, level, wanted[:half], v)
        yield from _afforded(contract, level, wanted[half:], v)


def _chosen(contract: Contract) -> list[str]:
    """The symbols that a case may choose."""
    batch = [STEP, "S", TABLE] * bool(contract.signature.of_kind("Batch")) + ["P"] * bool(contract.signature.of_kind("Pages"))
    counted = [e for e in counts(contract) if e in contract.attributes]
    return list(dict.fromkeys([contract.rows, *free_symbols(contract), *counted, *batch]))


def _joint(contract: Contract, wanted: Mapping[str, int]) -> Iterator[Case]:
    """Calls with these sizes, or the next ones that rules allow, and all others small."""
    least = {s: min((v for v in contract.cases[s] if v), default=1) for s in free_symbols(contract)}
    few = 4 if copyable(contract) and max(wanted.values()) > 4 else 0
    for more in (0, 1, 3):
        sizes = {s: v + more * (v % 2) if s != contract.rows else v for s, v in wanted.items()}
        dims = {s: sizes.get(s, least[s]) for s in free_symbols(contract) if s != contract.rows}
        listed = {a.name: contract.cases.get(a.name, (a.default,)) for a in contract.attributes.values()}
        facts = {a: min(values) if a in contract.legal and type(values[0]) is int else values[0]
                 for a, values in listed.items()}  # fmt: skip
        facts |= {a: sizes[a] for a in contract.attributes if a in sizes}
        for name in contract.legal:
            if name in contract.attributes and name not in sizes:
                span = contract.allowed(name, SimpleNamespace(**facts, **dims))
                if facts[name] not in span and not isinstance(span, Reals) and len(span):
                    facts[name] = span[-1]
        size, batch, rows = 0, "", sizes.get(contract.rows, 3)
        if "block_size" in contract.legal:
            size = sizes.get("block_size", 16 if contract.signature.of_kind("Batch") and "P" not in sizes else 1)
        if contract.signature.of_kind("Batch"):
            pages = -(-sizes.get("P", 0) // ALTERNATIVES)
            keys = max(sizes.get("S", 9), sizes.get("k", 0) + 9, size * max(sizes.get(TABLE, 0), pages))
            step = sizes.get(STEP, 0)
            rows = max(rows, step)
            if contract.signature.mutated and "P" in sizes:  # what is written lies in pages of its own
                rows, step = max(rows, size * (sizes["P"] - SHARED)), max(step, 1)
            batch = spelled(_requests(rows, min(keys, LONGEST), step))
        elif "P" in sizes:
            rows = max(rows, sizes["P"] - 2)
        attributes = contract.attributes
        case = Case(
            contract.name,
            tuple((s, v) for s, v in {contract.rows: rows, **dims}.items() if s),
            tuple((a, attributes[a].type(v)) for a, v in facts.items() if v != attributes[a].default),
            batch=batch,
            block_size=size,
            distinct=few,
        )
        if not refusal(case):
            yield case


def _requests(rows: int, keys: int, count: int) -> list[Request]:
    """As many requests, or any number of them, with so many rows; the last one sees the keys."""
    if count:
        return [*[Request(1, 9)] * (count - 1), Request(rows - count + 1, max(keys, rows - count + 1))]
    if rows < WHOLE:  # behind one that sees few keys
        return [Request(1, min(9, keys))] * (rows > 1) + [Request(max(rows - 1, 1), max(keys, rows))]
    *found, last = (Request(q, max(9, q)) for q in parted(rows))
    return [*found, last._replace(kv=max(keys, last.q))]
