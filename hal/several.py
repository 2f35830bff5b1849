"""Several kernels for one op: one function that gives each call to the kernel that takes it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from porthal.hal.backend import Backend, Kernel, Read
from porthal.hal.choice import Choice
from porthal.hal.contract import CallSpec, Contract
from porthal.hal.errors import NotClaimed
from porthal.hal.operands import Weight, WeightSpec
from porthal.hal.tuned import at, first_of, in_order, said, turns_of

Function = Callable[..., Any]
Chosen = tuple[Function, Choice, Kernel | None]
CUTS = 64  # of a range of rows at most
Classes = list[tuple[CallSpec, Kernel]]  # calls that are alike, and the kernel that takes them


def by_shape(
    backend: Backend, contract: Contract, kernels: Sequence[Kernel], specs: Sequence[CallSpec], rest: Kernel | None = None
) -> tuple[Function, Choice, Kernel] | None:
    """One function made of several own kernels, where each shape of the profile goes to the first kernel that takes it, the
    fastest first where that was measured; calls under schemes that they do not take go to `rest`, an inherited one.

    None where that is one kernel for all, or where none takes a shape. A weight has one packed form: kernels that pack
    differently are not combined.
    """
    op, found = contract.name, [_classes(backend, contract, kernels, spec) for spec in specs if rest or len(kernels) > 1]
    if rest and kernels:
        taken = [spec.schemes for spec, classes in zip(specs, found) if classes]
        left = [spec.schemes not in taken and not rest.refuses(spec) for spec in specs]
        found = [[(spec, rest)] if other else classes for spec, classes, other in zip(specs, found, left)]
    classes = [pair for each in found for pair in each]
    used = [k for k in (*kernels, rest) if k and any(k is chosen for _, chosen in classes)]
    if len(used) < 2 or not all(found):
        return None
    if contract.signature.of_kind("Weight") and not all(k.packs_like(used[0]) for k in used):
        return None

    def call(*args: Any, **attrs: Any) -> Any:
        spec = contract.spec(*contract.arrange(args, attrs))
        kernel = next((k for s, k in classes if s.covers(spec)), None)
        if kernel is None:
            raise NotClaimed(f"{op} on {backend} is bound for other shapes: bind with a profile that has this call")
        return kernel.function(*args, **attrs)

    measured = [turns for spec in specs if (turns := turns_of(backend, contract, kernels, spec))]
    reason = "; ".join(map(said, measured)) or "each shape goes to the first that takes it"
    tie = "any" if any(k.tie == "any" for k in used) else "lowest"
    providers = " or ".join(k.provider or k.owner for k in used)
    told = next((k for k in used if not k.capturable), used[0])
    return call, Choice(op, "own", used[0].owner, providers, reason, tie), told


def _classes(backend: Backend, contract: Contract, kernels: Sequence[Kernel], spec: CallSpec) -> Classes:
    """The calls of a spec by the first kernel that takes them, cut where that changes with the rows.

    [] where some have none, or where it changes more often than a table of kernels is worth.
    """
    low, high = rows if isinstance(rows := spec.dims.get(contract.rows), tuple) else (0, 0)
    turns = turns_of(backend, contract, kernels, spec)

    def part(start: int, end: int) -> CallSpec:
        return replace(spec, dims={**spec.dims, contract.rows: (start, end)}) if high else spec

    classes: Classes = []
    while low <= high and len(classes) < CUTS:
        fewest = low or first_of(spec, contract)
        kernel = next((k for k in in_order(kernels, at(turns, fewest)) if not k.refuses(part(low, low))), None)
        if kernel is None:
            return []
        last = min([high, *(rows - 1 for rows in turns if rows > fewest)])
        end = low + bisect_left(range(low, last), True, key=lambda n: bool(kernel.refuses(part(low, n + 1))))
        classes.append((part(low, end), kernel))
        low = end + 1
    return classes if low > high else []


def by_scheme(
    contract: Contract, own: Sequence[Kernel], specs: Sequence[CallSpec], choose: Callable[[Sequence[CallSpec]], Chosen]
) -> Chosen | None:
    """One function of what is chosen for each scheme of the op's only weight, which tells calls apart and is packed for its
    own kernel. It counts as what the weakest of them is, and what is own is said in the reason.

    None where there is one scheme, where an own kernel takes all calls, and where none takes all of one scheme.
    """
    weights = contract.signature.of_kind("Weight")
    if len(weights) != 1 or any(not any(k.refuses(s) for s in specs) for k in own):
        return None
    name = weights[0].name
    place = [o.name for o in contract.signature.operands].index(name)
    alike: dict[str, list[CallSpec]] = {}
    for spec in specs:
        alike.setdefault(spec.schemes[name], []).append(spec)
    if len(alike) < 2 or not any(not any(k.refuses(s) for s in each) for k in own for each in alike.values()):
        return None
    made = {scheme: choose(each) for scheme, each in alike.items()}
    kernels = {scheme: kernel for scheme, (_, _, kernel) in made.items() if kernel}
    order = ("missing", "fallback", "composed", "inherited", "own")
    _, choice, kernel = min(made.values(), key=lambda chosen: order.index(chosen[1].status))
    if kernel is None or any(k.backend is not kernel.backend for k in kernels.values()):
        return None
    functions = {scheme: function for scheme, (function, _, _) in made.items()}

    def call(*args: Any, **attrs: Any) -> Any:
        return functions[args[place].spec.scheme](*args, **attrs)

    def prepare(spec: WeightSpec, read: Read, into: Weight | None = None) -> Weight:
        return kernels[spec.scheme].prepare(spec, read, into)

    vars(call)["capturable"] = all(k.capturable for k in kernels.values())
    said = (f"{c.provider or c.owner} where {name} is {scheme}" for scheme, (_, c, _) in made.items() if c.status == "own")
    return call, replace(choice, reason="; ".join(said)), replace(kernel, function=call, prepare=prepare)
