"""Which calls are tested: cases derived from a contract, and the token that replays one anywhere.

A plan varies one thing at a time around a small home call, and once takes GLM-5's own dims. Levels only differ in how
many of these variations meet how many dtypes and row counts; a case does not know the level it came from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from types import SimpleNamespace
from typing import Any, Literal

from porthal.conformance.values import RECIPES
from porthal.hal import UsageError, contracts
from porthal.hal.contract import Contract
from porthal.hal.signature import OperandSpec, evaluate, symbols

Level = Literal["bring-up", "standard", "strict"]
LEVELS: tuple[Level, ...] = ("bring-up", "standard", "strict")
ROWS = {
    "bring-up": (0, 1, 2, 17),
    "standard": (0, 1, 2, 7, 16, 17, 255, 256, 257),
    "strict": (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025),
}
MANY_ROWS = 65536  # where 16-bit row counters and launch grids overflow
HOME_ROWS = 7
# Logical elements of all operands and results: what a level is ready to generate and judge in one case.
SIZE = {"bring-up": 2**22, "standard": 2**25, "strict": 2**26}
VIEWS = ("columns", "rows", "transposed", "broadcast")
SELECTIONS = ("full", "short", "empty")
COMPOSITIONS = ("decode", "prefill", "chunked", "mixed", "padded", "idle", "deep", "long")
BLOCK_SIZES = (64, 128)
PAGES = 6  # of a cache that no batch describes
FAULTS = ("dtype", "shape", "kind", "attribute", "range")
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_LONG = {v: k for k, v in _SHORT.items()}
Combo = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One concrete call: everything its inputs are a function of.

    dims     the symbols that the batch does not bind, T among them
    attrs    attributes that differ from their defaults
    dtypes   per operand; operands not named here follow their contract's first option
    recipes  operand -> value recipe, where it is not the first of the contract's
    absent   optional operands and page fields that are left out
    fault    a deliberate mistake, to which the checked binding must answer with a UsageError
    """

    op: str
    dims: tuple[tuple[str, int], ...] = ()
    attrs: tuple[tuple[str, Any], ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    recipes: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()
    batch: str = ""
    block_size: int = 0
    view: str = ""
    fault: str = ""
    seed: int = 0

    @property
    def contract(self) -> Contract:
        return contracts()[self.op]

    @property
    def token(self) -> str:
        """The case as text: "rms_norm,T=7,H=96,x:bf16,x~small,view=columns,0"."""
        parts = [self.op]
        parts += [f"{k}={v}" for k, v in self.dims]
        parts += [f"{k}={v}" for k, v in self.attrs]
        parts += [f"{k}:{_SHORT.get(v, v)}" for k, v in self.dtypes]
        parts += [f"{k}~{v}" for k, v in self.recipes]
        parts += [f"-{k}" for k in self.absent]
        named = ("batch", self.batch), ("block_size", self.block_size), ("view", self.view), ("fault", self.fault)
        parts += [f"{k}={v}" for k, v in named if v]
        return ",".join([*parts, str(self.seed)])

    @classmethod
    def from_token(cls, token: str) -> Case:
        """The case a token describes; UsageError where it is none."""
        op, *parts = token.split(",")
        if op not in contracts() or not parts or not parts[-1].isdigit():
            raise UsageError(f"{token!r} is no case token: expected op,name=value,...,seed as a report prints it")
        contract = contracts()[op]
        found: dict[str, list[Any]] = {k: [] for k in ("dims", "attrs", "dtypes", "recipes", "absent")}
        named: dict[str, Any] = {}
        known = {o.name for o in contract.signature.operands}
        for part in parts[:-1]:
            name, mark, value = _cut(part)
            if mark == "-":
                found["absent"].append(name)
            elif mark == ":" and name in known:
                found["dtypes"].append((name, _LONG.get(value, value)))
            elif mark == "~" and name in known and value in (*RECIPES, *SELECTIONS):
                found["recipes"].append((name, value))
            elif mark == "=" and name in ("batch", "view", "fault"):
                named[name] = value
            elif mark == "=" and name == "block_size" and value.isdigit():
                named[name] = int(value)
            elif mark == "=" and name in contract.attributes:
                found["attrs"].append((name, _parsed(contract.attributes[name].type, value, part)))
            elif mark == "=" and value.isdigit():
                found["dims"].append((name, int(value)))
            else:
                raise UsageError(f"case token part {part!r} says nothing about {op}: copy the token from a report")
        return cls(op, seed=int(parts[-1]), **{k: tuple(v) for k, v in found.items()}, **named)

    def recipe(self, operand: str) -> str:
        return dict(self.recipes).get(operand) or options(self.contract, operand)[0]

    def dtype(self, operand: str) -> str:
        """An operand's dtype: given, or the contract's first option resolved."""
        given = dict(self.dtypes)
        name = operand
        while name in self.contract.dtypes and name not in given:
            name = self.contract.dtypes[name][0]
        return given.get(name, name)


def _cut(part: str) -> tuple[str, str, str]:
    if part.startswith("-"):
        return part[1:], "-", ""
    for mark in "=:~":
        name, found, value = part.partition(mark)
        if found:
            return name, mark, value
    return part, "", ""


def _parsed(kind: type, text: str, part: str) -> Any:
    try:
        return text == "True" if kind is bool else kind(text)
    except ValueError:
        raise UsageError(f"case token part {part!r} has no {kind.__name__}: copy the token from a report") from None


def options(contract: Contract, operand: str) -> Sequence[str]:
    """The recipes of an operand, the default first."""
    spec = contract.signature[operand]
    if operand in contract.values:
        return contract.values[operand]
    if spec.kind == "Selection":
        return SELECTIONS
    if operand in contract.ranges:
        return ("index",)
    return ("weight",) if spec.kind == "Weight" else ("normal",)


# -- the plan --------------------------------------------------------------------------------------------------------


def cases(contract: Contract, level: Level = "bring-up", dtypes: Sequence[str] | None = None) -> list[Case]:
    """The cases of one contract at a level, in order, each once; `dtypes` keeps those whose first float is among them."""
    if level not in LEVELS:
        raise UsageError(f"unknown level {level!r}: expected one of {', '.join(LEVELS)}")
    plan = _Plan(contract, level)
    found: dict[str, Case] = {}
    for case in plan.cases():
        if dtypes is None or not (first := _first_float(contract)) or case.dtype(first) in dtypes:
            found.setdefault(case.token, case)
    return list(found.values())


class _Plan:
    def __init__(self, contract: Contract, level: Level) -> None:
        self.contract, self.level = contract, level
        operands = contract.signature.operands
        results = contract.signature.results
        self.sized = {s for o in (*operands, *results) for d in o.dims for s in symbols(d)}
        self.has_batch = any(o.kind == "Batch" for o in operands)
        self.has_pages = any(o.kind == "Pages" for o in operands)
        bound = {d for o in operands if o.kind == "Batch" for d in o.dims}
        in_shapes = {s for o in operands for d in (*o.dims, *(w for _, w, _ in o.fields)) for s in symbols(d)}
        self.free = [s for s in contract.cases if s in in_shapes - bound and s not in contract.attributes]
        # Symbols that shapes use and `cases` does not list: the rows, where nothing else is one.
        self.rows = "T" if "T" in in_shapes else next((s for s in self.free if s in ("M", "R")), "")
        self.attrs = [s for s in contract.cases if s in contract.attributes]
        self.first = _first_float(contract)
        self.combos = _combos(contract)
        self.few, self.turn = level == "bring-up", 0

    def cases(self) -> Iterator[Case]:
        yield from self._served()
        for combo in self.combos:
            yield from self._made(dtypes=combo)
        yield from self._sizes()
        yield from self._forms()
        if self.has_batch or self.has_pages:
            yield from self._batches()
        if self.level == "strict":
            for seed, combo in product((1, 2, 3), self.combos):
                yield from self._made(rows=65, dtypes=combo, seed=seed)
        for fault in FAULTS:
            yield from self._made(fault=fault, dtypes=self._next())

    def _served(self) -> Iterator[Case]:
        """GLM-5's dims, in its dtype or in every one, over a cache longer than top-k; pairs of other attributes there."""
        bases = [c for c in self.combos if len(c) <= 1]
        if self.few:
            bases = [c for c in bases if dict(c).get(self.first, "bfloat16") == "bfloat16"]
        dims = {s: self.contract.cases[s][0] for s in self.free if s != self.rows}
        attrs = {a: self.contract.cases[a][0] for a in self.attrs}
        deep = "deep" if self.has_batch and "k" in self.contract.cases else ""
        for combo, rows in product(bases, (2,) if self.few else (1, 16)):
            yield from self._made(dims | attrs, rows=rows, dtypes=combo, batch=deep)
        for pair in combinations(self.attrs, 2):  # some act together only
            yield from self._made(dims | {a: self.contract.cases[a][-1] for a in pair}, dtypes=self._next())

    def _sizes(self) -> Iterator[Case]:
        """Row counts, then every value of every dim and attribute."""
        for rows in ROWS[self.level]:
            for combo in self._each():
                yield from self._made(rows=rows, dtypes=combo)
        if not self.few:
            least = {s: min(self.contract.cases[s]) for s in self.free if s != self.rows}
            batch = "" if not self.has_batch else "prefill" if self.contract.signature.mutated else "crowd"
            for rows in (MANY_ROWS - 1, MANY_ROWS):
                yield from self._made(least, rows=rows, dtypes=self._next(), batch=batch)
        for name in (*self.free, *self.attrs):
            for value in self.contract.cases[name]:
                for combo in self._each():
                    yield from self._made({name: value}, rows=3, dtypes=combo)

    def _forms(self) -> Iterator[Case]:
        """Values, views, and optional operands left out."""
        for recipes in self._recipes():
            for rows in (HOME_ROWS,) if self.few else (HOME_ROWS, 256):
                for combo in self._each():
                    yield from self._made(recipes=recipes, dtypes=combo, rows=rows)
        for view in VIEWS:
            for combo in self._each():
                yield from self._made(view=view, dtypes=combo)
        for absent in _absences(self.contract):
            for combo in self._each():
                yield from self._made(absent=absent, dtypes=combo)

    def _batches(self) -> Iterator[Case]:
        """Batch compositions and page sizes."""
        for batch, size in product(COMPOSITIONS if self.has_batch else ("",), BLOCK_SIZES):
            for rows in (HOME_ROWS,) if self.few else (HOME_ROWS, 33):
                for combo in self._each():
                    yield from self._made(batch=batch, block_size=size, dtypes=combo, rows=rows)

    def _next(self) -> Combo:
        """The dtypes that are next in turn."""
        self.turn += 1
        return self.combos[self.turn % len(self.combos)]

    def _each(self) -> list[Combo]:
        """All dtypes, or at bring-up the next in turn."""
        return [self._next()] if self.few else self.combos

    def _made(self, fixed: Mapping[str, Any] | None = None, rows: int = HOME_ROWS, **fields: Any) -> Iterator[Case]:
        """The case with these values, everything else at home; nothing where no legal or affordable one exists."""
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
            case = replace(case, block_size=BLOCK_SIZES[0])
        if possible(case) and elements(case) <= SIZE[self.level]:
            yield case

    def _legal(self, fixed: dict[str, Any], rows: int) -> dict[str, Any] | None:
        """Values for every dim and attribute that fulfil the contract's rules, as near home as those allow."""
        fixed = {self.rows: rows, **fixed} if self.rows else fixed
        names = [s for s in (*self.free, *self.attrs) if s not in fixed]
        for values in product(*(self._near(s) for s in names)):
            facts = {**fixed, **dict(zip(names, values))}
            defaults = {a.name: a.default for a in self.contract.attributes.values()}
            if all(holds(SimpleNamespace(**{**defaults, **facts})) for _, holds in self.contract.rules):
                return facts
        return None

    def _near(self, name: str) -> list[Any]:
        """A symbol's values, home first: the smallest size of at least 8, the first of other attributes."""
        values = list(self.contract.cases[name])
        if name in self.sized:
            values.sort(key=lambda v: (v < 8, v))
        return values

    def _recipes(self) -> Iterator[tuple[tuple[str, str], ...]]:
        """One recipe at a time, in every operand that lists it; integers everywhere, so that results are exact."""
        names = [o.name for o in self.contract.signature.operands if o.kind != "Batch"]
        others = {r: None for n in names for r in options(self.contract, n)[1:]}
        for chosen in others:
            taken = [(n, chosen) for n in names if chosen in options(self.contract, n)]
            if chosen == "integer":
                taken = [(n, chosen) for n in names if _takes_integers(self.contract, n)]
            yield tuple(taken)


def _takes_integers(contract: Contract, operand: str) -> bool:
    plain = options(contract, operand)[0] in ("normal", "weight")
    return plain and contract.signature[operand].kind in ("array", "Weight", "Pages")


def _first_float(contract: Contract) -> str:
    """The operand whose dtype the others follow, or "" where the contract fixes every dtype."""
    return next((o.name for o in contract.signature.operands if len(_choices(contract, o)) > 1), "")


def _choices(contract: Contract, operand: OperandSpec) -> tuple[str, ...]:
    return contract.dtypes.get(operand.name, ())


def _combos(contract: Contract) -> list[Combo]:
    """Every base dtype with all operands following it, then with those that may differ doing so."""
    first = _first_float(contract)
    if not first:
        return [()]
    bases = _choices(contract, contract.signature[first])
    found: list[Combo] = [((first, base),) for base in bases]
    for base in bases:
        other = []
        for operand in contract.signature.operands:
            if operand.name != first and len(choices := _choices(contract, operand)) > 1:
                last = base if choices[-1] == first else choices[-1]
                if last != (base if choices[0] == first else choices[0]):
                    other.append((operand.name, last))
        if other:
            found.append(((first, base), *other))
    return found


def _absences(contract: Contract) -> list[tuple[str, ...]]:
    """Each optional operand left out, together with the optional page fields of the same width."""
    operands = contract.signature.operands
    fields = {width: name for o in operands for name, width, optional in o.fields if optional}
    found = []
    for operand in operands:
        if operand.optional:
            found.append((operand.name, *(fields.pop(d) for d in operand.dims if d in fields)))
    return [*found, *((name,) for name in fields.values())]


# -- what a case needs -----------------------------------------------------------------------------------------------


def possible(case: Case) -> bool:
    """Whether the contract allows this combination at all."""
    contract, sizes = case.contract, dict(case.dims)
    operands = contract.signature.operands
    has_pages = any(o.kind == "Pages" for o in operands)
    batch = next((o for o in operands if o.kind == "Batch"), None)
    if batch and (case.batch == "long" and (has_pages or len(batch.dims) > 1)):
        return False  # 128k positions are for ops that need no cache of that length
    if batch and case.batch == "deep" and "k" not in sizes and "k" not in dict(case.attrs):
        return False
    if case.fault == "range":
        return any(_wide_enough(contract, n, sizes) for n in contract.ranges)
    if case.fault == "attribute":
        return bool(contract.attributes)
    for name, (low, high) in contract.ranges.items():
        if low == 0 and sizes.get(str(high)) == 0 and _wide_enough(contract, name, sizes):
            return False  # an index into nothing
    return not any(s == 0 for n, s in sizes.items() if n in ("P", "V", "E"))


def _wide_enough(contract: Contract, name: str, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(s, 1) for d in contract.signature[name].dims for s in symbols(d))


def elements(case: Case) -> int:
    """About how many numbers a case's operands and results hold."""
    longest = 70 if case.batch == "crowd" else 300
    sizes: dict[str, int] = {"S": longest, "R": 8, **_whole(dict(case.attrs)), **dict(case.dims)}
    signature, count = case.contract.signature, 0
    for operand in (*signature.operands, *(r for r in signature.results if not r.mutated)):
        if operand.kind in ("array", "Weight", "Selection"):
            count += math.prod(evaluate(d, sizes) for d in operand.dims)
        elif operand.kind == "Pages":
            slots = sizes.get("T", 1) + 2 * PAGES * case.block_size + 2 * sizes.get("k", 0) * (case.batch == "deep")
            count += slots * sum(evaluate(w, sizes) for _, w, _ in operand.fields)
    return count


def _whole(attrs: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in attrs.items() if isinstance(v, int) and not isinstance(v, bool)}

