"""What a kernel can do, as data beside it: `@limits(...)` decides the claim before a call is ever made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from porthal.hal.contract import CallSpec

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Limit:
    """A permitted set of values and its wording."""

    text: str
    holds: Callable[[Any], bool]


def one_of(*values: Any) -> Limit:
    return Limit("one of " + ", ".join(map(str, values)), lambda v: v in values)


def at_most(n: int) -> Limit:
    return Limit(f"at most {n}", lambda v: bool(v <= n))


def at_least(n: int) -> Limit:
    return Limit(f"at least {n}", lambda v: bool(v >= n))


def multiple_of(m: int, at_most: int | None = None) -> Limit:
    text = f"a multiple of {m}" + (f" up to {at_most}" if at_most else "")
    return Limit(text, lambda v: v % m == 0 and v > 0 and (at_most is None or v <= at_most))


def any_of(*limits: Limit) -> Limit:
    return Limit(", or ".join(x.text for x in limits), lambda v: any(x.holds(v) for x in limits))


@dataclass(frozen=True)
class Limits:
    """Limits on operand dtypes and on dims and attributes by name; `refuses` gives the first one broken."""

    dtypes: Mapping[str, Limit]
    facts: Mapping[str, Limit]

    def refuses(self, spec: CallSpec) -> str | None:
        for name, limit in self.dtypes.items():
            if name in spec.dtypes and not limit.holds(spec.dtypes[name]):
                return f"{name} is {spec.dtypes[name]}, the kernel takes {limit.text}"
        for scheme in spec.schemes.values():
            if scheme != "none":
                return f"quantisation scheme is {scheme!r}, the kernel takes none"
        for name, limit in self.facts.items():
            value = spec.dims.get(name, spec.attrs.get(name))
            if value is None:
                continue
            for v in _samples(value):
                if not limit.holds(v):
                    return f"{name} = {v}, the kernel takes {limit.text}"
        return None


NO_LIMITS = Limits({}, {})  # of a kernel without @limits: every dtype and size, but nothing quantised


def limits(
    *,
    provider: str = "",
    tie: str = "lowest",
    dtypes: Mapping[str, Limit] | None = None,
    **facts: Limit | int | str | bool,
) -> Callable[[F], F]:
    """State what a kernel takes: `@limits(provider="torch_npu.npu_x", dtypes={"x": one_of("bfloat16")}, D=128)`.

    provider is the library call behind it; tie="any" declares that equal scores are chosen in an order of the chip's own.
    """
    stated = Limits(
        dict(dtypes or {}), {k: v if isinstance(v, Limit) else one_of(v) for k, v in facts.items()}
    )

    def attach(f: F) -> F:
        vars(f).update(limits=stated, provider=provider, tie=tie)
        return f

    return attach


def _samples(value: Any) -> tuple[Any, ...]:
    """A profile's range is tested at both ends and one above the lower end, where every `multiple_of` fails."""
    if isinstance(value, tuple) and len(value) == 2:
        low, high = value
        return (low,) if low == high else (low, min(low + 1, high), high)
    return (value,)
