"""`bind()`: one function per op, chosen once from claims and policy, so that a call costs no more than the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache, lru_cache, partial, wraps
from typing import Any

import numpy as np

from porthal.hal import discovery
from porthal.hal.backend import Backend, Kernel, Read
from porthal.hal.bridge import bridge, same_library
from porthal.hal.choice import Choice, Choices, Status
from porthal.hal.contract import CallSpec, Contract, collectives, contracts, operators
from porthal.hal.dtypes import dtype
from porthal.hal.errors import DataNotTaken, NotClaimed, Unavailable, UsageError
from porthal.hal.operands import Batch, Operand, Weight, WeightSpec
from porthal.hal.scheme import NONE
from porthal.hal.services import Services
from porthal.hal.several import Chosen, Function, by_scheme, by_shape
from porthal.hal.together import together
from porthal.hal.tuned import at, first_of, in_order, said, turns_of

Wrap = Callable[[str, Function], Function]
Profile = Mapping[str, Sequence[CallSpec]]
Callers = Mapping[str, Collection[str]]
VIA = "via="  # before a provider's name, in an override and in a case's token


class Binding(Services):
    """An immutable set of functions, one per op, for one backend, device, policy and profile, plus its services."""

    choices: Mapping[str, Choice]
    profile: Profile | None = None
    _again: Callable[..., Binding]

    def __init__(self, backend: Backend, choices: Mapping[str, Choice], kernels: Mapping[str, Kernel]) -> None:
        vars(self).update(backend=backend, choices=choices, _kernels=kernels)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a binding is immutable: bind() again instead of setting {name!r}")

    def __getattr__(self, name: str) -> Any:
        if name in vars(self)["choices"]:  # chosen by this
            return vars(self)[name]
        raise AttributeError(f"the binding of {vars(self)['backend']} has no op or service {name!r}")

    def __repr__(self) -> str:
        return f"<binding of {self.backend}: {self.summary()}>"

    def prepare(self, spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        """Pack a weight for the kernel that will use it; see `Backend.prepare`."""
        if self.choices[spec.op].status == "composed":
            op, operand = contracts()[spec.op].weights[spec.operand]
            return self.prepare(replace(spec, op=op, operand=operand), read, into)
        if into is not None:
            self._check_form(spec, into.spec)
        weight = (self._kernel(spec.op) or self.backend).prepare(spec, read, into)
        if not isinstance(weight, Weight):
            raise Unavailable(f"{self.backend}: prepare returned {weight!r} for {spec.op}.{spec.operand}, expected a Weight")
        return weight

    def to_logical(self, operand: Operand) -> dict[str, np.ndarray[Any, Any]]:
        """An operand's logical form as NumPy arrays; a weight is read by the backend whose kernel it was packed for."""
        kernel = self._kernel(operand.spec.op) if isinstance(operand, Weight) else None
        owner: Backend = kernel.backend if kernel else self.backend
        return owner.to_logical(operand)

    def capturable(self, op: str) -> bool:
        """Whether an op's kernel may stand in a captured graph."""
        kernel = self._kernel(op)
        return op not in collectives() and (kernel is None or (kernel.backend is self.backend and kernel.capturable))

    @property
    def captures(self) -> bool:
        """Whether all that it cannot do without may stand in a captured graph; not where something wraps the calls."""
        return self.backend.captures and not vars(self)["_wraps"] and all(map(self.capturable, vars(self)["_required"]))

    def _kernel(self, op: str) -> Kernel | None:
        """The kernel that was chosen for an op, where there is one."""
        if op not in self.choices:  # chosen by this
            return None
        found: Kernel | None = vars(self)["_kernels"].get(op)
        return found

    def require(self, *ops: str) -> None:
        """Raise NotClaimed where one of these ops has no kernel."""
        missing = [f"{op} ({self.choices[op].reason})" for op in dict.fromkeys(ops) if self.choices[op].status == "missing"]
        if missing:
            raise NotClaimed(f"{self.backend} does not claim {', '.join(missing)}{vars(self)['_advice']}")

    def fitted(self, profile: Profile, needed: Callers) -> Binding:
        """A binding for these calls: where this one was made without a profile, another by the same policy; else itself.

        NotClaimed where an op that is needed is missing, or the profile of this binding lacks a call's dtypes or attributes.
        """
        if self.profile is None:
            return self._again(profile=profile, needed=needed)
        for op, specs in profile.items():
            known = [replace(spec, dims={}) for spec in self.profile.get(op, ())]
            if lacking := [spec for spec in specs if replace(spec, dims={}) not in known]:
                parts = lacking[0].dtypes, {n: s for n, s in lacking[0].schemes.items() if s != NONE}, lacking[0].attrs
                facts = ", ".join(f"{name} {value}" for part in parts for name, value in part.items())
                advice = "bind it without a profile, or with that of this model in this dtype"
                raise NotClaimed(f"{self.backend} is bound for other calls than {op} with {facts}: {advice}")
        return self

    def also(self, profile: Profile, needed: Callers) -> tuple[Binding | None, str]:
        """A binding by the same policy for these calls, if each op that is needed stays with whose kernel it has here, or is
        composed of such; else None and the reason."""
        try:
            made = self._again(profile=profile, needed=needed)
        except NotClaimed as error:
            return None, str(error)
        for op in called(made.choices, needed):
            here, there = self.choices[op], made.choices[op]
            if there.status != "composed" and there.owner != here.owner:
                return None, f"{op}: {there.reason}"
        return made, ""

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
    needed: Callers | None = None,
    overrides: Mapping[str, str] | None = None,
    fallback: str | None = None,
    check: bool | None = None,
    wrap: Sequence[Wrap] = (),
    backend: Backend | None = None,
    divert: bool = True,
) -> Binding:
    """Choose a kernel per op.

    name       "backend" or "backend:device"; None reads PORTHAL_BACKEND, else takes the best available
    profile    the calls a model will make (`porthal.model.profile`): claims are judged over all of them
    needed     the ops without which binding fails, each with those that call it (`porthal.hal.callers`): inside a composite
               that has a kernel nothing is needed; None is all of the profile. Others fail when they are called
    overrides  op -> backend, "composed", or "via=PROVIDER" where the backend has several kernels for it; None reads
               PORTHAL_OPS ("topk=reference,moe_layer=composed")
    fallback   "error" or the backend for ops nobody claims; None reads PORTHAL_FALLBACK
    check      check every call against its contract before making it; None reads PORTHAL_CHECK
    wrap       (op, function) -> function, outermost first: tracing, counting, timing, lockstep
    backend    an instance to use instead of making one
    divert     a call with data that its kernel does not take goes to the next kernel; False: it raises DataNotTaken

    Raises UsageError for unknown names and NotClaimed when an op that is needed is claimed by nobody.
    """
    chosen = backend or discovery.create(name or discovery.selected()[0])
    rules = dict(overrides) if overrides is not None else _policy_ops()
    others = " or ".join(other for other in ("torch", "reference") if other != chosen.name)
    again = partial(bind, backend=chosen, overrides=rules, fallback=fallback, check=check, wrap=wrap, divert=divert)
    advice = f"; set PORTHAL_FALLBACK={others} to run what is missing there" if fallback is None else ""
    fallback = fallback or os.environ.get("PORTHAL_FALLBACK", "error")
    if fallback != "error":
        discovery.probe(fallback.partition(":")[0])  # an unknown name is a mistake even where nothing falls back
    check = _policy_check() if check is None else check
    known = operators()
    _verify_names(rules, known)

    kernels: dict[str, Kernel] = {}

    def choose(op: str) -> Choice:
        policy = Policy(rules.get(op), fallback, advice, divert)
        function, choice, kernel = _choose(binding, known[op], (profile or {}).get(op, ()), policy, None)
        if kernel is not None:
            kernels[op] = kernel
        if known[op].collective:
            function = together(known[op], chosen, function)
        for layer in reversed(layers):
            function = layer(op, function)
        vars(binding)[op] = function
        return choice

    choices = Choices(contracts(), collectives(), choose)
    binding = Binding(chosen, choices, kernels)
    layers = ([_checker(chosen, kernels)] if check else []) + list(wrap)
    vars(binding).update(profile=profile, _advice=advice, _again=again, _wraps=layers)
    wanted = contracts() if profile is None or fallback != "error" else known.keys() & {*profile, *rules}
    for op in wanted:  # what cannot be chosen is told now; of others there is a choice, if only to refuse the call
        choices[op]
    vars(binding)["_required"] = profile or () if needed is None else called(choices, needed)
    binding.require(*vars(binding)["_required"])
    return binding


