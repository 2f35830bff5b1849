"""The shape language of contracts: `"x[T, H], w: Weight[N, H], kv!: Pages{c[C], kp[R]}, bias[N]? -> y[T, N]"`.

`?` marks an optional operand, `!` a mutated one (the same name is then among the results). A dim is a symbol, a number,
or a sum of products of those ("2*I", "C+R", "n+1"). Symbols are bound by the operands and by integer attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from porthal.hal.errors import UsageError
from porthal.hal.operands import KINDS

ARRAY = "array"  # the kind of an operand that is not an operand object
_OPERAND = re.compile(r"^(?P<name>\w+)(?P<bang>!?)(?::\s*(?P<kind>\w+))?(?P<body>[\[{].*[\]}])?(?P<opt>\??)$")
_FIELD = re.compile(r"(\w+)\[([^\]]*)\](\??)")


@dataclass(frozen=True)
class OperandSpec:
    """One operand or result as the contract declares it."""

    name: str
    kind: str = ARRAY
    dims: tuple[str, ...] = ()
    fields: tuple[tuple[str, str, bool], ...] = ()  # Pages: (field, width, optional)
    optional: bool = False
    mutated: bool = False

    @property
    def typed(self) -> bool:
        """Whether the contract states a dtype for it."""
        return self.kind == ARRAY or KINDS[self.kind].typed

    def matched(self, shape: Sequence[int]) -> list[tuple[str, int]]:
        """The dims with the sizes of a shape; UsageError where they are not as many."""
        if len(shape) != len(self.dims):
            axes = f"{len(self.dims)} axes [{', '.join(self.dims)}]"
            raise UsageError(f"{self.name} has shape {list(shape)}, expected {axes}")
        return list(zip(self.dims, shape))

    def symbols(self) -> tuple[str, ...]:
        """The symbols in its dims and fields."""
        return self._symbols

    @cached_property
    def _symbols(self) -> tuple[str, ...]:
        return tuple(s for d in (*self.dims, *(width for _, width, _ in self.fields)) for s in symbols(d))


@dataclass(frozen=True)
class Signature:
    text: str
    operands: tuple[OperandSpec, ...]
    results: tuple[OperandSpec, ...]

    def __getitem__(self, name: str) -> OperandSpec:
        for operand in (*self.operands, *self.results):
            if operand.name == name:
                return operand
        raise KeyError(name)

    @property
    def mutated(self) -> tuple[OperandSpec, ...]:
        return tuple(o for o in self.operands if o.mutated)

    def of_kind(self, kind: str) -> tuple[OperandSpec, ...]:
        """The operands of one kind."""
        return self._of_kind.get(kind, ())

    @cached_property
    def _of_kind(self) -> dict[str, tuple[OperandSpec, ...]]:
        return {kind: tuple(o for o in self.operands if o.kind == kind) for kind in {o.kind for o in self.operands}}

    def symbols(self) -> frozenset[str]:
        """The symbols in the shapes of operands."""
        return self._symbols

    @cached_property
    def _symbols(self) -> frozenset[str]:
        return frozenset(s for o in self.operands for s in o.symbols())


def parse(text: str) -> Signature:
    left, arrow, right = text.partition("->")
    if not arrow:
        raise UsageError(f"signature {text!r} has no '->': write operands -> results")
    operands = tuple(_operand(part, text) for part in _split(left))
    known = {o.name: o for o in operands}
    results = []
    for part in _split(right):
        result = _operand(part, text)
        if result.name in known:  # a mutated operand, returned: declared on the left
            result = known[result.name]
            if not result.mutated:
                raise UsageError(f"signature {text!r} returns operand {result.name!r} that is not marked '!'")
        results.append(result)
    missing = [o.name for o in operands if o.mutated and o not in results]
    if missing:
        raise UsageError(f"signature {text!r} mutates {', '.join(missing)} without returning it")
    return Signature(text, operands, tuple(results))


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        depth += (ch in "[{") - (ch in "]}")
        if ch == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [p.strip() for p in parts if p.strip()]


def _operand(part: str, text: str) -> OperandSpec:
    match = _OPERAND.match(part)
    if not match:
        raise UsageError(f"cannot read operand {part!r} in signature {text!r}: write name[dims] or name: Kind[dims]")
    kind = match["kind"] or ARRAY
    if kind not in (ARRAY, *KINDS):
        raise UsageError(f"operand {part!r} has kind {kind!r}: expected one of {', '.join((ARRAY, *KINDS))}")
    body = match["body"] or ""
    fields: tuple[tuple[str, str, bool], ...] = ()
    dims: tuple[str, ...] = ()
    if body.startswith("{"):
        fields = tuple((n, d.strip(), bool(q)) for n, d, q in _FIELD.findall(body))
    elif body:
        dims = tuple(d.strip() for d in body[1:-1].split(",") if d.strip())
    return OperandSpec(match["name"], kind, dims, fields, bool(match["opt"]), bool(match["bang"]))


def evaluate(dim: str, env: Mapping[str, int]) -> int:
    """The value of a dim expression; KeyError names the first unbound symbol."""
    total = 0
    for term in _terms(dim):
        product = 1
        for factor in term:
            product *= env[factor] if isinstance(factor, str) else factor
        total += product
    return total


def unify(dim: str, value: int, env: dict[str, int]) -> bool:
    """Bind the one unknown symbol of `dim` so that it equals `value`; False when that is impossible."""
    unknown = [s for s in symbols(dim) if s not in env]
    if not unknown:
        return evaluate(dim, env) == value
    if len(unknown) > 1:
        raise KeyError(unknown[0])
    name = unknown[0]
    low, high = (0, 1) if name == dim else (evaluate(dim, {**env, name: n}) for n in (0, 1))
    step = high - low
    if step <= 0 or value < low or (value - low) % step:
        return False
    env[name] = (value - low) // step
    return True


@cache
def symbols(dim: str) -> tuple[str, ...]:
    return tuple(factor for term in _terms(dim) for factor in term if isinstance(factor, str))


@cache
def _terms(dim: str) -> tuple[tuple[int | str, ...], ...]:
    """A sum of products: its factors, each a number or a symbol."""
    factors = ((factor.strip() for factor in term.split("*")) for term in dim.split("+"))
    return tuple(tuple(int(f) if f.isdigit() else f for f in term) for term in factors)
