"""`bind()`: one function per op, chosen once from claims and policy, so that a call costs nothing over the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np

from porthal.hal import discovery
from porthal.hal.backend import Backend, Kernel, Read
from porthal.hal.contract import CallSpec, Contract, contracts
from porthal.hal.dtypes import dtype
from porthal.hal.errors import NotClaimed, UsageError
from porthal.hal.limits import NO_LIMITS, Limits
from porthal.hal.operands import Batch, Pages, Selection, Weight, WeightSpec

Function = Callable[..., Any]
Wrap = Callable[[str, Function], Function]
Profile = Mapping[str, Sequence[CallSpec]]
Status = Literal["own", "inherited", "composed", "fallback", "missing"]
SERVICES = ("from_numpy", "to_numpy", "plan", "alloc_pages", "from_logical", "to_logical")


@dataclass(frozen=True)
class Choice:
    """Which kernel a binding uses for an op. `own` proves something about the chip; the other words do not."""

    op: str
    status: Status
    owner: str
    provider: str
    reason: str
    tie: str = "lowest"
    limits: Limits = NO_LIMITS


class Binding:
    """An immutable set of functions, one per op, for one backend, device, policy and profile, plus its services."""

    backend: Backend
    choices: Mapping[str, Choice]

    def __init__(self, backend: Backend, choices: Mapping[str, Choice], members: Mapping[str, Any]) -> None:
        vars(self).update(members, backend=backend, choices=choices)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a binding is immutable: bind() again instead of setting {name!r}")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the binding of {vars(self)['backend']} has no op or service {name!r}")

    def __repr__(self) -> str:
        return f"<binding of {self.backend}: {self.summary()}>"

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Pack a weight for the kernel that will use it; see `Backend.prepare`."""
        choice = self.choices[spec.op]
        if choice.status == "composed":
            inner = contracts()[spec.op].weights[spec.operand]
            spec = WeightSpec(*inner, spec.shape, spec.dtype, spec.scheme)
            return self.prepare(spec, read, into)
        made: Weight = vars(self)["_targets"].get(spec.op, self.backend).prepare(spec, read, into)
        return made

    def counts(self) -> dict[str, int]:
        """How many ops are own, inherited, composed, fallback and missing."""
        words: tuple[Status, ...] = ("own", "inherited", "composed", "fallback", "missing")
        return {w: sum(c.status == w for c in self.choices.values()) for w in words}

    def summary(self) -> str:
        return ", ".join(f"{n} {word}" for word, n in self.counts().items() if n or word in ("own", "inherited"))


def bind(
    name: str | None = None,
    *,
    profile: Profile | None = None,
    overrides: Mapping[str, str] | None = None,
    fallback: str | None = None,
    check: bool | None = None,
    wrap: Sequence[Wrap] = (),
    backend: Backend | None = None,
) -> Binding:
    """Choose a kernel per op.

    name       "backend" or "backend:device"; None reads PORTHAL_BACKEND, else takes the best available
    profile    the calls a model will make (`model.Config.profile()`): claims are judged over all of them
    overrides  op -> backend, or "composed"; None reads PORTHAL_OPS ("topk=reference,moe_layer=composed")
    fallback   "error" or the backend for ops nobody claims; None reads PORTHAL_FALLBACK
    check      judge every call against its contract before making it; None reads PORTHAL_CHECK
    wrap       (op, function) -> function, outermost first: tracing, counting, timing, lockstep
    backend    an instance to use instead of making one

    Raises UsageError for unknown names and NotClaimed when the profile needs an op that nobody claims.
    """
    chosen = backend or discovery.create(name or selected()[0])
    rules = dict(overrides) if overrides is not None else _policy_ops()
    fallback = fallback or os.environ.get("PORTHAL_FALLBACK", "error")
    if fallback != "error":
        discovery.probe(fallback.partition(":")[0])  # an unknown name is a mistake even where nothing falls back
    check = os.environ.get("PORTHAL_CHECK", "0") not in ("0", "") if check is None else check
    known = contracts()
    _verify_names(rules, known)

    members: dict[str, Any] = {s: getattr(chosen, s) for s in SERVICES}
    targets: dict[str, Kernel] = {}
    choices: dict[str, Choice] = {}
    binding = Binding(chosen, choices, members)
    vars(binding)["_targets"] = targets
    layers = ([_checker(chosen, choices)] if check else []) + list(wrap)
    missing = []
    for op, contract in known.items():
        specs = (profile or {}).get(op, ())
        function, choice, target = _choose(binding, contract, specs, rules.get(op), fallback)
        if choice.status == "missing" and specs:
            missing.append(f"{op} ({choice.reason})")
        if target is not None:
            targets[op] = target
        choices[op] = choice
        for layer in reversed(layers):
            function = layer(op, function)
        vars(binding)[op] = function
    if missing:
        raise NotClaimed(
            f"{chosen} does not claim {', '.join(missing)}; set PORTHAL_FALLBACK=torch or reference to run them there"
        )
    return binding


