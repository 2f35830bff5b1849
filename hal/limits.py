"""What a kernel can do, as data beside it: `@limits(...)` decides the claim before a call is ever made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import gcd, inf
from typing import Any, TypeVar

import numpy as np

from porthal.hal.contract import CallSpec, Contract
from porthal.hal.dtypes import DTYPES, itemsize
from porthal.hal.errors import UsageError
from porthal.hal.scheme import NONE, SCHEMES

F = TypeVar("F", bound=Callable[..., Any])
Dtypes = Mapping[str, str]  # of a call's operands, by name
TIES = ("lowest", "any")


@dataclass(frozen=True)
class Limit:
    """A permitted set of values and its wording.

    holds   whether a value is among them, given the dtypes of the call's operands
    until   of a whole number that is: the last up to which all are; at least the number itself
    of      the operands whose dtypes it looks at
    named   the values that it names one by one
    ends    the whole numbers at which it begins or ends
    """

    text: str
    holds: Callable[[Any, Dtypes], bool]
    until: Callable[[int, Dtypes], float] = lambda v, dtypes: v
    of: tuple[str, ...] = ()
    named: tuple[Any, ...] = ()
    ends: tuple[int, ...] = ()

    def refused(self, value: Any, dtypes: Dtypes) -> Any:
        """The value, or of a profile's range (low, high) the lowest, that is not among them; None where all are."""
        if not isinstance(value, tuple):
            return None if self.holds(value, dtypes) else value
        v, high = value
        while v <= high and self.holds(v, dtypes):
            v = self.until(v, dtypes) + 1
        return v if v <= high else None


def one_of(*values: Any) -> Limit:
    return Limit("one of " + ", ".join(map(str, values)), lambda v, _: v in values, named=values)


def at_most(n: int) -> Limit:
    return Limit(f"at most {n}", lambda v, _: bool(v <= n), lambda v, _: n, ends=(n,))


def at_least(n: int) -> Limit:
    return Limit(f"at least {n}", lambda v, _: bool(v >= n), lambda v, _: inf, ends=(n,))


def between(low: int, high: int) -> Limit:
    return Limit(f"{low} to {high}", lambda v, _: bool(low <= v <= high), lambda v, _: high, ends=(low, high))


