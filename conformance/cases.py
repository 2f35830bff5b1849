"""One call that is tested: the token that replays it anywhere, and what a contract allows in it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

from porthal.conformance.values import FLOATING, RELATED, Draw
from porthal.hal import UsageError, contracts
from porthal.hal.contract import Contract
from porthal.hal.signature import OperandSpec, evaluate, symbols

VIEWS = ("columns", "rows", "transposed", "broadcast")
FAR = "far"  # rows so far apart that byte offsets need more than 31 bits; takes 2 GiB of addresses, hence in few plans
BEYOND = "beyond"  # cache or expert weights behind 2^31 elements
THREADS = "threads"  # operands placed and the kernel called in several threads at once
SELECTIONS = ("full", "short", "empty")
COMPOSITIONS = ("decode", "prefill", "chunked", "mixed", "padded", "idle", "deep", "long")
CROWD = "crowd"
PAGES = 6  # of a cache that no batch describes
LONGEST = 131072
SHORT = 8  # query rows of a request that counts as decoding
FAULTS = ("dtype", "shape", "kind", "attribute", "range")
MOST = {"size": 2**20, "block_size": 1024, "seed": 2**32, "elements": 2**27}  # what a token may ask for
_REQUESTS = re.compile(r"\d{1,7}/\d{1,7}(/\d{1,7})?(\+\d{1,7}/\d{1,7}(/\d{1,7})?)*", re.ASCII)
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
    batch    a composition's name, or its requests: "1/5+4/130/1" has one of 1 query row that sees 5 keys and one of 4
             rows that sees 130 keys and shares its first page with the request before
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
        """The case a token describes; UsageError where it describes none that can be built."""
        op, *parts = token.split(",")
        if op not in contracts() or not parts or _number(parts[-1], MOST["seed"]) is None:
            raise UsageError(f"{token!r} is no case token: expected op,name=value,...,seed as a report prints it")
        contract = contracts()[op]
        found: dict[str, list[Any]] = {k: [] for k in ("dims", "attrs", "dtypes", "recipes", "absent")}
        named: dict[str, Any] = {}
        for part in parts[:-1]:
            name, mark, value = _cut(part)
            number = _number(value, MOST["size"])
            if mark == "-":
                found["absent"].append(name)
            elif mark == ":":
                found["dtypes"].append((name, _LONG.get(value, value)))
            elif mark == "~":
                found["recipes"].append((name, value))
            elif mark == "=" and name in ("batch", "view", "fault") and value and name not in named:
                named[name] = value
            elif mark == "=" and name == "block_size" and number and name not in named:
                named[name] = number
            elif mark == "=" and name in contract.attributes:
                found["attrs"].append((name, _parsed(contract.attributes[name].type, value, part)))
            elif mark == "=" and number is not None:
                found["dims"].append((name, number))
            else:
                raise UsageError(f"case token part {part!r} says nothing about {op}: copy the token from a report")
        case = cls(op, seed=int(parts[-1]), **{k: tuple(v) for k, v in found.items()}, **named)
        why = refusal(case)
        if not why and (n := elements(case)) > MOST["elements"]:
            why = f"it holds {n} numbers, expected at most {MOST['elements']}"
        if why:
            raise UsageError(f"case token {token!r} describes no call of {op}: {why}")
        return case

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


def _number(text: str, most: int) -> int | None:
    """A plain decimal number up to `most`, or None."""
    plain = text.isascii() and text.isdigit() and len(text) <= 12
    return number if plain and (number := int(text)) <= most else None


def _parsed(kind: type, text: str, part: str) -> Any:
    value: Any = text
    if kind is bool:
        value = {"True": True, "False": False}.get(text)
    elif kind is int:
        value = _number(text, MOST["size"])
    elif kind is float:
        plain = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", text, re.ASCII) and text.count(".") <= 1 and text != "."
        value = float(text) if plain and math.isfinite(float(text)) else None
    if value is None:
        raise UsageError(f"case token part {part!r} has no {kind.__name__} in range: copy the token from a report")
    return value


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


def fitting(contract: Contract, operand: str) -> Sequence[str]:
    """All recipes that make legal values of an operand: its options, and whatever else has their domain."""
    own = options(contract, operand)
    domain = FLOATING if own[0] in FLOATING else RELATED.get(own[0], ())
    return tuple(dict.fromkeys((*own, *domain)))


def first_float(contract: Contract) -> str:
    """The operand whose dtype the others follow, or "" where the contract fixes every dtype."""
    return next((o.name for o in contract.signature.operands if len(_choices(contract, o)) > 1), "")


def _choices(contract: Contract, operand: OperandSpec) -> tuple[str, ...]:
    return contract.dtypes.get(operand.name, ())


def combos(contract: Contract) -> list[Combo]:
    """Every base dtype with all operands following it, then with those that may differ doing so."""
    first = first_float(contract)
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


def absences(contract: Contract) -> list[tuple[str, ...]]:
    """Each optional operand left out, together with the optional page fields of the same width."""
    operands = contract.signature.operands
    fields = {width: name for o in operands for name, width, optional in o.fields if optional}
    found = []
    for operand in operands:
        if operand.optional:
            found.append((operand.name, *(fields.pop(d) for d in operand.dims if d in fields)))
    return [*found, *((name,) for name in fields.values())]


# -- what a case needs -----------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """Query rows, keys that the last of them sees, and how many leading pages are those of the request before."""

    q: int
    kv: int
    shared: int = 0


def requests(batch: str) -> list[Request] | None:
    """The requests that a composition spells out, or None where it is a name."""
    if not _REQUESTS.fullmatch(batch):
        return None
    return [Request(*map(int, r.split("/"))) for r in batch.split("+")]


def refusal(case: Case) -> str:
    """Why the contract allows no such call, or ""."""
    contract, sizes = case.contract, dict(case.dims)
    attrs = {a.name: a.default for a in contract.attributes.values()} | dict(case.attrs)
    for kind in ("dims", "attrs", "dtypes", "recipes"):
        names = [name for name, _ in getattr(case, kind)]
        if len(set(names)) < len(names):
            return f"one of {', '.join(names)} is given twice"
    if (lacking := [n for n, v in attrs.items() if v is inspect.Parameter.empty]) or (lacking := _unsized(case)):
        return f"it lacks {lacking[0]}"
    for name, size in sizes.items():
        if name not in _symbols(contract.signature.operands):
            return f"{name} is none of its sizes"
        if size == 0 and name != rows_symbol(contract) and 0 not in contract.cases.get(name, ()):
            return f"{name} is 0, expected at least 1"
    for check in (_refused_operands, _refused_batch, _refused_fault):
        if why := check(case):
            return why
    facts = SimpleNamespace(**attrs, **sizes)
    return next((f"it requires {sentence}" for sentence, holds in contract.rules if not holds(facts)), "")


def _refused_operands(case: Case) -> str:
    """What is wrong with dtypes, recipes, absences, the view, or the number of indices."""
    contract, sizes = case.contract, dict(case.dims)
    operands = {o.name: o for o in contract.signature.operands}
    for name, given in case.dtypes:
        permitted = [case.dtype(o) if o in operands else o for o in contract.dtypes.get(name, ())]
        if name not in operands or given not in permitted:
            return f"{name} as {given} is none of its dtypes"
    for name, given in case.recipes:
        if name not in operands or operands[name].kind == "Batch" or given not in fitting(contract, name):
            return f"{given} makes no {name}"
    groups = [set(group) for group in absences(contract)]
    left = set(case.absent) - set().union(*(g for g in groups if g <= set(case.absent)))
    if left or len(set(case.absent)) < len(case.absent):
        return f"{', '.join(case.absent)} cannot be left out"
    if case.view not in ("", *(known := (*VIEWS, FAR, BEYOND, THREADS))):
        return f"{case.view!r} is no view, expected one of {', '.join(known)}"
    kinds = {o.kind for o in operands.values()}
    if case.view == BEYOND and not ({"Pages", "Batch"} <= kinds or "counts" in operands):
        return "it has neither a cache that a batch describes nor experts' weights by counts"
    for name, (low, high) in contract.ranges.items():
        if low == 0 and sizes.get(str(high)) == 0 and _wide_enough(contract, name, sizes):
            return f"{name} has nothing to point to"
    return ""


def _refused_batch(case: Case) -> str:
    """What is wrong with the composition or the size of pages."""
    signature = case.contract.signature
    batch = next((o for o in signature.operands if o.kind == "Batch"), None)
    paged = any(o.kind == "Pages" for o in signature.operands)
    if bool(batch) != bool(case.batch):
        return "it lacks batch" if batch else "it takes no batch"
    if (paged or bool(batch)) != bool(case.block_size):
        return "it lacks block_size" if paged or batch else "it takes no block_size"
    if case.block_size > MOST["block_size"]:
        return f"block_size is {case.block_size}, expected at most {MOST['block_size']}"
    if not batch:
        return ""
    if (free := requests(case.batch)) is not None:
        return _refused_requests(free, dict(case.dims)["T"], case.block_size, written=bool(signature.mutated))
    if case.batch == "long" and (paged or len(batch.dims) > 1):
        return "128k positions are for ops that need no cache of that length"
    if case.batch == "deep" and "k" not in dict(case.dims) and "k" not in dict(case.attrs):
        return "deep batches are for ops with a k"
    if case.batch == CROWD and signature.mutated:
        return "crowds share pages, which cannot be written then"
    return "" if case.batch in (*COMPOSITIONS, CROWD) else f"{case.batch!r} is no composition"


def _refused_requests(found: Sequence[Request], T: int, block_size: int, written: bool) -> str:
    if sum(r.q for r in found) != T:
        return f"its requests have {sum(r.q for r in found)} query rows, expected T = {T}"
    if any(a.q > SHORT and b.q <= SHORT for a, b in pairwise(found)):
        return f"requests of at most {SHORT} query rows come first"
    if any(r.kv and r.kv < r.q for r in found) or max(r.kv for r in found) > LONGEST:
        return f"a request sees at least its own query rows, or nothing, and at most {LONGEST} keys"
    for before, request in pairwise((Request(0, 0), *found)):
        if request.shared > (most := shareable(before, request, block_size, written)):
            return f"a request shares {request.shared} pages with the one before, expected at most {most}"
    return ""


def shareable(before: Request, request: Request, block_size: int, written: bool) -> int:
    """Pages at most that a request may share with the one before: those filled before this step, where it writes."""
    new = [r.q * (written and r.kv > 0) for r in (before, request)]
    full = [(r.kv - q) // block_size if written else -(-r.kv // block_size) for r, q in zip((before, request), new)]
    return min(full)


def _refused_fault(case: Case) -> str:
    contract, sizes = case.contract, dict(case.dims)
    if case.fault == "range" and not any(_wide_enough(contract, n, sizes) for n in contract.ranges):
        return "it has no index that could be out of range"
    if case.fault == "attribute" and not contract.attributes:
        return "it has no attribute"
    return "" if case.fault in ("", *FAULTS) else f"{case.fault!r} is no fault, expected one of {', '.join(FAULTS)}"


def _symbols(operands: Sequence[OperandSpec]) -> set[str]:
    return {s for o in operands for d in (*o.dims, *(w for _, w, _ in o.fields)) for s in symbols(d)}


def free_symbols(contract: Contract) -> list[str]:
    """The sizes that a case chooses: not the batch's and no attributes."""
    operands = contract.signature.operands
    bound = {d for o in operands if o.kind == "Batch" for d in o.dims}
    return [s for s in contract.cases if s in _symbols(operands) - bound and s not in contract.attributes]