def _choose(
    binding: Binding, contract: Contract, specs: Sequence[CallSpec], rule: str | None, fallback: str
) -> tuple[Function, Choice, Kernel | None]:
    chosen, op = binding.backend, contract.name
    if rule == "composed":
        return _composed(binding, contract, "by policy"), Choice(op, "composed", "", "", "by policy"), None
    if rule is not None and rule.partition(":")[0] != chosen.name:
        return _elsewhere(chosen, contract, specs, rule, "by policy")
    refusals = []
    inherited: tuple[Function, Choice, Kernel] | None = None
    for kernel in chosen.candidates(contract):
        reason = next((r for s in specs if (r := chosen.refuses(op, kernel, s))), None)
        if reason:
            refusals.append(f"{kernel.owner}: {reason}")
            continue
        why = "; ".join(refusals)
        if kernel.owner == chosen.name:
            choice = Choice(op, "own", kernel.owner, kernel.provider, why, kernel.tie, kernel.limits)
            return kernel.function, choice, kernel
        choice = Choice(op, "inherited", kernel.owner, kernel.provider, why, kernel.tie, kernel.limits)
        inherited = kernel.function, choice, kernel
        break
    why = "; ".join(refusals)
    # A composite made of this binding's ops uses the chip's own kernels; one derived from the formula would not.
    if contract.decomposition and (inherited is None or inherited[1].owner == "reference"):
        return _composed(binding, contract, why), Choice(op, "composed", "", "", why), None
    if inherited:
        return inherited
    if fallback not in ("error", chosen.name):
        return _elsewhere(chosen, contract, specs, fallback, why or "no kernel")
    why = why or "no kernel"

    def refuse(*args: Any, **attrs: Any) -> Any:
        raise NotClaimed(f"{chosen} has no kernel for {op} ({why}), and PORTHAL_FALLBACK is 'error'")

    return refuse, Choice(op, "missing", "", "", why), None


def _composed(binding: Binding, contract: Contract, why: str) -> Function:
    decomposition = contract.decomposition
    if decomposition is None:
        raise UsageError(f"{contract.name} is no composite: it cannot be 'composed'")

    def call(*args: Any, **attrs: Any) -> Any:
        return decomposition(binding, *args, **attrs)

    return call


def _elsewhere(
    home: Backend, contract: Contract, specs: Sequence[CallSpec], name: str, why: str
) -> tuple[Function, Choice, Kernel | None]:
    """A kernel of another backend, with the operands carried there and back through their logical forms."""
    away = _shared(name)
    for kernel in away.candidates(contract):
        if not any(away.refuses(contract.name, kernel, s) for s in specs):
            choice = Choice(contract.name, "fallback", kernel.owner, kernel.provider, why, kernel.tie, kernel.limits)
            return _bridge(home, away, contract, kernel), choice, kernel
    raise NotClaimed(f"{name} was asked for {contract.name} ({why}) but does not claim it either")


def _bridge(home: Backend, away: Backend, contract: Contract, kernel: Kernel) -> Function:
    def send(value: Any) -> Any:
        if value is None or isinstance(value, Weight):  # weights were prepared over there
            return value
        if isinstance(value, Batch):
            return away.plan(value.with_native(None))
        if isinstance(value, (Pages, Selection)):
            return away.from_logical(value.spec, home.to_logical(value))
        return away.from_numpy(home.to_numpy(value))

    def fetch(value: Any, into: Any) -> Any:
        if isinstance(value, (Pages, Selection)):
            return home.from_logical(value.spec, away.to_logical(value), into)
        return home.from_numpy(away.to_numpy(value))

    names = [o.name for o in contract.signature.operands]

    def call(*args: Any, **attrs: Any) -> Any:
        out = kernel.function(*(send(a) for a in args), **attrs)
        results = out if isinstance(out, tuple) else (out,)
        given = dict(zip(names, args))
        back = tuple(
            fetch(value, given[r.name] if r.mutated else None)
            for value, r in zip(results, contract.signature.results)
        )
        return back if isinstance(out, tuple) else back[0]

    return call