def called(choices: Mapping[str, Choice], callers: Callers) -> list[str]:
    """The ops that are called where composites are composed as chosen."""
    found: list[str] = []
    active = [""]  # the model itself
    for caller in active:
        more = [op for op, by in callers.items() if caller in by and op not in found]
        active += [op for op in more if choices[op].status == "composed"]
        found += more
    return found


@dataclass(frozen=True)
class Policy:
    """What the user wants of one op; `advice` ends the sentence that says that nobody claims it."""

    rule: str | None
    fallback: str
    advice: str
    divert: bool


def _choose(
    binding: Binding, contract: Contract, specs: Sequence[CallSpec], policy: Policy, left: Sequence[Kernel] | None
) -> Chosen:
    """Function, choice and kernel for an op, of all that the backend has, or of those that are `left`."""
    chosen, op, rule, fallback = binding.backend, contract.name, policy.rule, policy.fallback
    if rule == "composed":
        return _composed(binding, contract, "by policy")
    via = rule.removeprefix(VIA) if rule and rule.startswith(VIA) else ""
    if rule is not None and not via and rule not in (chosen.name, str(chosen)):
        return _elsewhere(chosen, contract, specs, rule, "by policy")
    listed = kernels = list(chosen.candidates(contract) if left is None else left)
    if via and not (kernels := [k for k in kernels if k.provider == via and k.owner == chosen.name]):
        providers = ", ".join(k.provider for k in chosen.candidates(contract) if k.provider) or "none"
        raise NotClaimed(f"{chosen} has no kernel for {op} via {via!r}: its providers are {providers}")
    turns = turns_of(chosen, contract, kernels, specs[0]) if specs and not via else {}
    kernels = in_order(kernels, at(turns, first_of(specs[0], contract))) if turns else kernels
    if policy.divert and not via:
        kernels = [_diverting(binding, contract, specs, policy, kernels[i:]) for i in range(len(kernels))]
    own = [k for k in kernels if k.owner == chosen.name]
    rest = next((k for k in kernels if k not in own), None)
    if own and rest and not (same_library(chosen, rest.owner, _shared) and rest.packs_like(own[0])):
        rest = None
    apart = replace(policy, rule=None)
    if by_scheme_of_weight := by_scheme(contract, own, specs, lambda alike: _choose(binding, contract, alike, apart, listed)):
        return by_scheme_of_weight
    if shared := by_shape(chosen, contract, own, specs, None if via else rest):
        return shared
    refusals, inherited = [said(turns)] if turns else [], None
    for kernel in kernels:
        if reason := next((r for s in specs if (r := kernel.refuses(s))), None if specs else _only_quantised(kernel)):
            named = via or (kernel in own and len(own) > 1)
            refusals.append(f"{kernel.provider or kernel.owner if named else kernel.owner}: {reason}")
            continue
        why = "; ".join([*refusals, *(f"only {name} with {need.text}, read at each call" for name, need in kernel.needs)])
        if kernel.owner == chosen.name:
            return kernel.function, Choice.of(op, "own", kernel, why), kernel
        inherited = kernel
        break
    why = "; ".join(refusals)
    # A composite made of this binding's ops uses the chip's own kernels; one derived from the formula would not.
    if contract.decomposition and not via and (inherited is None or inherited.owner == "reference"):
        return _composed(binding, contract, why)
    if inherited and not same_library(chosen, inherited.owner, _shared):
        carried = f"operands are carried to arrays of {inherited.owner} and back"
        return _elsewhere(chosen, contract, specs, inherited.owner, "; ".join(filter(None, (why, carried))), "inherited")
    if inherited:
        return inherited.function, Choice.of(op, "inherited", inherited, why), inherited
    if fallback not in ("error", chosen.name):
        return _elsewhere(chosen, contract, specs, fallback, why or "no kernel")
    why = why or "no kernel"

    def refuse(*args: Any, **attrs: Any) -> Any:
        raise NotClaimed(f"{chosen} does not claim {op} ({why}){policy.advice}")

    return refuse, Choice(op, "missing", "", "", why), None


