"""Calls in the sizes in which a model lives: its own widths, and the batches and contexts that it is served with.

A profile is what a model calls (`porthal.model.load.profile`). A regime is a step's requests; the profile of a step of any
requests follows, since rows scale with them. Each call is one of copies (see `copies`), made as large as its level's time
and memory allow: where that is less than the model, `Cut` says of what and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from porthal.conformance.cases.case import Case
from porthal.conformance.cases.compositions import Request, requests, spelled
from porthal.conformance.cases.cost import seconds
from porthal.conformance.cases.domain import first_float
from porthal.conformance.cases.legal import elements, refusal
from porthal.conformance.level import Level
from porthal.hal import CallSpec, UsageError
from porthal.hal.contract import Contract
from porthal.model import profiles as here

BLOCK_SIZE = 64
MODEL = "glm-5"  # whose sizes are tested where no other model is named
FIXED = 512  # widths up to here are inside a head, which vendors' kernels are made for; but heads and experts vary
LEAST = 64  # and of experts, of which there may be so many that none can be wide
WORDS = 2**16
COUNTS = 256  # dims up to here count heads, experts, or what one of them holds
DISTINCT = "distinct rows"
PREFERRED = 0.6  # as if that cost so much less: fewer distinct rows take nothing from the kernel
LENIENT = 9  # times what a level allows, for a call that cannot be made smaller
FEW = {"bring-up": 8, "standard": 16, "strict": 32}  # distinct rows


@dataclass(frozen=True)
class Profile:
    """What a model calls, by op, and how long its contexts may be."""

    name: str
    calls: tuple[tuple[str, tuple[CallSpec, ...]], ...]
    context: int

    def of(self, contract: Contract) -> tuple[CallSpec, ...]:
        """The calls of an op; where the model makes none, one in the first sizes that the contract lists."""
        return dict(self.calls).get(contract.name) or (_listed(contract),)


@dataclass(frozen=True)
class Cut:
    """A call of a profile that is made smaller: the size it has in the model, and the one it is tested at."""

    op: str
    name: str
    wanted: int
    made: int
    why: str


def profile_of(model: str | Path = MODEL) -> Profile:
    """The profile of a model's directory, or of one of those that are known by name; UsageError for another family."""
    return _profile(Path(model))


def home_of(model: Path = Path(MODEL)) -> Path:
    """The directory of a model's config, which may be that of a published one known by its name."""
    known = Path(here.__path__[0]) / model.name
    directory = known if len(model.parts) == 1 and not model.exists() and known.is_dir() else model
    if not (directory / "config.json").is_file():
        names = ", ".join(sorted(p.name for p in Path(here.__path__[0]).iterdir() if p.is_dir() and p.name != "__pycache__"))
        raise UsageError(f"{model} holds no config.json: expected a model directory, or one of {names}")
    return directory


@lru_cache(maxsize=8)
def _profile(model: Path) -> Profile:
    from porthal.model.config import Config
    from porthal.model.load import profile

    config = Config.read(home_of(model)).shallow()
    calls = profile(config, "bfloat16")
    return Profile(model.name, tuple((op, tuple(specs)) for op, specs in calls.items()), config.max_position_embeddings)


def _listed(contract: Contract) -> CallSpec:
    dims = {s: values[0] for s, values in contract.cases.items() if s not in contract.attributes}
    attrs = {a.name: contract.cases.get(a.name, (a.default,))[0] for a in contract.attributes.values()}
    return CallSpec({**dims, contract.rows: (1, 2)}, {}, attrs, {})


# -- regimes -----------------------------------------------------------------------------------------------------------


def regimes(level: Level, context: int) -> list[str]:
    """The requests of the steps that a level tests, as compositions: contexts end at the model's own."""
    found = []
    for batch in level.regimes:
        known = requests(batch)
        assert known
        found.append(spelled([Request(r.q, min(r.kv, context) if r.kv else 0) for r in known if r.q <= context]))
    return list(dict.fromkeys(found))


def profile_cases(contract: Contract, level: Level, profile: Profile) -> Iterator[tuple[Case, list[Cut]]]:
    """The calls of an op at a level, each once, with what was cut from them. An op whose rows alone count meets each of its
    shapes in some regimes, all in turn, and in all at the thorough end; one that sees contexts meets all regimes. Where every
    call is over the time of a level, the cheapest stands for all."""
    if not contract.independent:
        return
    seen: set[str] = set()
    over: list[tuple[float, str, Case, list[Cut]]] = []
    for at, spec in enumerate(profile.of(contract)):
        batches = regimes(level, profile.context)
        if not contract.signature.of_kind("Batch"):
            batches = [b for n, b in enumerate(batches) if n % level.turns == at % level.turns]
        for batch in batches:
            for kept in _variants(contract, spec):
                case, cuts = _affordable(contract, spec, batch, level, kept)
                if case and (price := _price(case, level)) >= LENIENT:
                    over.append((price, case.token, case, cuts))
                elif case and case.token not in seen:
                    seen.add(case.token)
                    yield case, cuts
                if case and not any(c.name in spec.dims for c in cuts):
                    break  # no dim was cut that the other variant would keep
    if over and not seen and elements(min(over)[2]) <= LENIENT * level.copied:
        yield min(over)[2:]


