"""`@contract`: one operator's specification, from which checks, cases, budgets, docs and stubs are derived."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from porthal.hal import dtypes as dt
from porthal.hal.errors import UsageError
from porthal.hal.operands import KINDS, Operand
from porthal.hal.scheme import NONE
from porthal.hal.signature import ARRAY, OperandSpec, Signature, evaluate, parse, symbols, unify
from porthal.hal.spans import Legal, Reals, Span, worded

Reference = Callable[..., Any]
CostRule = Callable[[Any, Any], tuple[float, float]]
PAGE_SIZES = range(1, 1025)  # slots of a page, in every op that has any


@dataclass(frozen=True, eq=False)
class CallSpec:
    """The static facts of a call, all that a claim may look at.

    dims: symbol -> int, or (low, high) where a profile covers a range; block_size is one of them.
    """

    dims: Mapping[str, int | tuple[int, int]]
    dtypes: Mapping[str, str]
    attrs: Mapping[str, Any]
    schemes: Mapping[str, str]

    def key(self) -> tuple[Any, ...]:
        return tuple(tuple(sorted(m.items())) for m in (self.dims, self.dtypes, self.attrs, self.schemes))

    def covers(self, call: CallSpec) -> bool:
        """Whether a call's facts are among these: equal, or within the range."""
        if (self.dtypes, self.attrs, self.schemes) != (call.dtypes, call.attrs, call.schemes):
            return False
        ranges = {name: v if isinstance(v, tuple) else (v, v) for name, v in self.dims.items()}
        sizes = {name: v for name, v in call.dims.items() if isinstance(v, int)}
        return all(name in ranges and ranges[name][0] <= v <= ranges[name][1] for name, v in sizes.items())

    def __hash__(self) -> int:
        return hash(self.key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CallSpec) and self.key() == other.key()


@dataclass(frozen=True)
class Attribute:
    name: str
    type: type
    default: Any  # inspect.Parameter.empty when it must be given