def _unsized(case: Case) -> list[str]:
    """Symbols in the shapes of present operands that neither dims nor attributes nor the batch bind."""
    operands = case.contract.signature.operands
    present = [
        replace(o, fields=tuple(f for f in o.fields if f[0] not in case.absent))
        for o in operands
        if o.name not in case.absent and o.kind != "Batch"
    ]
    bound = {d for o in operands if o.kind == "Batch" for d in o.dims if d != "T"}
    return sorted(_symbols(present) - bound - set(dict(case.dims)) - set(case.contract.attributes))


def rows_symbol(contract: Contract) -> str:
    """The symbol that counts rows: "T", or where nothing else is one "M" or "R"."""
    found = _symbols(contract.signature.operands)
    return "T" if "T" in found else next((s for s in contract.cases if s in found and s in ("M", "R")), "")


def _wide_enough(contract: Contract, name: str, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(s, 1) for d in contract.signature[name].dims for s in symbols(d))


def elements(case: Case) -> int:
    """About how many numbers a case's operands and results hold."""
    sizes: dict[str, int] = {**_whole(dict(case.attrs)), **dict(case.dims)}
    signature, count = case.contract.signature, sizes.get("T", 1) * sizes.get("E", 0)  # ids are drawn from E
    slots = held_pages(case) * case.block_size
    if any(o.kind == "Batch" for o in signature.operands):
        q_lens, kv_lens = lengths(case, sizes["T"], sizes.get("k", 0))
        sizes = {"R": len(q_lens), "S": max(kv_lens, default=0), **sizes}
        slots = max(slots, sum(kv_lens) + len(kv_lens) * case.block_size)
    for operand in (*signature.operands, *(r for r in signature.results if not r.mutated)):
        if operand.name in case.absent:
            continue
        if operand.kind in ("array", "Weight", "Selection"):
            count += math.prod(evaluate(d, sizes) for d in operand.dims)
        elif operand.kind == "Pages":
            count += slots * sum(evaluate(w, sizes) for f, w, _ in operand.fields if f not in case.absent)
    return count