def _checker(backend: Backend, choices: Mapping[str, Choice]) -> Wrap:
    def check(op: str, function: Function) -> Function:
        contract, choice = contracts()[op], choices[op]

        def call(*args: Any, **kwargs: Any) -> Any:
            spec = checked(contract, backend, args, kwargs)
            reason = choice.limits.refuses(spec)
            if reason:
                raise NotClaimed(f"{op} on {backend} does not take this call: {reason}; bind with a profile that has it")
            return function(*args, **kwargs)

        return call

    return check


def checked(
    contract: Contract, backend: Backend, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CallSpec:
    """Judge a call against its contract before it is made: its static facts, or UsageError."""
    operands, attrs = contract.arrange(args, kwargs)
    for operand in contract.signature.operands:
        value = operands[operand.name]
        if operand.kind == "array" and value is not None:
            reason = backend.refuses_array(value)
            if reason:
                raise UsageError(f"{contract.name}: {operand.name} is {reason}")
    spec = contract.spec(operands, attrs)
    contract.check_values(operands, spec, backend.to_numpy)
    return spec


# -- policy ----------------------------------------------------------------------------------------------------------

_used: ContextVar[str | None] = ContextVar("porthal_backend", default=None)


@contextmanager
def use(name: str) -> Iterator[Binding]:
    """Let the fronts `porthal.ops.*` and a bare `bind()` use this backend; models already loaded keep theirs."""
    binding = bind(name)
    token = _used.set(name)
    try:
        yield binding
    finally:
        _used.reset(token)


def selected() -> tuple[str, str]:
    """The backend that a bare bind() takes, and the rule that says so."""
    if used := _used.get():
        return used, "porthal.use"
    if named := os.environ.get("PORTHAL_BACKEND"):
        return named, "PORTHAL_BACKEND"
    return discovery.best(), "the first available in this order"


def _policy_ops() -> dict[str, str]:
    text = os.environ.get("PORTHAL_OPS", "")
    rules = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, equals, backend = part.partition("=")
        if not equals or not backend:
            raise UsageError(f"PORTHAL_OPS has {part!r}: write op=backend, separated by commas")
        rules[op.strip()] = backend.strip()
    return rules


def _verify_names(rules: Mapping[str, str], known: Mapping[str, Contract]) -> None:
    for op in rules:
        if op not in known:
            close = get_close_matches(op, known, 1)
            hint = f", did you mean {close[0]!r}?" if close else ";"
            raise UsageError(f"unknown op {op!r} in the overrides (PORTHAL_OPS){hint} known are {', '.join(known)}")


@cache
def _shared(name: str) -> Backend:
    return discovery.create(name)


@lru_cache(maxsize=512)
def _bound_for(name: str, ops: str, fallback: str, op: str, spec: CallSpec) -> Binding:
    return bind(name, profile={op: [spec]}, backend=_shared(name))


def front(contract: Contract, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A checked call with plain arrays: NumPy becomes the backend's array, weights are prepared on the fly."""
    name, _ = selected()
    backend = _shared(name)
    operands, attrs = contract.arrange(args, kwargs)
    plain: dict[str, np.ndarray[Any, Any]] = {}
    for operand in contract.signature.operands:
        value = operands[operand.name]
        if operand.kind == "Weight" and hasattr(value, "shape"):
            plain[operand.name] = value if isinstance(value, np.ndarray) else backend.to_numpy(value)
            spec = WeightSpec(contract.name, operand.name, tuple(value.shape), dtype(value))
            operands[operand.name] = Weight(spec, None)
        elif operand.kind == "array" and isinstance(value, np.ndarray):
            operands[operand.name] = backend.from_numpy(value)
        elif operand.kind == "Batch" and isinstance(value, Batch) and value.native is None:
            operands[operand.name] = backend.plan(value)
    facts = checked(contract, backend, tuple(operands.values()), attrs)
    policy = os.environ.get("PORTHAL_OPS", ""), os.environ.get("PORTHAL_FALLBACK", "error")
    binding = _bound_for(name, *policy, contract.name, facts)
    for key, array in plain.items():
        operands[key] = binding.prepare(operands[key].spec, array.__getitem__)
    return getattr(binding, contract.name)(*operands.values(), **attrs)