def multiple_of(m: int, at_most: int | None = None) -> Limit:
    most = inf if at_most is None else at_most
    text = f"a multiple of {m}" + (f" up to {at_most}" if at_most else "")
    ends = (m,) if at_most is None else (m, at_most // m * m)
    return Limit(text, lambda v, _: bool(v % m == 0 and 0 < v <= most), lambda v, _: most if m == 1 else v, ends=ends)


def multiple_of_bytes(n: int, of: str) -> Limit:
    """So many elements of the dtype of operand `of` that they fill whole blocks of n bytes: an aligned row."""

    def elements(dtypes: Dtypes) -> Limit:
        return multiple_of(n // gcd(n, itemsize(dtypes[of])))

    return Limit(
        f"a multiple of {n} bytes of {of}",
        lambda v, dtypes: elements(dtypes).holds(v, dtypes),
        lambda v, dtypes: elements(dtypes).until(v, dtypes),
        (of,),
    )


def same_as(operand: str) -> Limit:
    """The dtype of another operand: `dtypes={"weight": same_as("x")}`."""
    return Limit(f"the dtype of {operand}", lambda v, dtypes: bool(v == dtypes[operand]), of=(operand,))


def per_dtype(operand: str, **limits: Limit) -> Limit:
    """A limit for each dtype of an operand: `k=per_dtype("scores", bfloat16=at_most(2048), float32=at_most(1024))`;
    dtypes that are not named are not taken."""
    if wrong := next((name for name in limits if name not in DTYPES), None):
        raise UsageError(f"a limit per dtype of {operand} names {wrong!r}, expected one of {', '.join(DTYPES)}")
    text = ", ".join(f"{limit.text} where {operand} is {name}" for name, limit in limits.items())
    return Limit(
        text,
        lambda v, dtypes: dtypes[operand] in limits and limits[dtypes[operand]].holds(v, dtypes),
        lambda v, dtypes: limits[dtypes[operand]].until(v, dtypes),
        (operand, *(name for limit in limits.values() for name in limit.of)),
        ends=tuple(n for limit in limits.values() for n in limit.ends),
    )


def any_of(*limits: Limit) -> Limit:
    return Limit(
        ", or ".join(x.text for x in limits),
        lambda v, dtypes: any(x.holds(v, dtypes) for x in limits),
        lambda v, dtypes: max(x.until(v, dtypes) for x in limits if x.holds(v, dtypes)),
        tuple(name for x in limits for name in x.of),
        tuple(value for x in limits for value in x.named),
        tuple(n for x in limits for n in x.ends),
    )


UNQUANTISED, ANY_SCHEME = Limit(NONE, lambda v, _: bool(v == NONE)), one_of(NONE, *SCHEMES)


@dataclass(frozen=True)
class Need:
    """A named condition on the values of one operand: `Need("no -1", lambda ids: ids >= 0)`.

    `holds` gets an array as NumPy, a Batch as it is, a Selection as its logical form {"indices", "length"}, and gives a
    bool, or an array of the operand's shape that is False where a value breaks it.
    """

    text: str
    holds: Callable[[Any], Any]

    def breach(self, name: str, value: Any) -> str | None:
        """What is wrong with the values of the operand of this name, or None."""
        good = np.asarray(self.holds(value))
        if good.all():
            return None
        taken = f"the kernel takes {name} with {self.text}"
        if good.ndim and good.shape == getattr(value, "shape", ()):
            at = tuple(int(i[0]) for i in np.nonzero(~good))
            return f"{name}[{', '.join(map(str, at))}] is {value[at]}, {taken}"
        return taken


@dataclass(frozen=True)
class Limits:
    """Limits on operand dtypes, on schemes, on dims and attributes by name, and needs of data; `refuses` gives the first
    broken."""

    dtypes: Mapping[str, Limit] = field(default_factory=dict)
    facts: Mapping[str, Limit] = field(default_factory=dict)
    needs: Mapping[str, Need] = field(default_factory=dict)
    schemes: Limit = UNQUANTISED

    def refuses(self, spec: CallSpec) -> str | None:
        for name, limit in self.dtypes.items():
            if name in spec.dtypes and not limit.holds(spec.dtypes[name], spec.dtypes):
                return f"{name} is {spec.dtypes[name]}, the kernel takes {_worded(limit, spec)}"
        for name, scheme in spec.schemes.items():
            if not self.schemes.holds(scheme, spec.dtypes):
                return f"quantisation scheme of {name} is {scheme!r}, the kernel takes {self.schemes.text}"
        for name, limit in self.facts.items():
            value = spec.dims.get(name, spec.attrs.get(name))
            if value is not None and (v := limit.refused(value, spec.dtypes)) is not None:
                return f"{name} = {v}, the kernel takes {_worded(limit, spec)}"
        return None

    @property
    def text(self) -> str:
        """All that is stated."""
        stated: dict[str, Limit | Need] = {**self.dtypes, **self.facts, "schemes": self.schemes, **self.needs}
        return "; ".join(f"{name}: {each.text}" for name, each in stated.items())

    def unknown(self, contract: Contract) -> str | None:
        """What is stated about something that no call of the op has, in words, or None."""
        typed = {o.name: o for o in contract.signature.operands if o.typed}
        readable = [o.name for o in contract.signature.operands if o.kind in ("array", "Batch", "Selection")]
        always = [name for name, o in typed.items() if not o.optional]
        stated = (*self.dtypes.values(), *self.facts.values())
        for what, names, known in (
            ("the dtype of {}", self.dtypes, typed),
            ("{}", self.facts, contract.facts()),
            ("the values of {}", self.needs, readable),
            ("what depends on the dtype of {}", [name for limit in stated for name in limit.of], always),
        ):
            if wrong := next((name for name in names if name not in known), None):
                return f"limits {what.format(repr(wrong))}, expected one of {', '.join(known)}"
        dtypes = [(f"the dtype of {name}", limit, DTYPES) for name, limit in self.dtypes.items()]
        for what, limit, values in (*dtypes, ("schemes", self.schemes, (NONE, *SCHEMES))):
            if wrong := next((v for v in limit.named if v not in values), None):
                return f"limits {what} to {wrong!r}, expected one of {', '.join(values)}"
        for name, limit in self.facts.items():
            kind = contract.attributes[name].type if name in contract.attributes else int
            if kind is int and (wrong := next((v for v in limit.named if not isinstance(v, int)), None)) is not None:
                return f"limits {name} to {wrong!r}, expected whole numbers"
        return None


NO_LIMITS = Limits()  # of a kernel without @limits: every dtype and size, but nothing quantised


def limits(
    *,
    provider: str = "",
    tie: str = "lowest",
    batch_invariant: bool = False,
    dtypes: Mapping[str, Limit | str] | None = None,
    needs: Mapping[str, Need] | None = None,
    schemes: Limit | str = UNQUANTISED,
    **facts: Limit | int | str | bool,
) -> Callable[[F], F]:
    """State what a kernel takes: `@limits(provider="torch_npu.npu_x", dtypes={"x": one_of("bfloat16")}, D=128)`.

    provider is the library call behind it; tie="any" declares that equal scores are chosen in an order of the chip's own;
    batch_invariant promises that a row's bits do not depend on the other rows, nor on how many there are.
    needs are conditions on values, by operand, which are looked at before every call.
    schemes are those of weights, caches and quantised activations: "fp8_keys", or one_of("none", "fp8_block"); by default none.
    """
    if tie not in TIES:
        raise UsageError(f"tie is {tie!r}, expected one of {', '.join(TIES)}")
    stated = Limits(_limited(dtypes or {}), _limited(facts), dict(needs or {}), _limited({"": schemes})[""])

    def attach(f: F) -> F:
        vars(f).update(limits=stated, provider=provider, tie=tie, batch_invariant=batch_invariant)
        return f

    return attach


def _limited(stated: Mapping[str, Any]) -> dict[str, Limit]:
    return {name: v if isinstance(v, Limit) else one_of(v) for name, v in stated.items()}


def _worded(limit: Limit, spec: CallSpec) -> str:
    """The limit's text, with the dtypes that it looks at."""
    given = ", ".join(f"{name} is {spec.dtypes[name]}" for name in dict.fromkeys(limit.of))
    return f"{limit.text} ({given})" if given else limit.text