def held_pages(case: Case) -> int:
    """Pages of a cache that no batch describes."""
    return max(PAGES, dict(case.dims).get("M", 0) + 2)


def lengths(case: Case, T: int, k: int) -> tuple[list[int], list[int]]:
    """Query and key lengths per request of a composition with T query rows."""
    if (free := requests(case.batch)) is not None:
        return [r.q for r in free], [r.kv for r in free]
    size, reach = case.block_size, min(k, 512)  # rows on both sides of a top-k's k
    drawn = Draw(f"{case.token}/kv", (max(T, 1),)).integers(1, 2 * size + 8 + reach).tolist()
    if case.batch == "decode":
        return [1] * T, drawn[:T]
    if case.batch == "prefill":
        return [T], [T]
    if case.batch == "chunked":
        return [T], [T + size + 5]
    if case.batch == "mixed":
        decoding = min(T // 2, 8)
        return [1] * decoding + [T - decoding], [*drawn[:decoding], T - decoding + 19 + reach]
    if case.batch == "padded":
        return [1] * T, [0 if r % 3 == 1 else n for r, n in enumerate(drawn[:T])]
    if case.batch == "idle":
        return [r % 2 for r in range(2 * T)], [0 if r % 4 == 0 else drawn[r // 2] for r in range(2 * T)]
    if case.batch == "deep":
        return [min(T, 1), max(T - 1, 0)], [k + 1, k + T + 3]
    if case.batch == "long":
        return [1] * T, [LONGEST - 977 * (r % 100) for r in range(T)]
    rows = [64] * (T // 64) + [T % 64] * (T % 64 > 0)  # crowd
    return rows, [n + r % 4 for r, n in enumerate(rows)]


def _whole(attrs: Mapping[str, Any]) -> dict[str, int]:
    return {k: v for k, v in attrs.items() if isinstance(v, int) and not isinstance(v, bool)}