def _only_quantised(kernel: Kernel) -> str | None:
    """Why it is not chosen where nothing is known of the calls, which then are of plain numbers, or None."""
    taken = kernel.limits.schemes
    return None if taken.holds(NONE, {}) else f"it takes calls under {taken.text} alone, and no such call is known"


def _diverting(
    binding: Binding, contract: Contract, specs: Sequence[CallSpec], policy: Policy, kernels: Sequence[Kernel]
) -> Kernel:
    """The first of these kernels, where calls with data that it does not take go to what is chosen of the others.

    A weight has one packed form: where the op has one, only a kernel of this backend that packs alike takes over.
    """
    first, *left = kernels
    if not first.needs:
        return first
    function, choice, kernel = _choose(binding, contract, specs, replace(policy, rule=None), left)
    alike = kernel is not None and kernel.backend is first.backend and first.packs_like(kernel)
    if choice.status == "missing" or (contract.signature.of_kind("Weight") and not alike):
        return first

    @wraps(first.function)
    def call(*args: Any, **attrs: Any) -> Any:
        try:
            return first.function(*args, **attrs)
        except DataNotTaken:
            return function(*args, **attrs)

    return replace(first, function=call)


def _composed(binding: Binding, contract: Contract, why: str) -> tuple[Function, Choice, None]:
    decomposition = contract.decomposition
    if decomposition is None:
        raise UsageError(f"{contract.name} is not a composite and cannot be 'composed': name a backend instead")

    def call(*args: Any, **attrs: Any) -> Any:
        return decomposition(binding, *args, **attrs)

    return call, Choice(contract.name, "composed", "", "", why), None