class Contract:
    """One operator. Its `reference` is the specification: float64 NumPy over logical operands.

    signature   the shapes, see hal/signature.py
    dtypes      per operand: permitted names, or "x" (same as operand x), joined by " | "; per result: one dtype, an
                operand's name, or "@attr"
    cost        (dims, bytes per element of each operand) -> (flops, bytes moved)
    version     raised where the op computes something else; tokens name it from 2 on
    rows        the symbol that counts rows; "" means T
    independent the symbols along which results do not depend on each other, rows first: a call of some of the places along
                one gives these places of its results. Rows of a Batch are then requests of their own, and what counts
                rows counts those that are left
    exact       the result is a copy or an integer: judged bit for bit; or the attribute at whose default it is one
    choice      the result that is a discrete choice, judged by recomputed scores (`@op.scored`, `@op.finished`) or by
                what could have been drawn (`@op.admitted`)
    writes      of an op that changes pages without a batch: the operand that lists them
    schemes     operand -> those that it may be under, beside none: of a weight, a cache, or quantised activations
    profiles    the uses of a model that call it: "inference", "moe", "distributed"
    uneven      of a call of several ranks, the symbols that may differ among them

    A contract with a Communicator is a collective: its reference takes of each operand the list of all ranks, and returns the
    list of their results.

    What a legal call is, and which are worth testing:

    rules       (sentence, predicate over dims and attributes): what it must fulfil beyond shapes and dtypes
    ranges      integer operands, and results that are drawn: (lowest, one past the highest), each a number or a dim
    cases       sizes per symbol, and values per attribute; the first is GLM-5's
    legal       all values of each attribute, of block_size, and of float operands that may not have any: a span, or
                f(dims and attributes) -> span, which sees those that stand before it
    values      operand -> the value generators (`conformance/cases/values.py`) worth testing; the first is the default
    """

    def __init__(
        self,
        reference: Reference,
        signature: Signature,
        *,
        dtypes: Mapping[str, Any],
        cost: CostRule,
        version: int = 1,
        rows: str = "",
        independent: Sequence[str] = (),
        exact: bool = False,
        choice: str = "",
        writes: str = "",
        schemes: Mapping[str, Sequence[str]] | None = None,
        profiles: Sequence[str] = (),
        uneven: Sequence[str] = (),
        rules: Sequence[tuple[str, Callable[[Any], bool]]] = (),
        ranges: Mapping[str, tuple[int | str, int | str]] | None = None,
        cases: Mapping[str, Sequence[Any]] | None = None,
        legal: Mapping[str, Legal] | None = None,
        values: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.signature = signature
        self.cost = cost
        self.version = version
        self.rows = rows or ("T" if "T" in signature.symbols() else "")
        self.independent = tuple(independent)
        self.exact = exact
        self.choice = choice
        self.writes = writes
        self.schemes = {name: tuple(names) for name, names in (schemes or {}).items()}
        self.profiles = profiles
        self.uneven = tuple(uneven)
        self.rules = rules
        self.ranges = ranges or {}
        self.cases = cases or {}
        kinds = {o.kind for o in signature.operands}
        self.legal = {**({"block_size": PAGE_SIZES} if kinds & {"Batch", "Pages"} else {}), **(legal or {})}
        self.values = values or {}
        self.__doc__ = inspect.getdoc(reference) or ""
        self.dtypes = {name: _dtype_options(spec) for name, spec in dtypes.items()}
        self.attributes = _attributes(reference)
        self.scores: Reference | None = None
        self.finish: Reference | None = None
        self.admits: Reference | None = None
        self.slack: Reference | None = None
        self.hidden: Reference | None = None
        self.adjust: Reference | None = None
        self.specified: Reference | None = None
        self.told: Reference | None = None
        self.fits: Reference | None = None
        self.decomposition: Reference | None = None
        self.weights: Mapping[str, tuple[str, str]] = {}
        self._verify()

    def __repr__(self) -> str:
        return f"<contract {self.name}: {self.signature.text}>"

    @property
    def collective(self) -> str:
        """The operand that says which ranks make the call together; "" where one device makes it alone."""
        return next((o.name for o in self.signature.of_kind("Communicator")), "")

    def files(self) -> list[Path]:
        """The Python files that the reference may be written in: its own, and those beside it."""
        own = Path(inspect.getsourcefile(inspect.unwrap(self.reference)) or "").resolve()
        return sorted(own.parent.glob("*.py"))

    # -- decorators that complete a contract -------------------------------------------------------------------------

    def scored(self, f: Reference) -> Reference:
        """The continuous scores [rows, candidates] behind a discrete choice; excluded candidates are -inf."""
        self.scores = f
        return f

    def finished(self, f: Reference) -> Reference:
        """The other results, computed at the choice that a chip made: f(*operands, choice, **attrs) -> dict."""
        self.finish = f
        return f

    def admitted(self, slack: Reference) -> Callable[[Reference], Reference]:
        """For choices that are drawn: f(*operands, results, slack, **attrs) -> first bad row or None.

        `slack(**operands)` is how far an honest chip's probabilities may be off in each row, before a level's factor.
        """

        def attach(f: Reference) -> Reference:
            self.admits, self.slack = f, slack
            return f

        return attach

    def unread(self, f: Reference) -> Reference:
        """Where nothing may be read: f(**operands) -> {operand: mask}. Test calls have NaN there."""
        self.hidden = f
        return f

    def adjusted(self, f: Reference) -> Reference:
        """Changes drawn operands in place so that a test call finds more: f(**operands)."""
        self.adjust = f
        return f

    def specified_rows(self, f: Reference) -> Reference:
        """How many leading rows of the results are specified: f(**operands) -> count; of a collective f(**results) -> {result:
        count}. The others may hold anything."""
        self.specified = f
        return f

    def tells(self, f: Reference) -> Reference:
        """Of a collective, the whole numbers that each rank tells the others before the call: f(rank's integer operands by
        name, `facts` with its dims and attributes) -> list."""
        self.told = f
        return f

    def fitting(self, f: Reference) -> Reference:
        """What is wrong with what the ranks of a collective have told, in words, or "": f(told [ranks, n], facts)."""
        self.fits = f
        return f

    def decomposed(self, **weights: str) -> Callable[[Reference], Reference]:
        """The default decomposition f(ops, *operands, **attrs) of a composite.

        `weights` says for which inner operand each weight is prepared when no kernel fuses them: q_a="linear.w".
        """

        def attach(f: Reference) -> Reference:
            self.decomposition = f
            self.weights = {k: (v.split(".")[0], v.split(".")[1]) for k, v in weights.items()}
            return f

        return attach

    # -- what is derived ---------------------------------------------------------------------------------------------

    def arrange(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Operands by name (absent optional ones are None) and attributes with their defaults."""
        names = [o.name for o in self.signature.operands]
        if len(args) > len(names):
            raise UsageError(f"{self.name} got {len(args)} operands: it takes {', '.join(names)}")
        operands: dict[str, Any] = dict(zip(names, args))
        attrs: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in names and key not in operands:
                operands[key] = value
            elif key in self.attributes:
                attrs[key] = value
            else:
                known = ", ".join([*names, *self.attributes])
                raise UsageError(f"{self.name} got an unexpected or repeated argument {key!r}: it takes {known}")
        for operand in self.signature.operands:
            if operands.setdefault(operand.name, None) is None and not operand.optional:
                raise UsageError(f"{self.name} lacks operand {operand.name!r} of {self.signature.text}")
        for name, attribute in self.attributes.items():
            if name not in attrs:
                if attribute.default is inspect.Parameter.empty:
                    raise UsageError(f"{self.name} lacks attribute {name!r} ({attribute.type.__name__})")
                attrs[name] = attribute.default
        return {n: operands[n] for n in names}, attrs

    def facts(self) -> tuple[str, ...]:
        """The dims and attributes that the static facts of a call may have."""
        kinds = {o.kind for o in self.signature.operands}
        pages = [name for name, of in (("block_size", {"Batch", "Pages"}), ("P", {"Pages"})) if of & kinds]
        return tuple(dict.fromkeys([*sorted(self.signature.symbols()), *pages, *self.attributes]))

    def spec(self, operands: Mapping[str, Any], attrs: Mapping[str, Any]) -> CallSpec:
        """The call's static facts; UsageError where shapes, dtypes or attributes contradict the contract."""
        env: dict[str, int] = {k: v for k, v in attrs.items() if isinstance(v, int) and not isinstance(v, bool)}
        found: dict[str, str] = {}
        schemes: dict[str, str] = {}
        self._check_attributes(attrs)
        waiting: list[tuple[OperandSpec, str, int]] = []
        for operand in self.signature.operands:
            value = operands[operand.name]
            if value is None:
                continue
            for dim, size in self._sizes(operand, value):
                try:
                    if not unify(dim, size, env):
                        raise self._shape_error(operand, dim, size, env)
                except KeyError:  # two unknown symbols in one dim: another operand will bind one of them
                    waiting.append((operand, dim, size))
            if operand.typed:
                found[operand.name] = value.dtype if isinstance(value, Operand) else dt.dtype(value)
            if isinstance(value, Operand) and value.scheme is not None:
                schemes[operand.name] = self._permitted(operand.name, value.scheme)
        for operand, dim, size in waiting:
            if not unify(dim, size, env):
                raise self._shape_error(operand, dim, size, env)
        for name, actual in found.items():
            permitted = [found.get(option, option) for option in self.dtypes[name]]
            if actual not in permitted:
                raise UsageError(f"{self.name}: {name} is {actual}, expected {' or '.join(dict.fromkeys(permitted))}")
        facts = SimpleNamespace(**attrs, **{k: v for k, v in env.items() if k not in attrs})
        if broken := self.broken(facts):
            given = ", ".join(f"{k}={v}" for k, v in sorted(vars(facts).items()) if k in broken.split())
            raise UsageError(f"{self.name} requires {broken}, got {given}")
        return CallSpec({k: v for k, v in env.items() if k not in attrs}, found, attrs, schemes)

    def allowed(self, name: str, facts: Any) -> Span:
        """All legal values of an attribute or of block_size, where other dims and attributes are these."""
        span = self.legal[name]
        return span(facts) if callable(span) else span

    def broken(self, facts: Any) -> str:
        """The first rule, legal values among them, that dims and attributes break, or ""."""
        for name in self.legal:
            if hasattr(facts, name) and getattr(facts, name) not in (span := self.allowed(name, facts)):
                return f"{name} to be {worded(span)}"
        return next((sentence for sentence, holds in self.rules if not holds(facts)), "")

    def results(self, spec: CallSpec) -> list[tuple[OperandSpec, tuple[int, ...], str]]:
        """Name, shape and dtype of every result ("" where it has none): a pure function of the static facts."""
        env: dict[str, Any] = {**spec.attrs, **spec.dims}
        out = []
        for result in self.signature.results:
            name = ""
            if result.kind == ARRAY:
                option = self.dtypes[result.name][0]
                option = str(spec.attrs[option[1:]]) if option.startswith("@") else option
                name = spec.dtypes.get(option, option)
            out.append((result, tuple(evaluate(d, env) for d in result.dims), name))
        return out

    def named(self, out: Any) -> dict[str, Any]:
        """What a kernel or reference returned, by the names of the results; UsageError where the count differs."""
        values = out if isinstance(out, tuple) else (out,)
        if len(values) != len(self.signature.results):
            raise UsageError(f"{self.name} returned {len(values)} results, expected {len(self.signature.results)}")
        return dict(zip((r.name for r in self.signature.results), values))

    def check_values(self, operands: Mapping[str, Any], spec: CallSpec, read: Callable[[Any], Any]) -> None:
        """Range rules of integer operands, and legal floats; reads data, so only checked bindings do it."""
        for name in self.ranges:
            if operands.get(name) is None:
                continue
            first, last = self.bounds(name, spec)
            data = np.asarray(read(operands[name]))
            bad = (data < first) | (data >= last)
            if bad.any():
                where = tuple(int(i[0]) for i in np.nonzero(bad))
                at = where[0] if len(where) == 1 else where
                raise UsageError(f"{self.name}: {name}[{at}] is {data[where]}, expected {first} to {last - 1}")
        for name, span in self.legal.items():
            if isinstance(span, Reals) and operands.get(name) is not None:
                data = np.asarray(read(operands[name]))
                if not (good := span.holds(data)).all():
                    where = tuple(int(i[0]) for i in np.nonzero(~good))
                    raise UsageError(f"{self.name}: {name}[{', '.join(map(str, where))}] is {data[where]}, expected {span}")

    def bounds(self, name: str, spec: CallSpec) -> tuple[int, int]:
        """The range of an integer operand or result: the lowest, and one past the highest."""
        env: dict[str, Any] = {**spec.attrs, **spec.dims}
        low, high = (b if isinstance(b, int) else evaluate(b, env) for b in self.ranges[name])
        return low, high

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The checked front, on the backend that the current policy selects: plain arrays are accepted."""
        from porthal.hal.binding import front

        return front(self, args, kwargs)

    # -- internals ---------------------------------------------------------------------------------------------------

    def _sizes(self, operand: OperandSpec, value: Any) -> list[tuple[str, int]]:
        if operand.kind == ARRAY:
            if not hasattr(value, "shape") or not hasattr(value, "dtype"):
                raise UsageError(f"{self.name}: {operand.name} is {type(value).__name__}, expected an array")
        elif not isinstance(value, KINDS[operand.kind]):
            raise UsageError(f"{self.name}: {operand.name} is {type(value).__name__}, expected {operand.kind}")
        try:
            return operand.matched(tuple(value.shape)) if operand.kind == ARRAY else value.sizes(operand)
        except UsageError as error:
            raise UsageError(f"{self.name}: {error}") from None

    def _permitted(self, name: str, scheme: str) -> str:
        known = self.schemes.get(name, ())
        if scheme not in (NONE, *known):
            raise UsageError(f"{self.name}: {name} is under scheme {scheme!r}, expected {' or '.join((NONE, *known))}")
        return scheme

    def _shape_error(self, operand: OperandSpec, dim: str, size: int, env: Mapping[str, int]) -> UsageError:
        known = ", ".join(f"{s}={env[s]}" for s in symbols(dim) if s in env)
        why = f"but {known} elsewhere in the call" if known else f"which no whole number {' '.join(symbols(dim))} gives"
        return UsageError(f"{self.name}: {operand.name} has {dim} = {size}, {why}")

    def _check_attributes(self, attrs: Mapping[str, Any]) -> None:
        for name, value in attrs.items():
            wanted = self.attributes[name].type
            whole = isinstance(value, int) and not isinstance(value, bool)
            fits = whole or isinstance(value, float) if wanted is float else isinstance(value, wanted)
            if not fits or (wanted is int and not whole):
                raise UsageError(
                    f"{self.name}: attribute {name} is {value!r} ({type(value).__name__}), expected a static "
                    f"{wanted.__name__}"
                )

    def _verify(self) -> None:
        for operand in (*self.signature.operands, *self.signature.results):
            if operand.typed and operand.name not in self.dtypes:
                raise UsageError(f"contract {self.name} states no dtype for {operand.name!r}")
        parameters = [
            p.name for p in inspect.signature(self.reference).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        names = [o.name for o in self.signature.operands]
        if parameters != names:
            raise UsageError(f"contract {self.name}: the reference takes {parameters}, the signature says {names}")
        everywhere = [d for o in (*self.signature.operands, *self.signature.results) for d in o.dims]
        if wrong := [s for s in self.independent if any(s in symbols(d) and d != s for d in everywhere)]:
            raise UsageError(f"contract {self.name} says that {wrong[0]} is independent, but it is a part of another dim")
        if not self.__doc__:
            raise UsageError(f"contract {self.name} has no docstring: state formula and source")


def _dtype_options(spec: Any) -> tuple[str, ...]:
    if isinstance(spec, str):
        return tuple(s.strip() for s in spec.split("|"))
    return tuple(spec)


def _attributes(reference: Reference) -> dict[str, Attribute]:
    hints = inspect.get_annotations(reference, eval_str=True)
    return {
        p.name: Attribute(p.name, hints.get(p.name, type(p.default)), p.default)
        for p in inspect.signature(reference).parameters.values()
        if p.kind == p.KEYWORD_ONLY
    }


_contracts: dict[str, Contract] = {}
_known: Mapping[str, Contract] = MappingProxyType(_contracts)
_collectives: dict[str, Contract] = {}
_operators: Mapping[str, Contract] = ChainMap(_collectives, _contracts)  # listed from the last


def contract(signature: str, **facts: Any) -> Callable[[Reference], Contract]:
    """Make the decorated float64 reference a contract and enter it in the registry; `Contract` lists the facts."""

    def make(reference: Reference) -> Contract:
        made = Contract(reference, parse(signature), **facts)
        for registry in (_contracts, _collectives):
            if made.name in registry and registry[made.name].reference.__module__ != reference.__module__:
                raise UsageError(f"contract {made.name!r} exists already, in {registry[made.name].reference.__module__}")
        registry = _collectives if made.collective else _contracts
        known = sorted({**registry, made.name: made}.items())
        registry.clear()
        registry.update(known)
        return made

    return make


@cache
def contracts() -> Mapping[str, Contract]:
    """Every contract of one device by name; the files of porthal/ops are found by listing the folder."""
    if "porthal.ops" not in sys.modules:
        importlib.import_module("porthal.ops")
    return _known


def collectives() -> Mapping[str, Contract]:
    """Every contract that several ranks call together, by name."""
    contracts()
    return MappingProxyType(_collectives)


def operators() -> Mapping[str, Contract]:
    """Both, those of one device first."""
    contracts()
    return _operators