def _variants(contract: Contract, spec: CallSpec) -> list[frozenset[str]]:
    """Dims that are kept whole while others are cut: heads, experts and other counts; then the longest dim."""
    fixed = {s: n for s in _sizes(contract, spec) if isinstance(n := spec.dims[s], int)}
    if not fixed:
        return [frozenset()]
    counts, longest = frozenset(s for s, n in fixed.items() if n <= COUNTS), frozenset([max(fixed, key=lambda s: fixed[s])])
    return [longest, counts] if _vast(fixed) else [counts, longest]


def _vast(dims: Mapping[str, int]) -> bool:
    """Whether there are so many experts or words of a vocabulary that nothing beside them can be wide."""
    return "E" in dims or max(dims.values(), default=0) > WORDS


def _sizes(contract: Contract, spec: CallSpec) -> list[str]:
    """The symbols that a case states: neither the batch's nor attributes."""
    bound = {d for o in contract.signature.of_kind("Batch") for d in o.dims} | {"block_size", "P"}
    return [s for s in spec.dims if s not in bound and s != contract.rows and s not in contract.attributes]


def _affordable(
    contract: Contract, spec: CallSpec, batch: str, level: Level, kept: frozenset[str]
) -> tuple[Case | None, list[Cut]]:
    """The call in this regime, made smaller, step by step, where it helps most, until it is within time and memory."""
    found = list(requests(batch) or ())
    dims = {s: n for s in _sizes(contract, spec) if isinstance(n := spec.dims[s], int)}
    few = 4 * FEW[level.name] if "E" in dims else FEW[level.name]  # so that most of the experts are chosen
    case = _case(contract, spec, found, dims, few)
    if refusal(case):
        return None, []
    cuts: dict[str, Cut] = {}
    while (cost := seconds(case)) > level.seconds or elements(case) > level.copied:
        why = "time" if cost > level.seconds else "memory"
        smaller = list(_smaller(contract, found, dims, few, kept))
        options = [_case(contract, spec, f, d, n) for _, f, d, n in smaller]
        now, prices = _price(case, level), [_price(c, level) for c in options]
        shown = [price * (PREFERRED if options[n].distinct < few else 1) for n, price in enumerate(prices)]
        cheaper = sorted((shown[n], n) for n, price in enumerate(prices) if price < now * 0.95)
        best = next((n for _, n in cheaper if not refusal(options[n])), -1)
        if best < 0:
            break
        before, case = (found, dims), options[best]
        name, found, dims, few = smaller[best]
        if name == DISTINCT:  # takes nothing from the kernel
            continue
        wanted, made = _sized(name, *before), _sized(name, found, dims)
        cuts[name] = Cut(contract.name, name, cuts[name].wanted if name in cuts else wanted, made, why)
    return case, list(cuts.values())


def _price(case: Case, level: Level) -> float:
    """Time and memory of a case in those that a level allows."""
    return seconds(case) / level.seconds + elements(case) / level.copied


def _sized(name: str, found: Sequence[Request], dims: Mapping[str, int]) -> int:
    if name == "requests":
        return len(found)
    if name == "query rows":
        return max((r.q for r in found), default=0)
    return max((r.kv for r in found), default=0) if name == "context" else dims[name]


def _smaller(
    contract: Contract, found: list[Request], dims: dict[str, int], few: int, kept: frozenset[str]
) -> Iterator[tuple[str, list[Request], dict[str, int], int]]:
    """Every way to halve one thing: what is named is made smaller."""
    if few > 2:
        yield DISTINCT, found, dims, few // 2
    most, n = Counter(found).most_common(1)[0]
    if n > 2:
        left = iter(range(n))
        yield "requests", [r for r in found if r != most or next(left) < n // 2], dims, few
    longest = max(r.kv for r in found)
    if contract.signature.of_kind("Batch") and longest > 1024:
        yield "context", [r._replace(kv=max(longest // 2, r.q)) if r.kv == longest else r for r in found], dims, few
    rows = max(r.q for r in found)
    if rows > 16:
        yield "query rows", [r._replace(q=rows // 2) if r.q == rows else r for r in found], dims, few
    for symbol, size in dims.items():
        varies = (size > (LEAST if _vast(dims) else FIXED) and symbol != "k") or (symbol in ("E", "N") and size >= 16)
        if varies and symbol not in kept:
            yield symbol, found, {**dims, symbol: size // 2}, few


def _case(contract: Contract, spec: CallSpec, found: Sequence[Request], dims: Mapping[str, int], few: int) -> Case:
    rows = sum(r.q for r in found)
    row = spec.dims.get(contract.rows, (1, 1)) if contract.rows else 0
    count = row[0] * rows if isinstance(row, tuple) else len(found)  # fixed: one for each request
    takes = bool(contract.signature.of_kind("Batch"))
    first = first_float(contract)
    given = {first: spec.dtypes.get(first, "bfloat16")} if first else {}
    attributes = contract.attributes
    sizes = {**({contract.rows: rows if takes else count} if contract.rows else {}), **dims}
    whole = set(contract.signature.symbols())
    optional = [o for o in contract.signature.operands if o.optional and spec.dtypes and o.name not in spec.dtypes]
    fields = [n for o in contract.signature.of_kind("Pages") for n, w, may in o.fields if may and w not in dims]
    return Case(
        contract.name,
        tuple((s, n) for s, n in sizes.items() if s in whole),
        tuple((a, attributes[a].type(v)) for a, v in spec.attrs.items() if v != attributes[a].default),
        tuple(given.items()),
        absent=(*(o.name for o in optional), *fields),
        batch=spelled(found) if takes else "",
        block_size=BLOCK_SIZE if takes or contract.signature.of_kind("Pages") else 0,
        distinct=few,
    )