def _elsewhere(
    chosen: Backend,
    contract: Contract,
    specs: Sequence[CallSpec],
    name: str,
    why: str,
    status: Status = "fallback",
) -> Chosen:
    """A kernel of another backend, with the operands carried there and back through their logical forms."""
    other = _shared(name)
    for kernel in other.candidates(contract):
        if not any(kernel.refuses(s) for s in specs):
            return bridge(chosen, other, contract, kernel), Choice.of(contract.name, status, kernel, why), kernel
    raise NotClaimed(f"{name} was chosen for {contract.name} ({why}) but does not claim it: name another backend")


def _checker(backend: Backend, kernels: Mapping[str, Kernel]) -> Wrap:
    def check(op: str, function: Function) -> Function:
        contract, kernel = operators()[op], kernels.get(op)
        limited = kernel is not None and kernel.function is function  # of several, the one for a call is found by the call

        def call(*args: Any, **kwargs: Any) -> Any:
            spec = checked(contract, backend, args, kwargs)
            if limited and kernel and (reason := kernel.refuses(spec)):
                raise NotClaimed(f"{op} on {backend} does not take this call: {reason}; bind with a profile that has it")
            return function(*args, **kwargs)

        return call

    return check


def checked(
    contract: Contract, backend: Backend, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> CallSpec:
    """Check a call against its contract before it is made: gives its static facts, or raises UsageError."""
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

@contextmanager
def use(name: str) -> Iterator[Binding]:
    """Let the fronts `porthal.ops.*` and a bare `bind()` use this backend; models already loaded keep theirs."""
    binding = bind(name)
    token = discovery.used.set(name)
    try:
        yield binding
    finally:
        discovery.used.reset(token)


def _policy_ops() -> dict[str, str]:
    text = os.environ.get("PORTHAL_OPS", "")
    rules: dict[str, str] = {}
    for part in text.split(",") if text.strip() else ():
        op, _, backend = (word.strip() for word in part.partition("="))
        if not op or backend in ("", VIA):
            raise UsageError(f"PORTHAL_OPS has {part!r}: write op=backend or op=via=PROVIDER, separated by commas")
        if op in rules:
            raise UsageError(f"PORTHAL_OPS has {op}={rules[op]} and {op}={backend}: expected one of them")
        rules[op] = backend
    return rules


def _policy_check() -> bool:
    text = os.environ.get("PORTHAL_CHECK", "")
    if text not in ("", "0", "1"):
        raise UsageError(f"PORTHAL_CHECK is {text!r}: expected 1 to check every call, or 0")
    return text == "1"


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
    name, _ = discovery.selected()
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
